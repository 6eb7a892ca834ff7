"""Draws every figure of the documentation from the committed results; measures nothing.

python bench/plots.py                     # bench/results/{cpu-avx512,study}/*.csv -> docs/images/
python bench/plots.py --results cpu-avx512 cpu-avx2 h200
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import matplotlib
import pandas as pd
from measure import RESULTS

matplotlib.use("svg")
import matplotlib.pyplot as plt

from vigos.study.plan import FROZEN, World
from vigos.study.results import by_base, in_world, read_csv
from vigos.study.results import draw as draw_study

IMAGES = RESULTS.parent.parent / "docs" / "images"
OURS, PEER, FLOOR = "#0b6e99", "#b8b8b8", "#333333"
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "svg.fonttype": "none",
    "svg.hashsalt": "vigos", "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "figure.dpi": 120,
}  # fmt: skip
LINES = ["#0b6e99", "#4aa8c9", "#d1602f", "#8f6bb3", "#6b8e23", "#b8860b", "#999999", "#c2185b", "#444444", "#2e7d32"]


def save(figure: plt.Figure, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": "bench/plots.py"})
    plt.close(figure)
    print(IMAGES / f"{name}.svg")


def target(frame: pd.DataFrame, device: str) -> None:
    """Time over the floor, and memory, of the first target case."""
    rows = frame[frame.group == "target"]
    rows = rows[(rows.d == rows.d.iloc[0]) & rows.ms.notna() & (rows.engine != "floor")].sort_values("of_floor")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.42 * len(rows) + 1.2), sharey=True)
    colors = [OURS if name.startswith("vigos") else PEER for name in rows.engine]
    for axis, column, form in ((left, "of_floor", "{:.2f} ×"), (right, "peak_mib", "{:,.0f} MiB")):
        bars = axis.barh(rows.engine, rows[column], color=colors)
        labels = axis.bar_label(bars, [form.format(v) for v in rows[column]], padding=4, fontsize=9)
        for label in labels:  # readable where the floor's line passes
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.margins(x=0.2)
        axis.grid(axis="y", visible=False)
    left.axvline(1, color=FLOOR, linewidth=1, linestyle="--")
    left.set_xlabel("time, in units of its matrix products alone")
    right.set_xlabel("peak memory above the inputs")
    left.invert_yaxis()
    first = rows.iloc[0]
    figure.suptitle(
        f"Forward and backward, N {first.n:,}, D {first.d:,}, V {first.v:,}, {first['dtype']}, {first['head']} head",
        fontsize=10,
    )
    save(figure, f"divergence-target-{device}")


def growth(frame: pd.DataFrame, device: str) -> None:
    """Time against tokens, width and vocabulary."""
    axes_of = [axis for axis in ("n", "d", "v") if (frame.group == axis).any()]
    if not axes_of:
        return
    base = frame[(frame.group == "rows") & (frame.rows == "peaked")]
    if base.empty:
        base = frame[(frame.group == "target")]
    engines = [e for e in dict.fromkeys(frame.engine) if (frame[frame.group == axes_of[0]].engine == e).any()]
    figure, axes = plt.subplots(1, len(axes_of), figsize=(4 * len(axes_of), 3.4), squeeze=False)
    names = {"n": "tokens N", "d": "hidden size D", "v": "vocabulary V"}
    for axis, key in zip(axes[0], axes_of, strict=True):
        rows = frame[frame.group == key]
        others = [k for k in ("n", "d", "v") if k != key]
        same = base[(base[others] == rows[others].iloc[0]).all(axis=1)]
        rows = pd.concat([rows, same])
        colors = iter(LINES)
        for engine in engines:
            line = rows[(rows.engine == engine) & rows.ms.notna()].sort_values(key)
            dashed = engine == "floor"
            axis.plot(
                line[key], line.ms, marker="o", markersize=3, linewidth=1.5, label=engine,
                color=FLOOR if dashed else next(colors), linestyle="--" if dashed else "-",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=names[key])
        ticks = sorted(rows[key].unique())[::-2][::-1]
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axis.xaxis.minorticks_off()
    axes[0][0].set_ylabel("ms, forward and backward")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, f"divergence-growth-{device}")


def precision(frame: pd.DataFrame, device: str) -> None:
    """Error of the gradient against how far the teacher is, bf16 operands, forward KL."""
    rows = frame[(frame.dtype == "bfloat16") & (frame.kind == "forward")]
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    styles = {  # some lie on each other: the wide ones under the narrow ones
        "Liger": (LINES[5], 6, 0.5), "PyTorch": (LINES[2], 1.5, 1), "PyTorch, fp32 logits": (PEER, 6, 0.8),
        "TRL": (LINES[4], 1.5, 1),
    }  # fmt: skip
    for engine in dict.fromkeys(
        [*styles, *(e for e in rows.engine if e.startswith("vigos") and e != "vigos reference")]
    ):
        color, width, alpha = styles.get(engine, (OURS, 1.5, 1))
        line = rows[rows.engine == engine].sort_values("mean_kl")
        axis.plot(line.mean_kl, line.error, marker="o", markersize=width + 2, linewidth=width, alpha=alpha, color=color,
                  label=engine)  # fmt: skip
    axis.axhline(0.005, color=FLOOR, linewidth=1, linestyle="--", label="promised: 0.5 %")
    axis.set(
        xscale="log", yscale="log", xlabel="mean KL of teacher and student, nats",
        ylabel="error of the gradient, relative",
    )  # fmt: skip
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, f"precision-{device}")


def prefix_tree(frame: pd.DataFrame, device: str) -> None:
    """How much faster than the released scheme, by image tokens and rollouts."""
    rows = frame[(frame.scheme == "tree") & (frame.invalid_a_prompt == 0)]
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    groups = rows.pivot_table(index="image_tokens", columns="rollouts", values=["speedup", "flop_ratio"])
    for color, rollouts in zip(LINES, sorted(rows.rollouts.unique()), strict=False):
        label = f"{rollouts} rollout{'s' if rollouts > 1 else ''} a prompt"
        for column, dashed in (("speedup", "-"), ("flop_ratio", ":")):
            line = groups[column][rollouts].dropna()
            what = "time" if column == "speedup" else "operations"
            axis.plot(line.index, line, dashed, marker="o", markersize=4, color=color, label=f"{label}, {what}")
    axis.set(xscale="log", xlabel="image tokens", ylabel="released scheme / tree")
    axis.set_xticks(sorted(rows.image_tokens.unique()), [str(n) for n in sorted(rows.image_tokens.unique())])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    size = rows["size"].iloc[0]
    axis.set_title(f"Teacher scoring, {size.upper()} model", fontsize=10)
    save(figure, f"prefix-tree-{size}-{device}")


def frozen(file: Path) -> None:
    """Score and descriptions of each base before and after, in the two worlds that the search chose."""
    rows, arms = read_csv(file), ("base", "opsd", "vigos")
    metrics = (("score", "Score"), ("description", "description right"))
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), layout="constrained", sharey=True)
    for axis, (level, (metric, title)) in zip(axes, product(FROZEN.axes[0].levels, metrics), strict=True):
        here = in_world(rows, World(conflict=level))
        values = {arm: by_base(here, arm, metric) for arm in arms}
        for base in values["base"]:
            axis.plot(arms, [100 * values[arm][base] for arm in arms], "o-", color=PEER, markersize=3, linewidth=0.9)
        means = [100 * sum(found.values()) / len(found) for found in values.values()]
        axis.plot(arms, means, "o-", color=OURS, linewidth=2)
        for place, mean in enumerate(means):
            axis.annotate(f"{mean:.0f}", (place, mean), (0, 9), textcoords="offset points", ha="center", color=OURS)
        axis.set_title(f"{title}, {100 * level:g} % conflict", fontsize=9)
        axis.set(xlim=(-0.3, 2.3), ylim=(0, 80))
    axes[0].set_ylabel("%")
    save(figure, "study-frozen")


def main() -> None:
    """Each results folder's CSVs; a file that is not there draws nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", default=["cpu-avx512"], help="folders under bench/results")
    args = parser.parse_args()
    with plt.rc_context(STYLE):
        for device in args.results:
            folder: Path = RESULTS / device
            for name, draws in (("divergence", (target, growth)), ("precision", (precision,))):
                if (file := folder / f"{name}.csv").exists():
                    for draw in draws:
                        draw(pd.read_csv(file), device)
            for file in sorted(folder.glob("prefix_tree_*[mb].csv")):
                prefix_tree(pd.read_csv(file), device)
    for path in draw_study(RESULTS / "study" / "results.csv", RESULTS / "study" / "preconditions.csv", IMAGES):
        print(path)
    if (file := RESULTS / "study" / "frozen.csv").exists():
        with plt.rc_context(STYLE):
            frozen(file)


if __name__ == "__main__":
    main()
