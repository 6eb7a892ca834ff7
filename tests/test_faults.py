"""Steps that go wrong: numbers that are not finite, memory that runs out, ranks that are gone."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_ranks import FAULTS, TIMEOUT_S
from helpers.processes import HELPERS, start_ranks, wait_for
from helpers.training import CUT_OFF, TAGLESS, VALID_A, VALID_B, config, rows, tiny_student, trainer
from torch import Tensor
from transformers import TrainerCallback

from vigos.errors import TrainingStopped, end_process, watching_ranks
from vigos.train.trainer import ViGOSTrainer

TEXTS = [VALID_A, CUT_OFF, VALID_B, TAGLESS]


def parameters(engine: ViGOSTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.model.named_parameters() if p.requires_grad}


def logs_of(engine: ViGOSTrainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in log.items() if "perf/" not in k} for log in engine.state.log_history if "loss" in log]


class Watch(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


# --- Not finite ------------------------------------------------------------------------------------------------------


def poisoned(folder: Path, steps: set[int], where: str, **options: Any) -> tuple[ViGOSTrainer, Watch]:
    """A trainer in whose `steps` a gradient, or the student's hidden states and with them the loss, hold a NaN."""
    watch = Watch()
    args = config(folder, max_steps=5, clip_mode="none", learning_rate=1e-2, **options)
    engine = trainer(tiny_student(), args, rows(12), texts=TEXTS, callbacks=[watch])
    chosen = [p for p in engine.model.parameters() if p.requires_grad][3]

    def bad() -> bool:
        return engine.state.global_step + 1 in steps

    def gradient(grad: Tensor) -> Tensor:
        return grad * float("nan") if bad() else grad

    def hidden(module: Any, inputs: Any, output: Tensor) -> Tensor | None:
        return output * float("inf") if bad() and torch.is_grad_enabled() else None

    if where == "gradient":
        chosen.register_hook(gradient)
    else:
        engine.model.get_base_model().model.language_model.norm.register_forward_hook(hidden)
    return engine, watch


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_step_that_is_not_finite_is_dropped(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, watch = poisoned(tmp_path, {2, 4}, where)
    with caplog.at_level(logging.WARNING, logger="vigos.train.recovery"):
        engine.train()
    first, second, third, fourth, fifth = watch.after
    assert same(first, second)
    assert not same(second, third), "the run goes on"
    assert same(third, fourth)
    assert not same(fourth, fifth)
    assert all(torch.isfinite(p).all() for p in fifth.values())
    assert [log["steps/dropped"] for log in logs_of(engine)] == [0, 1, 0, 1, 0]
    assert all(int(s["step"]) == 3 for s in list(engine.optimizer.state.values())[:4]), "the optimizer saw three steps"
    assert f"step 2 dropped: its {where} is not finite" in caplog.text
    files = sorted(p.name for p in (tmp_path / "faults").iterdir())
    assert files == ["step-000002.jsonl", "step-000004.jsonl"]
    records = [json.loads(line) for line in (tmp_path / "faults" / files[0]).read_text().splitlines()]
    assert len(records) == 2, "both rollouts of the step"
    assert all(r["completion_ids"] and r["prompt_ids"] and r["reason"] == f"{where} not finite" for r in records)


def test_too_many_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    engine, watch = poisoned(tmp_path, {2, 3, 4, 5}, "gradient", max_dropped_steps=3)
    with pytest.raises(TrainingStopped, match=r"not finite in 3 steps in a row .*the last of them step 4; .*faults"):
        engine.train()
    assert len(watch.after) == 3
    assert same(watch.after[0], parameters(engine))
    assert len(list((tmp_path / "faults").iterdir())) == 3


# --- Out of memory ---------------------------------------------------------------------------------------------------


class NoMemory:
    """Raises what CUDA's allocator raises, at the `at`-th forward or backward of a layer in which gradients are on."""

    def __init__(self, engine: ViGOSTrainer, at: int, times: int = 1, backward: bool = False) -> None:
        self.seen, self.at, self.times = 0, at, times
        layer = engine.model.get_base_model().model.language_model.layers[0].mlp
        if backward:
            layer.register_full_backward_hook(lambda *_: self.maybe())
        else:
            layer.register_forward_pre_hook(lambda *_: self.maybe() if torch.is_grad_enabled() else None)

    def maybe(self) -> None:
        self.seen += 1
        if self.at <= self.seen < self.at + self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def memory_run(folder: Path, **options: Any) -> ViGOSTrainer:
    defaults = {"max_steps": 2, "clip_mode": "none", "gradient_accumulation_steps": 2, "completion_steps": 1}
    args = config(folder, **(defaults | {"token_budget": 4096} | options))
    return trainer(tiny_student(torch.float64), args, rows(8), texts=TEXTS)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("at", [1, 2, 4], ids=["first micro-batch", "second", "second step"])
@pytest.mark.slow
def test_out_of_memory_halves_the_packs(
    at: int, backward: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses, parameters and records are those of a run in which memory sufficed."""
    whole = memory_run(tmp_path / "whole")
    whole.train()
    engine = memory_run(tmp_path / "short")
    fault = NoMemory(engine, at, backward=backward)
    with caplog.at_level(logging.WARNING, logger="vigos.train.recovery"):
        engine.train()
    assert fault.seen > at
    assert engine.scorer.token_budget == 2048
    assert caplog.text.count("going on with token_budget=2048 instead of 4096") == 1
    for log, expected in zip(logs_of(engine), logs_of(whole), strict=True):
        assert log == pytest.approx(expected, rel=1e-9)
    after = parameters(whole)
    assert all(torch.allclose(p, after[n], rtol=0, atol=1e-12) for n, p in parameters(engine).items())
    for name in ("step-000001.jsonl", "step-000002.jsonl"):
        lines = [(tmp_path / run / "completions" / name).read_text().count("\n") for run in ("whole", "short")]
        assert lines == [4, 4]


def test_memory_that_never_suffices_ends_the_run(tmp_path: Path) -> None:
    engine = memory_run(tmp_path, token_budget=1024)
    NoMemory(engine, 1, times=10**6)
    with pytest.raises(TrainingStopped, match=r"out of memory with token_budget=256, where halving it helps no more"):
        engine.train()


@pytest.mark.slow
def test_out_of_memory_while_sampling_halves_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for limit in (99, 1):
        args = config(tmp_path, max_steps=2, clip_mode="none", per_device_train_batch_size=4)
        engine = trainer(tiny_student(torch.float64), args, rows(8))

        def too_many(module: Any, inputs: Any, limit: int = limit) -> None:
            if not torch.is_grad_enabled() and inputs[0].shape[0] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        engine.model.get_base_model().model.language_model.layers[0].mlp.register_forward_pre_hook(too_many)
        with caplog.at_level(logging.WARNING, logger="vigos.rollout.generate"):
            engine.train()
        found.append((logs_of(engine), engine.rollouts.engine.batch_size))  # type: ignore[attr-defined]
    assert [size for _, size in found] == [None, 1]
    assert "going on with rollout_batch_size=2 instead of 4" in caplog.text
    for log, expected in zip(found[1][0], found[0][0], strict=True):
        assert log == pytest.approx(expected, rel=1e-7)


@pytest.mark.slow
def test_smaller_packs_outlive_a_restart(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    engine = memory_run(tmp_path, **saved)
    NoMemory(engine, 1)
    engine.train()
    for budget, expected in ((4096, 2048), (3000, 3000)):
        again = memory_run(tmp_path, **saved, token_budget=budget)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert again.scorer.token_budget == expected, "what was set anew counts, what was found out stays"


# --- Ranks -----------------------------------------------------------------------------------------------------------


def test_only_what_collectives_say_means_that_a_rank_is_lost() -> None:
    class ServerError(RuntimeError):
        pass

    for error in (ServerError("the server timed out"), RuntimeError("shapes do not match"), RuntimeError("timed out")):
        lost = type(error) is RuntimeError and "timed out" in str(error)
        with pytest.raises(TrainingStopped if lost else type(error)), watching_ranks(0, 2, 1.0):
            raise error
    with pytest.raises(RuntimeError, match=r"^timed out"), watching_ranks(0, 1, 1.0):  # no other rank
        raise RuntimeError("timed out")


@pytest.mark.slow
def test_rank_that_is_gone_or_hangs_stops_the_others(tmp_path: Path) -> None:
    """One message on the rank that is left; the one whose memory ran out says what to set."""
    pairs = {
        how: start_ranks(HELPERS / "fault_ranks.py", [how, str(tmp_path / how)], 2, tmp_path / f"{how}-logs")
        for how in FAULTS
    }
    for how, processes in pairs.items():
        logs = tmp_path / f"{how}-logs"
        code = wait_for(processes[:1], logs, timeout=200)
        wait_for(processes[1:], logs, timeout=200 if how == "memory" else 0)  # a stopped process is killed here
        assert code == [1]
        log = (logs / "rank0.log").read_text()
        errors = [line for line in log.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "rank 0 of 2 stops: another rank has gone" in errors[0]
        assert f"ddp_timeout={TIMEOUT_S} s" in errors[0]
        assert "--resume auto" in errors[0]
        assert "Traceback" not in log
    said = (tmp_path / "memory-logs" / "rank1.log").read_text()
    assert (
        "error: out of memory on rank 1 with token_budget=16384: go on with --resume auto --token-budget 8192" in said
    )


# What a collective that never ends comes to: a thread that the interpreter would wait for.
STUCK = """
import atexit, threading
import torch.distributed as dist
from vigos.errors import end_process
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "registered")
print("said")
end_process(3)
"""


def test_a_rank_ends_with_its_code_whatever_still_waits() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout.split()) == (3, ["said", "registered"]), done.stderr
    with pytest.raises(SystemExit) as ended:  # no group: the interpreter's own way out
        end_process(4)
    assert ended.value.code == 4
