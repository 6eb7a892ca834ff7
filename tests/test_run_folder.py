"""The run folder by itself: what survives a kill, what a resumed run forgets, who writes what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.processes import output_of
from helpers.training import config, tiny_student
from safetensors.torch import load_file, save_file
from transformers import IntervalStrategy

from vigos.data.examples import BadExample
from vigos.system.files import read_json_lines, read_sections
from vigos.train.checkpoint import checkpoints, last_checkpoint, publish, read_parts, rotate, run_id, write_parts
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
    assert not list((tmp_path / "completions").iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["completions"]


def test_damaged_lines_stay_and_the_end_of_an_earlier_stretch_goes(tmp_path: Path) -> None:
    lines = [
        b'{"step": 1}',
        b'{"step": \xff}',
        '{"step": 2, "text": "a\u2028b"}'.encode(),
        b'{"step": 2, "train_runtime": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 3}', b""]))
    RunFolder(tmp_path).cut_after(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join([*lines[:3], b""])


@pytest.mark.parametrize("content", [b"", b"run: [", b"- run", b"run: 3", b"run: {id: \xff}"])
def test_a_damaged_configuration_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert (read_sections(tmp_path / "config.yaml"), run_id(tmp_path)) == ({}, None)


def test_half_a_surrogate_pair_in_an_id_ends_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_skipped(1, BadExample("a\ud800b", "missing_image", "no such file"))
    records, damaged = read_json_lines(tmp_path / "skipped.jsonl")
    assert (records[0]["example"], damaged) == ("a\ud800b", 0)


def test_full_disk_loses_no_history(tmp_path: Path) -> None:
    """A process whose files may not grow past 1,000 bytes resumes: metrics.jsonl and config.yaml stay as they were."""
    (run := tmp_path / "run").mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(1, 100)))
    (run / "config.yaml").write_text("run: {id: abc}\n")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    program = f"""
import resource, signal
from vigos.train.config import ViGOSConfig
from vigos.train.run_folder import RunFolder
config = ViGOSConfig(output_dir={str(run)!r}, use_cpu=True, report_to=[])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = RunFolder({str(run)!r})
for act in (lambda: folder.cut_after(90), lambda: folder.write_config(config)):
    try:
        act()
    except OSError as error:
        print(error)
"""
    (script := tmp_path / "full.py").write_text(program)
    said = output_of(script, [], tmp_path / "log")
    assert said.count("could not be written (File too large); it is as it was") == 2, said
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_new_run_sets_aside_what_an_earlier_one_left(tmp_path: Path) -> None:
    def checkpoint(step: int, run: str) -> None:
        folder = tmp_path / "saving" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        publish(tmp_path, folder.name, run=run)

    log, options = RunFolder(tmp_path), config(tmp_path)
    log.begin(options, 0, id="old")
    assert not (tmp_path / "aside").exists()
    for step in (3, 900):
        checkpoint(step, "old")
    log.write_metrics(900, {"loss": 0.5})
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-900"
    log.write_config(options, id="new")  # killed here
    assert last_checkpoint(tmp_path) is None, "it never goes on from another run's"
    log.begin(options, 0, id="new")
    assert sorted(p.name for p in (tmp_path / "aside" / "1").iterdir()) == [
        "checkpoint-3", "checkpoint-900", "config.yaml", "metrics.jsonl",
    ]  # fmt: skip
    for step in (1, 2, 3):
        checkpoint(step, "new")
    checkpoint(8, "stranger")  # moved there by hand
    rotate(tmp_path, 2, "new")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-8"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    log.begin(options, 2, id="new")  # --resume checkpoint-2: what it leads to is not mixed with what was there
    assert [p.name for p in checkpoints(tmp_path, "new")] == ["checkpoint-2"]
    assert (tmp_path / "aside" / "2" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("space", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_an_id_with_a_space_that_ends_lines_elsewhere_can_be_resumed(tmp_path: Path, space: str) -> None:
    log = RunFolder(tmp_path)
    log.write_skipped(1, BadExample(f"a{space}b", "missing_image", f"no{space}file"))
    log.write_skipped(3, BadExample("c", "missing_image", ""))
    log.cut_after(2)
    (line,) = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["step"] == 1
    assert f"a{space}b" in json.loads(line).values()


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
