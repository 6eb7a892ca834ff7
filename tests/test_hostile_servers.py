"""Let a real server answer slowly, without end, or without sense. Bounded time and memory, one line, no key."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile_server import RAW, SENSELESS, STREAMS
from helpers.processes import HELPERS

from vigos.eval.judge import KEY_VARIABLE as JUDGE_KEY
from vigos.eval.judge import Judge, JudgeError
from vigos.launch import EvalSource
from vigos.method.encode import Chat, EncodedPrompt
from vigos.rollout.engine import Sampling
from vigos.rollout.server import KEY_VARIABLE, RolloutServerError, ServerEngine
from vigos.system.files import replace_json
from vigos.system.http import MAX_BYTES
from vigos.system.secrets import api_key, masked, remember
from vigos.system.text import printable
from vigos.train.config import ViGOSConfig

PROMPT = EncodedPrompt(torch.tensor([5, 6, 7]), None, None, Chat([{"role": "user", "content": []}], [], ""))
GOOD = {
    "choices": [{"index": i, "token_ids": [8 + i, 2], "finish_reason": "stop"} for i in range(2)],
    "usage": {"completion_tokens": 4}, "prompt_token_ids": [5, 6, 7],
}  # fmt: skip
SAMPLING = Sampling(max_new_tokens=40, n=2)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    answer = tmp_path_factory.mktemp("hostile") / "answer.json"
    answer.write_text(json.dumps(GOOD))
    command = [sys.executable, str(HELPERS / "hostile_server.py"), str(answer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield int(process.stdout.readline())
        process.kill()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return str(ids)


def engine(port: int, behaviour: str, **options: Any) -> ServerEngine:
    return ServerEngine(
        f"http://127.0.0.1:{port}/{behaviour}/v1", "m", Tokenizer(), eos_token_ids=(2,), vocab_size=100,
        **({"timeout": 0.4, "retries": 1, "pause": 0.0} | options),
    )  # fmt: skip


def failure(port: int, behaviour: str, **options: Any) -> str:
    with pytest.raises(RolloutServerError) as refused:
        engine(port, behaviour, **options).generate([PROMPT], SAMPLING, 0)
    message = str(refused.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def test_the_good_answer_is_taken(port: int) -> None:
    found = engine(port, "good").generate([PROMPT], SAMPLING, 0)
    assert [c.tolist() for c in found] == [[8, 2], [9, 2]]


@pytest.mark.parametrize("behaviour", [*SENSELESS, *RAW])
def test_answers_without_sense_are_asked_for_again_then_refused(behaviour: str, port: int) -> None:
    assert "failed 2 times, last with " in failure(port, behaviour, timeout=10.0)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("behaviour", STREAMS)
def test_answers_have_a_deadline_and_a_size(behaviour: str, port: int) -> None:
    """Each of them waited for ever, or grew without end, where only one wait of the socket was bounded."""
    long = behaviour.startswith("endless") or behaviour == "bomb"
    message = failure(port, behaviour, timeout=20.0 if long else 0.4)
    if behaviour.startswith("slow") or behaviour in ("silent", "continues"):
        assert "no whole answer within 0.4 s" in message
    if behaviour in ("endless", "endless-error"):
        assert f"more than {MAX_BYTES} bytes" in message
    if behaviour == "bomb":
        assert "an answer in 'gzip', which was not asked for" in message


@pytest.mark.timeout(60)
@pytest.mark.parametrize("behaviour", [*RAW, *STREAMS, "list", "no-choices", "choice-text", "good"])
def test_a_judge_is_heard_as_carefully(behaviour: str, port: int) -> None:
    long = behaviour.startswith("endless")
    judge = Judge(f"http://127.0.0.1:{port}/{behaviour}/v1", "m", timeout=20.0 if long else 0.4, retries=0)
    with pytest.raises(JudgeError) as failed:
        judge("Which?", "red", "blue")
    assert str(failed.value).isprintable()


def test_names_of_models_are_checked(port: int) -> None:
    for behaviour in ("list", "good", "html"):
        with pytest.raises(RolloutServerError, match="failed 2 times"):
            engine(port, behaviour)._names()


# --- Keys -----------------------------------------------------------------------------------------------------------


def test_a_key_that_a_server_repeats_is_masked(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for variable in (KEY_VARIABLE, JUDGE_KEY):
        monkeypatch.setenv(variable, 'k3y"with\\odd%parts')
    with caplog.at_level(logging.INFO):
        message = failure(port, "repeats-the-key")
        with pytest.raises(JudgeError) as failed:
            Judge(f"http://127.0.0.1:{port}/repeats-the-key/v1", "m")("Which?", "red", "blue")
    for text in (message, str(failed.value), caplog.text):
        assert "odd" not in text
    assert "Bearer *** is wrong" in message
    assert replace_json(tmp_path / "facts.json", {"key": api_key(KEY_VARIABLE)}).read_text() == '{\n "key": "***"\n}\n'
    assert printable("key " + json.dumps({"k": api_key(KEY_VARIABLE)})) == 'key {"k": "***"}'


@pytest.mark.parametrize("key", ["line\nend", "carriage\rreturn", "two words", "schlüssel", "nul\x00l", "tail\n"])
def test_a_key_that_no_header_holds_is_an_error_at_the_door(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {KEY_VARIABLE: key})  # the system's would not take a NUL
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} must be one word of printable ASCII") as refused:
        engine(9, "good")
    assert key.strip() not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["http://user:hidden@host/v1", "http://hidden@host/v1", "https://host/v1?api_key=hidden", "http://host/v1#hidden",
     "http://host/hid den", "http://host/v1\nhidden"],
)  # fmt: skip
def test_a_key_inside_an_address_is_refused_and_not_shown(address: str, tmp_path: Path) -> None:
    options: list[Any] = [
        lambda: ViGOSConfig(
            output_dir=str(tmp_path), use_cpu=True, rollout_engine="server", rollout_model="m",
            vllm_server_base_url=address,
        ),
        lambda: EvalSource(judge_url=address, judge_model="m"),
        lambda: EvalSource(server_url=address, server_model="m"),
        lambda: Judge(address, "m"),
    ]  # fmt: skip
    for build in options:
        with pytest.raises(ValueError, match="must hold no user, key, query or white space") as refused:
            build()
        assert "hidden" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://host", "http://", "http://host:0", "http://host:x"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Judge(address, "m")


@pytest.mark.parametrize("word", ["a", "EMPTY", "hidden"])
def test_short_words_are_not_masked(word: str) -> None:
    remember(word)
    assert masked(f"{word} banana") == f"{word} banana"
