"""The judge over real HTTP: what it says, what fails, and what failures do to an evaluation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import HELPERS

from vigos.data.examples import load_rows
from vigos.eval.evaluate import evaluate
from vigos.eval.judge import KEY_VARIABLE, Judge, JudgeError, verdict
from vigos.rollout.engine import RolloutEngine


@pytest.fixture
def address() -> Iterator[str]:
    script = HELPERS / "judge_server_process.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def asked(address: str, behaviour: str, **options: Any) -> Judge:
    return Judge(f"{address}/{behaviour}/v1", "judge", **({"retries": 1} | options))


@pytest.mark.parametrize("behaviour", ["good", "busy"])
def test_verdicts(behaviour: str, address: str) -> None:
    judge = asked(address, behaviour)
    assert judge("Which {colour}?", "red", "a Red one")
    assert not judge("Which?", "red", "blue")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("correct", True), ("Correct.", True), ("**Correct**", True), ("The answer is correct.", True),
        ("<think>Is it incorrect? No.</think>\n\nCorrect", True), ("It says red. That is not wrong: correct.", True),
        ("The letters differ, so at first it looks incorrect. But B is red.\n\ncorrect", True),
        ("incorrect", False), ("Incorrect.", False), ("Not correct.", False), ("That is not entirely correct", False),
        ("It isn't correct.", False), ("I do not think the answer is correct.", False),
        ("The answer cannot be called correct.", False), ("<think>correct?</think> incorrect", False),
        ("Incorrect. The reference is correct.", None), ("<think>It looks correct", None), ("Not incorrect.", None),
        ("Partially correct.", None), ("yes", None), ("", None), ("either correct or incorrect", None),
        ("It is correct if red is meant.", None),
    ],
)  # fmt: skip
def test_what_a_reply_says(reply: str, right: bool | None) -> None:
    if right is None:
        with pytest.raises(JudgeError, match="neither correct nor incorrect"):
            verdict(reply)
    else:
        assert verdict(reply) == right


def test_a_judge_may_think(address: str) -> None:
    """The helper cuts a reply after as many words as the request allows tokens."""
    assert asked(address, "thinks")("Which?", "red", "a red one")
    assert not asked(address, "thinks")("Which?", "red", "blue")
    with pytest.raises(JudgeError, match="neither correct nor"):
        asked(address, "thinks", max_tokens=16)("Which?", "red", "a red one")


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("undecided", "neither correct nor"),
        ("garbage", "JSON"),
        ("empty", "without 'choices'"),
        ("hangs", "no whole answer within 0.3 s"),
    ],
)
def test_failures_are_no_verdicts(behaviour: str, message: str, address: str) -> None:
    with pytest.raises(JudgeError, match=message):
        asked(address, behaviour, timeout=0.3 if behaviour == "hangs" else 5.0)("Which?", "red", "red")


def test_the_key_is_not_shown(address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cr3t")
    judge = asked(address, "refuses")
    with pytest.raises(JudgeError, match="status 401") as refused:
        judge("Which?", "red", "red")
    assert "s3cr3t" not in str(refused.value) + caplog.text + repr(judge)


def test_keys_of_another_server_stay_here(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "s3cr3t")
    with pytest.raises(JudgeError, match="status 401") as refused:
        asked(address, "headers")("Which?", "red", "red")
    assert "s3cr3t" not in str(refused.value)


def test_a_judge_that_is_gone() -> None:
    with pytest.raises(JudgeError, match="ConnectionError"):
        Judge("http://127.0.0.1:9/v1", "judge", retries=1)("Which?", "red", "red")


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="url of the judge must start with http"):
        Judge("localhost", "judge")
    with pytest.raises(ValueError, match="model of the judge must be named"):
        Judge("http://localhost", "")
    with pytest.raises(ValueError, match="timeout of the judge must be above 0"):
        Judge("http://localhost", "judge", timeout=0)


class Says(RolloutEngine):
    """An engine with one answer."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        self.eos_token_ids = (tokenizer.eos_token_id,)

    def generate(self, prompts: list[Any], sampling: Any, seed: Any) -> list[torch.Tensor]:
        return [self.ids] * len(prompts)


def test_rows_that_were_not_judged_are_not_wrong(address: str, tmp_path: Path) -> None:
    from vigos.world import load_base

    tokenizer = load_base()[1].tokenizer
    rows = load_rows([{"problem": "Which?", "answer": "red", "problem_id": str(i)} for i in range(6)])
    engine, records = Says(tokenizer, r"\boxed{it is red}"), tmp_path / "records.jsonl"

    def found(judge: Judge | None, **options: Any) -> dict[str, Any]:
        return evaluate(None, tokenizer, rows, engine=engine, judge=judge, **options).summary()

    assert found(None)["accuracy"] == 0.0
    sometimes = found(asked(address, "sometimes", retries=0), records=records)
    assert (sometimes["examples"], sometimes["accuracy"]) == (3, 1.0)
    assert sometimes["skipped_reasons"] == {"judge_failed": 3}
    with pytest.raises(ValueError, match="judge 'judge' there, None here"):
        found(None, records=records)
    with pytest.raises(ValueError, match=r"none of the 6 could be used \(judge_failed 6\)"):
        found(asked(address, "undecided", retries=0))
    engine = Says(tokenizer, "red")  # no box: wrong, and nobody is asked
    assert found(asked(address, "undecided"))["unparseable"] == 1.0
