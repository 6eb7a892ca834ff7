"""Measure how often intervals hold the truth and tests raise false alarms, where related examples go together.

    python bench/intervals.py [--runs 2000]

Clusters of two and three examples (conflicting images of a triplet) share one outcome with probability `correlation`.
Printed, in percent: how often the 95 % interval of a share holds it (wanted: 93 to 97), ours and Wilson's over single
examples; how often the interval of the difference of two equal models holds 0; and how often their paired test says
p < 0.01 (wanted: at most 1), ours and McNemar's over single examples.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from vigos.eval.statistics import bootstrap_interval, mean_interval, sign_flip_test, wilson_interval


def main() -> None:
    """Simulate every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated evaluations a case")
    runs = parser.parse_args().runs
    rng = np.random.default_rng(0)
    heads = ("clusters", "size", "share", "correlation", "interval", "Wilson", "difference", "p < 0.01", "McNemar")
    table = Table(*heads)
    for count, size, share in ((100, 2, 0.5), (200, 2, 0.8), (200, 2, 0.95), (200, 3, 0.8)):
        clusters = [i // size for i in range(count * size)]
        for correlation in (0.0, 0.3, 0.6, 1.0):
            a, b = (_outcomes(rng, runs, count, size, share, correlation) for _ in "ab")
            held = [low <= share <= high for low, high in (mean_interval(x.tolist(), clusters) for x in a)]
            naive = [low <= share <= high for low, high in (wilson_interval(x.sum(), len(x)) for x in a)]
            few = range(min(runs, 400))  # the bootstrap draws 2,000 times for each
            gaps = [bootstrap_interval((a[i] - b[i]).tolist(), clusters, seed=i) for i in few]
            level = [low <= 0 <= high for low, high in gaps]
            alarms = [sign_flip_test((x - y).tolist(), clusters) < 0.01 for x, y in zip(a, b, strict=True)]
            mcnemar = [sign_flip_test((x - y).tolist()) < 0.01 for x, y in zip(a, b, strict=True)]
            cells = [f"{100 * np.mean(v):.1f}" for v in (held, naive, level, alarms, mcnemar)]
            table.add_row(str(count), str(size), f"{share:g}", f"{correlation:g}", *cells)
    Console(width=110).print(table)


def _outcomes(
    rng: np.random.Generator, runs: int, count: int, size: int, share: float, correlation: float
) -> np.ndarray:
    """Draw (runs, count * size) outcomes; those of a cluster are one draw with probability `correlation`."""
    together = rng.random((runs, count, 1)) < correlation
    one, each = rng.random((runs, count, 1)) < share, rng.random((runs, count, size)) < share
    return np.where(together, one, each).astype(float).reshape(runs, -1)


if __name__ == "__main__":
    main()
