"""Shares, their intervals and exact tests: what evaluations and studies say about few rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` samples drawn from `n` without replacement is among the `correct` ones.

    Unbiased for n > k, and simply "any of them" for n = k. Source: Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples, got {k}")
    if not 0 <= correct <= n:
        raise ValueError(f"correct must be between 0 and the {n} samples, got {correct}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); z = 1.96: 95 %. (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def sign_test(better: int, worse: int) -> float:
    """Exact two-sided p of `better` against `worse` under a fair coin; on discordant pairs this is McNemar's test."""
    n, least = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(x) for x in logs))


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[Any] | None = None, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (R,) under resampling of rows, or of whole `clusters`."""
    if len(values) == 0:
        return 0.0, 1.0
    places: dict[Any, int] = {}
    owner = torch.tensor([places.setdefault(c, len(places)) for c in (clusters or range(len(values)))])
    C = len(places)
    sums = torch.zeros(C, dtype=torch.float64).index_add_(0, owner, torch.tensor(values, dtype=torch.float64))
    sizes = torch.zeros(C, dtype=torch.float64).index_add_(0, owner, torch.ones(len(values), dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    means: list[Tensor] = []
    chunk = max(1, 2**21 // C)  # (chunk, C) indices at a time
    for start in range(0, resamples, chunk):
        drawn = torch.randint(C, (min(chunk, resamples - start), C), generator=generator)
        rows = sizes[drawn].sum(1) if len(values) > C else float(C)
        means.append(sums[drawn].sum(1) / rows)
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval if every value is 0 or 1, otherwise (means over samples of a row) the bootstrap's over rows."""
    if all(v in (0.0, 1.0) for v in values):
        return wilson_interval(sum(values), len(values))
    return bootstrap_interval(values)
