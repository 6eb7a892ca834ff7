"""Two real processes (gloo, CPU) against one on the same global batch: DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3;
adapters and full fine-tuning.

Both processes run every case, so that their start is paid once. `distributed_cases.SCRIPT` has uneven valid and invalid
rows over the ranks, steps in which a rank has no row, or none that is supervised, or no image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_cases import CASES, RANKS, ZERO_CASES, run
from helpers.processes import HELPERS, run_ranks
from safetensors.torch import load_file

ALL = CASES | ZERO_CASES
CLOCKS = ("perf/", "epoch", "mismatch/", "palr/")  # PALR takes other answers and images from the rows of its rank


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks have left what came out of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    codes = run_ranks(HELPERS / "distributed_cases.py", [str(folder), *CASES], RANKS, folder, timeout=420)
    assert codes == [0] * RANKS
    return folder


@pytest.fixture(scope="module")
def zero_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the cases under DeepSpeed."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'vigos[deepspeed]')")
    folder = tmp_path_factory.mktemp("zero_ranks")
    script, cpu = HELPERS / "distributed_cases.py", {"DS_ACCELERATOR": "cpu"}
    codes = run_ranks(script, [str(folder), *ZERO_CASES], RANKS, folder, timeout=420, env=cpu)
    assert codes == [0] * RANKS
    return folder


def largest_gap(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Run a case on one process, once for all that differ only in how ranks share the model."""

    def plain(case: str) -> dict[str, Any]:
        options = {k: v for k, v in ALL[case].items() if not k.startswith(("fsdp", "deepspeed"))}
        return options | {"poisoned": "poisoned" in case}

    @cache
    def first(case: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("alone")
        return run(case, folder, ranks=1), folder

    return lambda case: first(next(other for other in ALL if plain(other) == plain(case)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case: str, ranks: Path, alone: Any) -> None:
    """Losses, every other metric, and parameters after five steps, to 1e-5; the teacher's weights as well."""
    check(case, ranks, *alone(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", ZERO_CASES)
def test_two_ranks_under_deepspeed_equal_one_process(case: str, zero_ranks: Path, alone: Any) -> None:
    """The same with the configurations that we ship."""
    check(case, zero_ranks, *alone(case))


def check(case: str, ranks: Path, alone: dict[str, Any], folder: Path) -> None:
    options = ALL[case]
    found = [torch.load(ranks / case / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert len(alone["logs"]) == 5
    assert largest_gap(alone["start"], alone["parameters"]) > 1e-2, "nothing was trained"
    dropped = [log["steps/dropped"] for log in found[0]["logs"]]
    assert dropped == [1.0 if "poisoned" in case else 0.0, 0, 0, 0, 0]
    first = int("poisoned" in case)  # what a dropped step logs is not finite on one rank, on all rows, or filtered
    for expected, log in zip(alone["logs"][first:], found[0]["logs"][first:], strict=True):
        kept = {k: v for k, v in expected.items() if not k.startswith(CLOCKS)}
        assert {k: v for k, v in log.items() if not k.startswith(CLOCKS)} == pytest.approx(kept, rel=1e-5, abs=1e-9)
        assert all(0 <= v <= 1 for k, v in log.items() if k.startswith("palr/"))
    assert any("palr/all" in log for log in found[0]["logs"]) == case.endswith("palr")
    for each in found:
        assert largest_gap(alone["parameters"], each["parameters"]) < 1e-5
        assert largest_gap(alone["teacher"], each["teacher"]) < 1e-5
    assert bool(alone["pushed"]) == (not options.get("sampled"))
    if alone["pushed"]:
        assert largest_gap(alone["pushed"], found[0]["pushed"]) < 1e-5
    if options.get("lora", True) is False and options.get("teacher", "frozen") == "frozen":
        assert largest_gap(alone["start"], found[0]["teacher"]) == 0, "the frozen teacher has moved"
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "model/model.safetensors"):
        if (folder / name).is_file():  # what rank 0 wrote at the end is whole
            assert largest_gap(load_file(folder / name), load_file(ranks / case / name)) < 1e-5
    assert (ranks / case / "adapter").is_dir() or (ranks / case / "model").is_dir()
