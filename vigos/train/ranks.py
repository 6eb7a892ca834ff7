"""Sums and maxima over the ranks of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_over_ranks(accelerator: Any, values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks, on the device; every rank has to call it together."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum")


def count_over_ranks(accelerator: Any, count: int) -> int:
    """Return the sum of a count over all ranks; every rank has to call it together."""
    return int(sum_over_ranks(accelerator, torch.tensor(count)))


def max_over_ranks(accelerator: Any, value: Tensor) -> Tensor:
    """Return the largest of the ranks' values; every rank has to call it together."""
    if accelerator.num_processes == 1:
        return value
    return accelerator.gather(value.to(accelerator.device).reshape(1)).max()
