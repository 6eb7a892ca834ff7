"""Compute shares, their 95 % intervals and exact tests over few examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one or more of `k` samples, drawn from `n` without replacement, is `correct`.

    Unbiased for n > k, and simply "any of them" for n = k. Source: Chen et al. 2021 (arXiv:2107.03374), eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples, got {k}")
    if not 0 <= correct <= n:
        raise ValueError(f"correct must be between 0 and the {n} samples, got {correct}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of the proportion successes / n; (0, 1) without observations."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(int(successes), n).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """Return the exact two-sided p of `better` against `worse` under a fair coin; on discordant pairs, McNemar's."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[Any] | None = None, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values` under resampling of them, or of whole clusters.

    Args:
        values: (R,) numbers; (0, 1) is returned without any.
        clusters: (R,) names; values of one name are drawn together.
        seed: of the resampling.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(values) == 0:
        return 0.0, 1.0
    numbers: dict[Any, int] = {}
    cluster = [numbers.setdefault(c, len(numbers)) for c in clusters or range(len(values))]
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster).astype(float)
    if len(sums) == 1:
        return float(sums[0] / sizes[0]), float(sums[0] / sizes[0])
    found = bootstrap(
        (sums, sizes), lambda total, size, axis: total.sum(axis) / size.sum(axis), paired=True, method="percentile",
        n_resamples=resamples, batch=max(1, 2**21 // len(sums)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Wilson's interval if every value is 0 or 1, otherwise (means over samples) the bootstrap's."""
    if all(v in (0.0, 1.0) for v in values):
        return wilson_interval(sum(values), len(values))
    return bootstrap_interval(values)
