"""The wgmma kernels in the emulation, against float64: tiles, stages, phases, fragments, merges, any order of threads.

Swizzle, fragments and descriptors are as the PTX manual has them; that the chip agrees, only a GPU can say. No engine
uses these kernels.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers.cuda_cases import LAYOUTS, projections_are_right, rows_are_right
from helpers.engines import emulate


@pytest.fixture(autouse=True)
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return emulate(monkeypatch, request)


# Under, at and past a tile of 128 rows, 128 entries, 64 of K.
@pytest.mark.parametrize("shared", [True, False], ids=["shared head", "two heads"])
@pytest.mark.parametrize(("r", "d", "v", "splits"), [(5, 8, 3, 1), (128, 64, 128, 1), (131, 328, 301, 2)])
def test_projections(emulator: ModuleType, shared: bool, r: int, d: int, v: int, splits: int) -> None:
    projections_are_right(emulator, shared=shared, r=r, d=d, v=v, splits=splits)


@pytest.mark.parametrize("layout", [*LAYOUTS, "projections"])
def test_no_order_of_threads_changes_a_bit(emulator: ModuleType, layout: str) -> None:
    """Seeds draw which threads sleep, how late copies and products come, and which clusters run at one time."""
    results = []
    for seed in (100, 200):
        emulator.set_seed(seed)
        if layout in LAYOUTS:
            results.append(rows_are_right(emulator, layout))
        else:
            results.append(projections_are_right(emulator, r=5, d=328, v=131, splits=2))
    assert torch.equal(*results)
