"""Killed, stopped and cut off in real processes: what is on the disk is complete, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import HELPERS, start_ranks, wait_for
from helpers.restart_cases import KILLS, STEPS
from safetensors.torch import load_file

from vigos.train.checkpoint import EXIT_CODE, checkpoints, last_checkpoint, publish, rotate

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
