"""Killed, stopped and cut off in real processes: what is on the disk is complete, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import HELPERS, start_ranks, wait_for
from helpers.restart_cases import END, KILLS, STEPS, build
from helpers.training import config
from safetensors.torch import load_file

from vigos.launch import Source, train_from_source
from vigos.train.checkpoint import (
    EXIT_CODE,
    CheckpointError,
    checkpoints,
    last_checkpoint,
    publish,
    rotate,
    whole_checkpoint,
)
from vigos.train.manifest import MANIFEST
from vigos.world import write_world

CLOCKS = ("perf/", "train_")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("restarts")
    processes = start_ranks(HELPERS / "restart_cases.py", [str(folder)], 1, folder, env={"WORLD_SIZE": "1"})
    codes = wait_for(processes, folder, timeout=400)
    for log in sorted(folder.glob("*.log")):
        print(log.name, log.read_text()[-600:])
    assert codes == [0]
    return folder, json.loads((folder / "found.json").read_text())


def metrics(run: Path) -> list[str]:
    """The lines of metrics.jsonl, clocks left out, as they stand in the file."""
    kept = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            kept.append(json.dumps({k: v for k, v in record.items() if not k.startswith(CLOCKS)}))
    return kept


def same_weights(a: Path, b: Path) -> bool:
    left, right = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (a, b))
    return left.keys() == right.keys() and all(bool((left[n] == right[n]).all()) for n in left)


@pytest.mark.slow
def test_killed_at_random_it_ends_as_if_nothing_had_happened(found: tuple[Path, dict[str, Any]]) -> None:
    folder, result = found
    killed = result["killed"]
    assert result["whole"] == 0
    assert killed["kills"] == KILLS >= 20
    assert killed["while_saving"] >= 3, "no kill came while a checkpoint was written"
    assert killed["restarts_from"] == sorted(killed["restarts_from"]), "a newer checkpoint was lost"
    assert killed["exit_code"] == 0
    assert len(metrics(folder / "whole")) == STEPS // 3
    assert metrics(folder / "killed") == metrics(folder / "whole")
    assert same_weights(folder / "killed", folder / "whole")
    assert [p.name for p in checkpoints(folder / "killed")] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    assert not (folder / "killed" / "saving").exists()


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_its_exit_code(found: tuple[Path, dict[str, Any]]) -> None:
    folder, result = found
    assert result["stopped"] == {"exit_codes": [EXIT_CODE, 0], "checkpoints": ["checkpoint-5"]}
    assert EXIT_CODE == 143
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    assert same_weights(folder / "stopped", folder / "whole")


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint(found: tuple[Path, dict[str, Any]]) -> None:
    full = found[1]["full"]
    assert full["exit_code"] == 7
    assert full["left"] == ["checkpoint-1", "checkpoint-2"], "the old ones are there, and nothing of the new one"
    assert "checkpoint-3 could not be written" in full["message"]
    assert "checkpoint-2" in full["message"]
    assert "--resume auto" in full["message"]
    assert full["again"] == 0, "it goes on from what was left"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disk", "kill", "late", "sigterm"])
def test_the_end_comes_whole_or_is_done_again(how: str, found: tuple[Path, dict[str, Any]]) -> None:
    """Cut off in the final save: what is left is a checkpoint of the last step, from which a resume does the rest."""
    folder, result = found
    end, run = result["end"][how], folder / f"end-{how}"
    assert end["exit_codes"] == {"disk": [7, 0], "kill": [-9, 0], "late": [143, 0], "sigterm": [0, 0]}[how]
    adapter = ["adapter"] if how in ("disk", "kill") else []
    assert end["left"] == ([] if how == "sigterm" else [*adapter, f"checkpoint-{END}"])
    if how == "disk":
        assert "merged/ could not be written" in end["message"]
        assert f"the last complete checkpoint is {run}/checkpoint-{END}" in end["message"]
    assert sorted(p.name for p in run.glob("*") if p.is_dir()) == ["adapter", "merged"], "save_strategy is no"
    if how == "sigterm":
        return
    assert metrics(run) == metrics(folder / "end-sigterm"), "nothing was trained again"
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (run / name).read_bytes() == (folder / "end-sigterm" / name).read_bytes()
    means = [json.loads(p.read_text().splitlines()[-1])["train_loss"] for p in folder.glob("end-*/metrics.jsonl")]
    assert means == [means[0]] * 4
    assert means[0] > 0


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_a_finished_run_is_left_alone(save_strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, run = write_world(tmp_path / "world", "train", 4), tmp_path / "run"

    def train(steps: int, resume: str | None = "auto") -> None:
        options = {"max_steps": steps, "save_strategy": save_strategy, "save_merged": True, "max_completion_length": 4}
        train_from_source(Source("builtin", str(data), dtype="float32", resume=resume), config(run, **options))

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    train(1, None)
    before = files()
    train(1)
    assert files() == before
    assert "the run is finished, and its final weights are whole; nothing was trained" in caplog.text
    (run / "merged" / "model.safetensors").write_bytes(b"")  # damaged since: written again where that can be
    if save_strategy == "steps":
        train(1)
        assert (run / "merged" / "model.safetensors").read_bytes() == before[run / "merged" / "model.safetensors"]
        return
    (run / "merged" / "model.safetensors").write_bytes(before[run / "merged" / "model.safetensors"])
    with pytest.raises(ValueError, match=r"final weights of step 1 in .* and no checkpoint to train on from"):
        train(2)
    assert files() == before


# --- Damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("two")
    build(folder, max_steps=2).train()
    return folder


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("how", [*DAMAGES, "missing"])
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", MANIFEST])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, how: str, two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(two_steps, tmp_path / "run")
    file = run / "checkpoint-2" / name
    file.write_bytes(DAMAGES[how](file.read_bytes())) if how in DAMAGES else file.unlink()
    assert whole_checkpoint(run) == run / "checkpoint-1"
    assert "checkpoint-2 is damaged (" in caplog.text
    assert name in caplog.text or (name, how) == (MANIFEST, "flipped")  # where a bit may lie in a checksum
    assert (run / "aside" / "1" / "checkpoint-2").is_dir()
    (run / "checkpoint-1" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole \(checkpoint-1: scheduler.pt, 0 bytes, is not"
    ):
        whole_checkpoint(run)
    assert last_checkpoint(run) == run / "checkpoint-1", "left where it is"


@pytest.mark.parametrize(("name", "word"), [("optimizer.pt", "optimizer"), ("scheduler.pt", "scheduler")])
def test_a_missing_state_is_an_error_or_said(
    name: str, word: str, two_steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(two_steps, tmp_path / "run")
    for file in (name, "rng_state.pth"):
        (run / "checkpoint-1" / file).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-1 must hold the state of the {word}, got none; save_only_model"):
        build(run, max_steps=2).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    build(run, max_steps=2, save_only_model=True).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert f"checkpoint-1 holds no state of the {word} and the random numbers: a new one is used" in caplog.text


@pytest.mark.parametrize(
    ("option", "said"),
    [({"lora_r": 2}, "must fit this run's model, got: .*size mismatch"), ({"lora": False}, "must hold a whole model")],
)
def test_another_adapter_is_refused_in_a_line(
    option: dict[str, Any], said: str, two_steps: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        build(tmp_path, max_steps=2, **option).train(resume_from_checkpoint=str(two_steps / "checkpoint-1"))


def make(folder: Path, step: int, text: str = "") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(text or str(step))
    return path


def test_what_is_not_complete_is_no_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        make(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # by a tool that writes in place
    make(tmp_path / "saving", 12)
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    rotate(tmp_path, 1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10"]
    rotate(tmp_path, None)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_replacing_a_checkpoint_of_an_earlier_run(tmp_path: Path) -> None:
    make(tmp_path, 4, "old")
    make(tmp_path / "saving", 4, "new")
    assert publish(tmp_path, "checkpoint-4").joinpath("trainer_state.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    # Killed between the two renames: the old one comes back.
    (tmp_path / "saving").mkdir()
    shutil.move(tmp_path / "checkpoint-4", tmp_path / "saving" / "replaced-checkpoint-4")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
