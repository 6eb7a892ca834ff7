"""The run folder by itself: what survives a kill, what a resumed run forgets, who writes what."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training import config, tiny_student
from transformers import IntervalStrategy

from vigos.data.examples import BadExample
from vigos.train.run_folder import RunLog, _plain
from vigos.train.teacher_weights import TEACHER_FILE, TeacherPolicy


def begin(log: RunLog, step: int) -> None:
    log.on_train_begin(None, SimpleNamespace(global_step=step), None)  # type: ignore[arg-type]


def logged(log: RunLog, step: int, **values: Any) -> None:
    log.on_log(None, SimpleNamespace(global_step=step), None, logs=values)  # type: ignore[arg-type]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_forgets_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        logged(log, step, loss=0.5)
        (tmp_path / "completions").mkdir(exist_ok=True)
        (tmp_path / "completions" / f"step-{step:06d}.jsonl").write_text("{}\n")
        (tmp_path / "completions" / f"step-{step:06d}-rank1.jsonl").write_text("{}\n")
    log.write_skipped(1, BadExample("r9", "missing_image", "no such file"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    begin(log, 2)
    assert steps(tmp_path) == [1, 2]
    assert sorted(p.name for p in (tmp_path / "completions").iterdir()) == [
        "step-000001-rank1.jsonl", "step-000001.jsonl", "step-000002-rank1.jsonl", "step-000002.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "skipped.jsonl").is_file()
    begin(log, 0)
    assert steps(tmp_path) == []
    assert not list((tmp_path / "completions").iterdir())
    assert not (tmp_path / "skipped.jsonl").exists()


def test_metrics_of_somebody_else_are_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("epoch,loss\n")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl must hold one JSON object with a step a line, got 'epoch,loss"
    ):
        begin(RunLog(tmp_path), 2)


def test_other_ranks_write_only_their_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path, rank=1)
    log.write_config(config(tmp_path))
    logged(log, 1, loss=1.0)
    begin(log, 0)
    assert log.save_final(tiny_student(), None, merged=True) == {}
    assert not list(tmp_path.rglob("*.*")), "rank 0 writes what all share"


def test_everything_becomes_plain_data(tmp_path: Path) -> None:
    value = {
        "tensor": torch.tensor(1.5), "inf": float("inf"), "nan": float("nan"), "path": Path("a"), "none": None,
        "enum": IntervalStrategy.STEPS, "tuple": (1, True), 3: "key",
    }  # fmt: skip
    assert _plain(value) == {
        "tensor": 1.5, "inf": "inf", "nan": "nan", "path": "a", "none": None, "enum": "steps", "tuple": [1, True],
        "3": "key",
    }  # fmt: skip
    log = RunLog(tmp_path)
    logged(log, 1, loss=float("nan"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "nan", "strict JSON has no NaN"


def test_config_holds_no_secret(tmp_path: Path) -> None:
    RunLog(tmp_path).write_config(config(tmp_path, hub_token="hf_secret"), model="m")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    assert "model: m" in text


def test_moving_average_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = TeacherPolicy(tiny_student(), "ema")
    policy.save(tmp_path)
    policy.copies.pop(next(iter(policy.copies)))
    with pytest.raises(ValueError, match=rf"{TEACHER_FILE} must hold the average of this model's trained weights"):
        policy.load(tmp_path)
    TeacherPolicy(tiny_student(), "frozen").load(tmp_path / "absent")  # has nothing to read
