"""Compute shares, their 95 % intervals and exact tests over few examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
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


def sign_flip_test(differences: Sequence[float], clusters: Sequence[Any] | None = None) -> float:
    """Return the exact two-sided p that paired differences are as likely one way as the other, cluster by cluster.

    The differences of a cluster change sign together, so that related examples count as one observation; single
    examples with one sample each give McNemar's exact test. Source: Fisher 1935, The Design of Experiments, section 21.

    Args:
        differences: (R,) multiples of a common fraction, such as differences of counts over equally many samples.
        clusters: (R,) names; None makes every difference a cluster.
    """
    import numpy as np
    from scipy.stats import binom

    fractions = [Fraction(d).limit_denominator(5040) for d in differences]
    scale = math.lcm(*(f.denominator for f in fractions)) if fractions else 1
    sums: dict[Any, int] = {}
    for name, f in zip(clusters or range(len(fractions)), fractions, strict=True):
        sums[name] = sums.get(name, 0) + int(f * scale)
    steps = [abs(v) for v in sums.values() if v]
    if not steps:
        return 1.0
    chances = np.ones(1)  # of the sum of the steps that keep their sign
    for step, count in Counter(steps).items():
        kept = np.zeros(step * count + 1)
        kept[::step] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, kept)
    total = sum(steps)
    extreme = np.abs(2 * np.arange(total + 1) - total) >= abs(sum(sums.values()))
    return min(1.0, float(chances[extreme].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for being several, in the order given. Source: Holm 1979, a step-down Bonferroni."""
    corrected = [0.0] * len(p_values)
    least = 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = least
    return corrected


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


def mean_interval(values: Sequence[float], clusters: Sequence[Any] | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values in [0, 1], of which those of one cluster go together.

    It is Wilson's for the number of independent examples that would scatter as the clusters do, with the t quantile of
    the clusters; single outcomes of 0 or 1 get Wilson's as it is, other values without clusters the bootstrap's.
    `bench/intervals.py` measures how often it holds the true share. Source: Rao and Scott 1992 (effective sample size).

    Args:
        values: (R,) shares; (0, 1) is returned without any.
        clusters: (R,) names, such as the triplet of an image.
    """
    import numpy as np
    from scipy.stats import t

    binary = all(v in (0.0, 1.0) for v in values)
    if clusters is None or len(set(clusters)) == len(values):
        return wilson_interval(sum(values), len(values)) if binary else bootstrap_interval(values)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    cluster = [numbers[name] for name in clusters]
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster)
    n, count = len(values), len(sums)
    if count == 1:
        return 0.0, 1.0
    mean = float(sums.sum() / n)
    variance = float(count / (count - 1) * np.square(sums - mean * sizes).sum() / n**2)
    if variance == 0:
        effective = float(count if mean in (0.0, 1.0) else n)
    else:
        effective = mean * (1 - mean) / variance
        effective = min(effective, n) if binary else effective
    z2 = float(t.ppf(0.975, count - 1)) ** 2 / effective
    middle, half = mean + z2 / 2, math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))
