"""Run Triton's kernels in its interpreter where there is no GPU, mark the tests of slow.txt, put long files first."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before anything imports triton

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)
    # Files of few tests have the long ones. They go first: a long test that starts last leaves one process idle.
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: sizes[item.path])
