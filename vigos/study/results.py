"""Tables and figures of the study, from `results.csv` and `preconditions.csv` alone.

Two levels are kept apart. *Within* one base and seed, two arms answer the same test rows: an exact test of flipped
signs and a bootstrap, both over triplets, say whether these two models differ. *Between* bases, each base gives one
difference (the mean over its training seeds), and a t interval over bases says whether the arms differ; one base gives
no such interval. Where several p values stand in one table they are corrected for that (Holm); intervals are not.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigos.eval.statistics import bootstrap_interval, holm, sign_flip_test
from vigos.study.plan import ARM, World
from vigos.system.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

COLUMNS = (
    "arm", "conflict", "label_bias", "noise", "shortcut", "faint", "place", "base", "seed", "steps", "score", "prior",
    "valid_rate", "description", "named", "follows", "tokens", "palr_all", "palr_description", "palr_reasoning",
    "seconds", "temperature", "score_items", "prior_items",
)  # fmt: skip
KNOBS = ("conflict", "label_bias", "noise", "shortcut", "faint", "place")
_TEXT = ("arm", "score_items", "prior_items", "precondition", "measure", "met")
_WHOLE = ("base", "seed", "steps", "n")
Row = dict[str, Any]


# --- Data -------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the columns `COLUMNS` if they are results, else with all that a row has; return `path`."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    names = found if found and "score_items" not in found else list(COLUMNS)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="raise", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
    return replace_file(path, text.getvalue())


def read_csv(path: str | Path) -> list[Row]:
    """Read what `write_csv` wrote; an empty field is None, and a knob that is not there has its default."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        row |= {k: getattr(World, k) for k in KNOBS if row.get(k) is None}
    return rows


def _value(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if text == "":
        return None
    return int(text) if name in _WHOLE else float(text)


def in_world(rows: Sequence[Row], world: World = World()) -> list[Row]:  # noqa: B008 (frozen)
    """Return the rows of one world; those of the untrained arm hold for every training set."""
    return [
        row
        for row in rows
        if all(row[k] == getattr(world, k) or (row["arm"] == "base" and k in ("conflict", "label_bias")) for k in KNOBS)
    ]


# --- Statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Arm minus other over bases.

    Attributes:
        interval: 95 % t interval over bases; None with fewer than two.
        by_base: the difference of each base, its training seeds averaged.
    """

    mean: float
    interval: tuple[float, float] | None
    p_value: float | None
    by_base: dict[int, float]


def by_base(rows: Sequence[Row], arm: str, metric: str) -> dict[int, float]:
    """Return the arm's mean over training seeds, for each base."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and row[metric] is not None:
            values.setdefault(row["base"], []).append(row[metric])
    return {base: math.fsum(v) / len(v) for base, v in sorted(values.items())}


def t_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None, float | None]:
    """Return mean, 95 % t interval and two-sided p against 0; None for the last two with fewer than two values.

    Equal values give an interval of no width and p 0 (or 1, where they are 0).
    """
    from scipy import stats

    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, None, None
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    if error == 0:
        return mean, (mean, mean), float(mean == 0)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return mean, (mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, n - 1))


def difference(rows: Sequence[Row], arm: str, other: str, metric: str = "score") -> Difference | None:
    """Return arm minus other, paired by base; None where no base has both arms."""
    a, b = by_base(rows, arm, metric), by_base(rows, other, metric)
    shared = {base: a[base] - b[base] for base in a if base in b}
    if not shared:
        return None
    mean, interval, p = t_interval(list(shared.values()))
    return Difference(mean, interval, p, shared)


def against_vigos(rows: Sequence[Row]) -> dict[str, tuple[Difference, float | None]]:
    """Return, for every other arm, its Score minus that of ViGOS, and the p value corrected for their number."""
    found = {arm.name: difference(rows, arm.name, "vigos") for arm in ARM.values() if arm.name != "vigos"}
    shown = {name: d for name, d in found.items() if d is not None}
    tested = {name: d.p_value for name, d in shown.items() if d.p_value is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: (d, corrected.get(name)) for name, d in shown.items()}


@dataclass(frozen=True)
class Pair:
    """Two models on the same test rows: one base and seed."""

    base: int
    seed: int
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p_value: float


def pairs(rows: Sequence[Row], arm: str, other: str, metric: str = "score") -> list[Pair]:
    """Compare two arms by an exact test of flipped signs and a bootstrap, both over triplets, for each base and seed.

    The untrained arm is compared with each seed.
    """
    found = []
    theirs = [row for row in rows if row["arm"] == other]
    for row in (r for r in rows if r["arm"] == arm):
        match = [o for o in theirs if o["base"] == row["base"] and (other == "base" or o["seed"] == row["seed"])]
        if not match:
            continue
        a, b = row[f"{metric}_items"], match[0][f"{metric}_items"]
        if len(a) != len(b):
            raise ValueError(f"{arm} and {other} must share their test rows, got {len(a)} and {len(b)} outcomes")
        gaps = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
        size = 2 if metric == "score" else 1  # conflicting images a triplet, side by side
        better, worse = gaps.count(1), gaps.count(-1)
        triplets = [i // size for i in range(len(gaps))]
        interval, p = bootstrap_interval(gaps, triplets), sign_flip_test(gaps, triplets)
        mean = sum(gaps) / len(gaps)
        found.append(Pair(row["base"], row["seed"], mean, interval, better, worse, p))
    return found


@dataclass(frozen=True)
class Finding:
    """An expectation stated in docs/study.md and its measured difference, which it says is above 0."""

    name: str
    says: str
    difference: Difference | None


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Return H1 to H3, as far as the rows go. H1 is the loss of Score under lying references, OPSD's minus ViGOS's."""
    clean, lying = in_world(rows), in_world(rows, World(label_bias=1.0))
    losses = []
    for arm in ("opsd", "vigos"):
        a, b = by_base(clean, arm, "score"), by_base(lying, arm, "score")
        losses.append({base: a[base] - b[base] for base in a if base in b})
    shared = {base: losses[0][base] - losses[1][base] for base in losses[0] if base in losses[1]}
    h1 = Difference(*t_interval(list(shared.values())), shared) if shared else None
    return [
        Finding("H1", "lying references cost OPSD more Score than ViGOS", h1),
        Finding("H2", "with clean references OPSD is not worse than ViGOS", difference(clean, "opsd", "vigos")),
        Finding("H3", "the token clip costs Score", difference(clean, "vigos", "clip_token")),
    ]


def print_results(results: str | Path, console: Console) -> None:
    """Print every arm of the default world against ViGOS, and the expectations, as tables."""
    from vigos.system.screen import print_table

    rows = read_csv(results)
    default = in_world(rows)
    columns = (
        "arm",
        "Score",
        "Prior",
        "description",
        "in format",
        "PALR",
        "Score against vigos",
        "p (Holm)",
        "within: p < 0.01",
    )
    against = against_vigos(default)
    lines: list[Any] = []
    for arm in ARM.values():
        mine = [r for r in default if r["arm"] == arm.name]
        if not mine:
            continue
        shares = [by_base(mine, arm.name, m) for m in ("score", "prior", "description", "valid_rate", "palr_all")]
        cells = [f"{100 * math.fsum(v.values()) / len(v):.1f}" if v else "–" for v in shares]
        gap, p = against.get(arm.name, (None, None))
        tested = [] if arm.name == "vigos" else pairs(default, arm.name, "vigos")
        clear = f"{sum(p.p_value < 0.01 for p in tested)} of {len(tested)}" if tested else "–"
        lines.append((arm.name.replace("_", " "), *cells, _words(gap), "–" if p is None else f"{p:.2g}", clear))
    print_table(console, columns, lines)
    lines = [(finding.name, finding.says, _words(finding.difference)) for finding in findings(rows)]
    print_table(console, ("", "expected", "points"), lines, title="expectations of docs/study.md")


def _words(found: Difference | None) -> str:
    """Return a difference in points as text, with its interval over bases where there is one."""
    if found is None:
        return "–"
    if found.interval is None:
        return f"{100 * found.mean:+.1f} (one base: no interval)"
    low, high = found.interval
    return f"{100 * found.mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}, {len(found.by_base)} bases)"


# --- Figures ----------------------------------------------------------------------------------------------------------

_COLOURS = {"base": "#8f95a1", "sft": "#b8517c", "opsd": "#8240d6", "vigos": "#0a8576", "vigos_think": "#cf6a06"}


def draw(results: str | Path, preconditions: str | Path, folder: str | Path) -> list[Path]:
    """Write `study-arms.svg` and, where a knob was turned, `study-axes.svg`; return their paths."""
    import matplotlib

    rows, checks = read_csv(results), read_csv(preconditions)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"study-arms.svg": _arms(rows, checks), "study-axes.svg": _axes(rows, checks)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(text := io.StringIO(), format="svg", metadata={"Date": None})
            written.append(replace_file(folder / name, text.getvalue()))
    return written


def _note(figure: Figure, checks: Sequence[Row], bases: int) -> None:
    """Write P1 to P5 below a figure: without them no comparison means anything."""
    default = [c for c in checks if c["shortcut"] == World.shortcut and c["noise"] == World.noise]
    words = []
    for key, measure in (
        ("P1", "difference"), ("P2", "difference"), ("P3", "score"), ("P3", "prior"), ("P3", "valid"),
        ("P4", "reasoning"), ("P4", "reference"), ("P5", "answer_follows_description"),
    ):  # fmt: skip
        values = [c for c in default if c["precondition"] == key and c["measure"] == measure]
        if values:
            met = "" if key == "P5" else f" (met by {sum(c['met'] == 'True' for c in values)} of {len(values)})"
            shares = ", ".join(f"{100 * c['rate']:.0f}" for c in values)
            words.append(f"{key} {measure.replace('_', ' ')} {shares} %{met}")
    text = textwrap.fill(f"{bases} base(s). " + "; ".join(words), int(18 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=6.5, color="#5a606b", x=0.01, ha="left")


def _arms(rows: Sequence[Row], checks: Sequence[Row]) -> Figure:
    """Draw every base and seed as a dot, the mean over bases as a bar, its t interval where there is one."""
    from matplotlib.figure import Figure

    default = in_world(rows)
    shown = [name for name in ARM if any(r["arm"] == name for r in default)]
    figure = Figure(figsize=(8, 0.42 * len(shown) + 1.7), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    titles = (("score", "Score"), ("prior", "Prior"), ("description", "description right"))
    for axis, (metric, title) in zip(axes, titles, strict=True):
        for place, arm in enumerate(shown):
            values = by_base(default, arm, metric)
            colour = _COLOURS.get(arm, "#2f5fd0")
            if values:
                mean, interval, _ = t_interval(list(values.values()))
                if interval:
                    axis.plot([100 * v for v in interval], [place, place], color=colour, linewidth=5, alpha=0.25)
                axis.plot(100 * mean, place, "|", color=colour, markersize=15, markeredgewidth=2)
            for row in default:
                if row["arm"] == arm and row[metric] is not None:
                    axis.plot(100 * row[metric], place + 0.12 * (row["seed"] - 0.5), "o", color=colour, markersize=3.5)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlim(-2, 102)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axis.grid(axis="x", color="#dfdcd5", linewidth=0.6)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[0].set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
    axes[0].invert_yaxis()
    _note(figure, checks, len({r["base"] for r in default}))
    return figure


def _axes(rows: Sequence[Row], checks: Sequence[Row]) -> Figure | None:
    """Draw Score and descriptions over each knob that was turned: means over bases as a line an arm, cells as dots."""
    from matplotlib.figure import Figure

    turned = [k for k in KNOBS if len({r[k] for r in rows}) > 1]
    if not turned:
        return None
    figure = Figure(figsize=(max(5, 3.6 * len(turned)), 6.4), layout="constrained")
    titles = (("score", "Score"), ("description", "description right"))
    for (metric, title), line in zip(titles, figure.subplots(2, len(turned), squeeze=False), strict=True):
        for axis, knob in zip(line, turned, strict=True):
            levels = sorted({r[knob] for r in rows})
            for arm, colour in _COLOURS.items():
                worlds = [(level, in_world(rows, World(**{knob: level}))) for level in levels]
                curve = [(level, cells, values) for level, cells in worlds if (values := by_base(cells, arm, metric))]
                if len(curve) < 2:
                    continue
                means = [(level, 100 * math.fsum(values.values()) / len(values)) for level, _, values in curve]
                axis.plot(*zip(*means, strict=True), color=colour, label=arm.replace("_", " "))
                for level, cells, _ in curve:
                    dots = [100 * r[metric] for r in cells if r["arm"] == arm and r[metric] is not None]
                    axis.plot([level] * len(dots), dots, "o", color=colour, markersize=3, alpha=0.6)
            axis.set_title(f"{title} over {knob.replace('_', ' ')}", fontsize=10, loc="left")
            axis.set_xticks(levels)
            axis.set_ylim(-2, 102)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            axis.grid(axis="y", color="#dfdcd5", linewidth=0.6)
            axis.legend(frameon=False, fontsize=8)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    _note(figure, checks, len({r["base"] for r in rows}))
    return figure
