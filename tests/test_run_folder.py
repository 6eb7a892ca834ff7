"""The run folder by itself: what survives a kill, what a resumed run forgets, who writes what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.training import config, tiny_student
from safetensors.torch import load_file, save_file
from transformers import IntervalStrategy

from vigos.data.examples import BadExample
from vigos.train.checkpoint import read_parts, write_parts
from vigos.train.run_folder import RunFolder, plain
from vigos.train.teacher_weights import TeacherWeights


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_forgets_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    log = RunFolder(tmp_path)
    for step in (1, 2, 3):
        log.write_metrics(step, {"loss": 0.5})
        (tmp_path / "completions").mkdir(exist_ok=True)
        (tmp_path / "completions" / f"step-{step:06d}.jsonl").write_text("{}\n")
        (tmp_path / "completions" / f"step-{step:06d}-rank1.jsonl").write_text("{}\n")
    log.write_skipped(1, BadExample("r9", "missing_image", "no such file"))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log.cut_after(2)
    assert steps(tmp_path) == [1, 2]
    assert sorted(p.name for p in (tmp_path / "completions").iterdir()) == [
        "step-000001-rank1.jsonl", "step-000001.jsonl", "step-000002-rank1.jsonl", "step-000002.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "skipped.jsonl").is_file()
    log.cut_after(0)
    assert steps(tmp_path) == []
    assert not list((tmp_path / "completions").iterdir())
    assert not (tmp_path / "skipped.jsonl").exists()


def test_metrics_of_somebody_else_are_not_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("epoch,loss\n")
    with pytest.raises(
        ValueError, match=r"metrics.jsonl must hold one JSON object with a step a line, got 'epoch,loss"
    ):
        RunFolder(tmp_path).cut_after(2)


def test_other_ranks_write_only_their_own(tmp_path: Path) -> None:
    log = RunFolder(tmp_path, rank=1)
    log.write_config(config(tmp_path))
    log.write_metrics(1, {"loss": 1.0})
    log.cut_after(0)
    assert not list(tmp_path.rglob("*.*")), "rank 0 writes what all share"


def test_everything_becomes_plain_data(tmp_path: Path) -> None:
    value = {
        "tensor": torch.tensor(1.5), "inf": float("inf"), "nan": float("nan"), "path": Path("a"), "none": None,
        "enum": IntervalStrategy.STEPS, "tuple": (1, True), 3: "key",
    }  # fmt: skip
    assert plain(value) == {
        "tensor": 1.5, "inf": "inf", "nan": "nan", "path": "a", "none": None, "enum": "steps", "tuple": [1, True],
        "3": "key",
    }  # fmt: skip
    log = RunFolder(tmp_path)
    log.write_metrics(1, {"loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "nan", "strict JSON has no NaN"


def test_config_holds_no_secret(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config(config(tmp_path, hub_token="hf_secret"), model="m")
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    assert "model: m" in text


def test_moving_average_of_another_model_is_refused(tmp_path: Path) -> None:
    teacher = TeacherWeights(tiny_student(), "ema")
    write_parts(tmp_path, 0, {"teacher": teacher})
    read_parts(tmp_path, 0, {"teacher": teacher})
    path = tmp_path / "vigos_teacher.safetensors"
    average = load_file(path)
    average.pop("lm_head.weight")
    save_file(average, path)
    for left in ("without 1 of its", f"got 0 tensors without {len(average) + 1} of its"):
        with pytest.raises(ValueError, match=rf"holds the average of this model's trained weights, .*{left}"):
            read_parts(tmp_path, 0, {"teacher": teacher})
        path.unlink(missing_ok=True)
    read_parts(tmp_path, 0, {"teacher": TeacherWeights(tiny_student(), "frozen")})  # has nothing to read
