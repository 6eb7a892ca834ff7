"""A student that transformers loads tensor-parallel: two real processes (gloo, CPU) against one on the same rows.

The tiny Qwen2.5-VL is sharded by transformers' own plan: attention and MLP by columns and rows, embedding and head over
the vocabulary. Both processes run every case, so that their start is paid once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TESTS, start_ranks, wait_for
from safetensors.torch import load_file
from tensor_parallel_cases import CASES, RANKS, run, save_student
from test_distributed import CLOCKS, largest_gap


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained students, which every process loads."""
    folder = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        save_student(folder, tied)
    return folder


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks have left what came out of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [str(models), str(folder), str(RANKS), *CASES]
    processes = start_ranks(TESTS / "tensor_parallel_cases.py", arguments, RANKS, folder)
    assert wait_for(processes, folder, timeout=420) == [0] * RANKS
    return folder


def found_in(folder: Path, ranks: int = RANKS) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_group_equals_one_process(case: str, models: Path, ranks: Path, tmp_path: Path) -> None:
    """Losses, every other metric, and parameters after five steps, to 1e-5; the teacher's weights as well."""
    alone = run(case, models, tmp_path)
    assert len(alone["logs"]) == 5
    assert largest_gap(alone["start"], alone["parameters"]) > 1e-2, "nothing was trained"
    for each in found_in(ranks / case):
        for expected, log in zip(alone["logs"], each["logs"], strict=True):
            kept = {k: v for k, v in expected.items() if not k.startswith(CLOCKS)}
            assert {k: v for k, v in log.items() if not k.startswith(CLOCKS)} == pytest.approx(kept, rel=1e-5, abs=1e-9)
        for name in ("start", "parameters", "teacher"):
            assert largest_gap(alone[name], each[name]) < 1e-5, name
        if CASES[case].get("teacher", "frozen") == "frozen" and not CASES[case].get("lora", True):
            assert largest_gap(alone["start"], each["teacher"]) == 0, "the frozen teacher has moved"
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")]
    assert written, "nothing was saved"
    for name in written:  # whole, and as a plain model or adapter
        assert largest_gap(load_file(tmp_path / name), load_file(ranks / case / name)) < 1e-5, name
    configs = [path.relative_to(tmp_path) for path in tmp_path.rglob("*config.json")]
    for name in configs:
        assert json.loads((tmp_path / name).read_text()) == json.loads((ranks / case / name).read_text()), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_head_is_used_where_it_lies(case: str, ranks: Path) -> None:
    """No collective of rollouts and steps carries as much as half a head."""
    for each in found_in(ranks / case):
        assert each["local_head"] <= (each["head"] + 1) // 2 + 32  # rows are dealt out whole
        assert 0 < each["traffic"][0] < each["head"] // 2
        assert each["gathered"][0] >= each["head"] // 2, "the measurement sees no gathered head"


@pytest.mark.slow
def test_records_are_written_once_and_the_same(models: Path, ranks: Path, tmp_path: Path) -> None:
    """Rollouts of a group stand in one file a step, with the likeliest tokens of the whole vocabulary."""
    run("lora", models, tmp_path)
    files = sorted(path.name for path in (tmp_path / "completions").glob("*.jsonl"))
    assert files == sorted(path.name for path in (ranks / "lora" / "completions").glob("*.jsonl"))
    assert len(files) == 5
    supervised = 0
    for name in ("skipped.jsonl", *(f"completions/{file}" for file in files)):
        ours, theirs = (leaves(folder / name) for folder in (ranks / "lora", tmp_path))
        assert [x for x in ours if not isinstance(x, float)] == [x for x in theirs if not isinstance(x, float)]
        numbers = [x for x in ours if isinstance(x, float)]
        assert numbers == pytest.approx([x for x in theirs if isinstance(x, float)], abs=2e-5)
        supervised += len(numbers)
    assert supervised > 1000


def leaves(path: Path) -> list[Any]:
    """Every value in a JSONL file, in order."""
    found: list[Any] = []

    def walk(x: Any) -> None:
        for each in x.values() if isinstance(x, dict) else x:
            walk(each) if isinstance(each, dict | list) else found.append(each)

    walk([json.loads(line) for line in path.read_text().splitlines()])
    return found
