"""Rollouts over HTTP from a real server process with the built-in model, and what happens when it misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import HELPERS

from vigos.data.examples import load_rows
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.rollout.checks import RolloutError
from vigos.rollout.engine import Sampling
from vigos.rollout.generate import TransformersEngine
from vigos.rollout.server import KEY_VARIABLE, RolloutServerError, ServerEngine
from vigos.rollout.vllm import only_gpu
from vigos.train.config import ViGOSConfig
from vigos.train.trainer import ViGOSTrainer
from vigos.world import load_base, world_prompts, write_world

SCRIPT = HELPERS / "rollout_server_process.py"
SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=20, max_new_tokens=40, n=2)


def start() -> tuple[subprocess.Popen[str], int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen([sys.executable, str(SCRIPT)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    process, port = start()
    yield port
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load_base()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), "train", n=8, seed=3)


@pytest.fixture(scope="module")
def prompts(base: tuple[Any, Any], rows: Path) -> list[EncodedPrompt]:
    _, processor = base
    return [
        encode_prompt(processor, world_prompts(), "student", row["problem"], row["answer"], row["images"])
        for row in list(load_rows(rows))[:3]
    ]


def seen(port: int) -> dict[str, Any]:
    """Requests by behaviour and adapters that the server has."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        return json.load(answer)


def engine(base: tuple[Any, Any], port: int, behaviour: str, **options: Any) -> ServerEngine:
    model, processor = base
    defaults = {"timeout": 60.0, "retries": 3, "pause": 0.01, "vocab_size": model.config.text_config.vocab_size}
    return ServerEngine(
        f"http://127.0.0.1:{port}/{behaviour}/v1", "base", processor.tokenizer,
        eos_token_ids=(processor.tokenizer.eos_token_id,), banned_token_ids=(model.config.image_token_id,),
        **(defaults | options),
    )  # fmt: skip


def local(base: tuple[Any, Any], prompts: list[EncodedPrompt], seeds: list[int]) -> list[torch.Tensor]:
    return TransformersEngine.for_model(*base).generate(prompts, SAMPLING, seeds)


@pytest.mark.parametrize(("behaviour", "asked"), [("good", 3), ("busy", 5), ("garbage-once", 4)])
def test_the_same_completions_as_with_the_model_at_hand(
    behaviour: str, asked: int, base: tuple[Any, Any], prompts: list[EncodedPrompt], port: int
) -> None:
    """Whatever failed in passing: images, prefill, sampling, seeds and order arrive."""
    seeds = [5, 2**62 + 1, 7]
    served = engine(base, port, behaviour)
    found = served.generate(prompts, SAMPLING, seeds)
    wanted = local(base, prompts, seeds)
    assert len(found) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert seen(port)["seen"][behaviour] == asked


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", r"chat/completions refused: status 400: .*no such model"),
        ("garbage", r"failed 2 times, last with no JSON \(JSONDecodeError"),
        ("truncated", r"failed 2 times, last with \d+ token ids, but usage says \d+"),
        ("placeholder", r"failed 2 times, last with a completion holds the banned ids"),
        ("text-only", r"returned no token ids"),
        ("other-prompt", r"v1 \(base\) rendered another prompt: it differs from token 4 on"),
        ("hangs", r"failed 2 times, last with no whole answer within 1 s"),
        ("keyed", r"refused: status 401"),
        ("short", r"answered a completion cut after 5 of 40 tokens, finish_reason 'length': its context"),
    ],
)
def test_what_lasts_is_an_error_that_says_what(
    behaviour: str, message: str, base: tuple[Any, Any], prompts: list[EncodedPrompt], port: int
) -> None:
    timeout = 1.0 if behaviour == "hangs" else 60.0
    with pytest.raises(RolloutError, match=message):
        engine(base, port, behaviour, retries=1, timeout=timeout).generate(prompts[:1], SAMPLING, 0)


def test_one_failure_ends_it_and_asks_for_nothing_more(
    base: tuple[Any, Any], prompts: list[EncodedPrompt], port: int
) -> None:
    before = seen(port)["seen"].get("refuses", 0)
    with pytest.raises(RolloutServerError, match="refused"):
        engine(base, port, "refuses", concurrency=2).generate(prompts[:1] * 50, SAMPLING, 0)
    assert seen(port)["seen"]["refuses"] - before < 10


@pytest.mark.slow
def test_a_server_that_dies(base: tuple[Any, Any], prompts: list[EncodedPrompt]) -> None:
    process, port = start()
    with pytest.raises(RolloutServerError, match=r"failed 2 times, last with ConnectionError"):
        engine(base, port, "dies", retries=1).generate(prompts, SAMPLING, 0)
    assert process.wait(timeout=120) == 1


def test_the_key_is_sent_and_never_shown(
    base: tuple[Any, Any], prompts: list[EncodedPrompt], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cr3t")
    served = engine(base, port, "keyed")
    assert len(served.generate(prompts[:1], SAMPLING, 0)) == 2
    assert "s3cr3t" not in repr(served)
    with pytest.raises(RolloutServerError) as refused:
        engine(base, port, "refuses", retries=0).generate(prompts[:1], SAMPLING, 0)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_engine": "server", "rollout_model": "m"}, r"vllm_server_base_url must be given"),
        ({"rollout_engine": "server", "vllm_server_base_url": "http://x/v1"}, r"rollout_model must be given"),
        ({"vllm_sleep_level": 3}, r"vllm_sleep_level must be 0, 1 or 2, got 3"),
        ({"vllm_weight_transfer": "nccl"}, r"vllm_weight_transfer must be 'files' unless .*lora True"),
        ({"vllm_sleep_level": 2}, r"vllm_sleep_level must be at most 1 with lora"),
        ({"rollout_engine": "vllm"}, r"rollout_model must be given with rollout_engine='vllm'"),
        ({"vllm_gpu_memory_utilization": 1.5}, r"vllm_gpu_memory_utilization must be in \(0, 1\], got 1.5"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ViGOSConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_prompts_without_a_chat_are_refused(base: tuple[Any, Any], port: int) -> None:
    with pytest.raises(ValueError, match=r"prompts must come from encode_prompt"):
        engine(base, port, "good").generate([EncodedPrompt(torch.tensor([1, 2]), None, None)], SAMPLING, 0)
    with pytest.raises(ValueError, match=r"vllm_server_base_url must start with http"):
        ServerEngine("localhost:8000", "m", None, eos_token_ids=(1,))


def test_an_adapter_is_loaded_over_a_stale_one_of_the_same_run(
    base: tuple[Any, Any], prompts: list[EncodedPrompt], port: int, tmp_path: Path
) -> None:
    """A resumed run pushes step 3 again; another run on the same server has a step 3 of its own."""
    from peft import LoraConfig, get_peft_model

    def push(folder: str, scale: float) -> ServerEngine:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        model = get_peft_model(load_base()[0], lora)
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.data.mul_(scale)
        served = engine(base, port, "adapters", adapters=tmp_path / folder)
        served.update_weights(3, model, {n: p for n, p in model.named_parameters() if p.requires_grad})
        return served

    stale, other = push("run", 0.0).generate(prompts, SAMPLING, 5), push("other", 2.0)
    resumed = push("run", 2.0)
    wanted = resumed.generate(prompts, SAMPLING, 5)
    assert any(not torch.equal(a, b) for a, b in zip(stale, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other.generate(prompts, SAMPLING, 5), wanted, strict=True))
    assert resumed.served_name != other.served_name


@pytest.mark.slow
def test_training_on_a_server_is_training(port: int, rows: Path, tmp_path: Path) -> None:
    """Three steps with rollouts from the server equal three with the model's own, and the base stays as it was."""

    def train(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], Any]:
        model, processor = load_base()
        before = {name: p.clone() for name, p in model.named_parameters()}
        config = ViGOSConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_steps=3,
            per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, clip_mode="none",
            max_completion_length=40, lora_r=4, lora_alpha=8, lora_dropout=0.0, save_merged=False, temperature=1.0,
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        trainer = ViGOSTrainer(
            model=model,
            args=config,
            processing_class=processor,
            train_dataset=load_rows(rows),
            prompts=world_prompts(),
        )
        trainer.train()
        after = {name.replace("base_model.model.", "").replace(".base_layer", ""): p
                 for name, p in trainer.model.named_parameters() if "lora_" not in name}  # fmt: skip
        assert all(torch.equal(after[name], p) for name, p in before.items())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if not k.startswith(("perf", "train_", "mismatch"))} for line in lines
        ], trainer

    wanted, _ = train(tmp_path / "local")
    url = f"http://127.0.0.1:{port}/train/v1"
    found, trainer = train(tmp_path / "served", rollout_engine="server", vllm_server_base_url=url, rollout_model="base")
    assert found == wanted
    assert trainer.rollouts.engine.model == "vigos-2"
    ours = [name for name, path in seen(port)["adapters"].items() if path.startswith(str(tmp_path))]
    assert ours == [trainer.rollouts.engine.served_name]  # the one before was unloaded
    assert [p.name for p in (tmp_path / "served" / "rollout_adapters").iterdir()] == ["vigos-2"]


@pytest.mark.parametrize(("visible", "wanted"), [(None, "1"), ("4, 6", "6"), ("", "1")])
def test_the_processes_of_a_rank_see_its_gpu_alone(
    visible: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv(name, visible)
    with only_gpu(1):
        assert os.environ[name] == wanted
    assert os.environ.get(name) == visible
