"""The figures of a report: matplotlib, as SVG that takes its colours and its font from the page around it.

A figure is drawn in marker colours that occur nowhere else; `svg_of` replaces them by CSS variables, so that one
drawing serves light and dark. Text stays text. Runs are told apart by line style, terms by colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vigos.method.supervise import TERMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn as -> shown as. The names are those of report.css.
COLOURS = {
    "#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--line)", "#0a0b01": "var(--perception)",
    "#0a0b02": "var(--reasoning)", "#0a0b03": "var(--reference)", "#0a0b04": "var(--accent)",
    "#0a0b05": "var(--series-1)", "#0a0b06": "var(--series-2)", "#0a0b07": "var(--series-3)",
    "#0a0b08": "var(--series-4)", "#0a0b09": "var(--series-5)", "#0a0b0a": "var(--series-6)",
}  # fmt: skip
INK, MUTED, LINE = "#010101", "#020202", "#030303"
OF_TERM = dict(zip(TERMS, ("#0a0b01", "#0a0b02", "#0a0b03"), strict=True))
ACCENT = "#0a0b04"
SERIES = ("#0a0b05", "#0a0b06", "#0a0b07", "#0a0b08", "#0a0b09", "#0a0b0a")
STYLES = ("-", (0, (4, 2)))  # the run, and the run it is compared with

POINTS = 240  # of a curve; longer ones are averaged in as many bins
WIDTH, HEIGHT = 4.7, 2.75  # inches: about as many CSS pixels as a phone is wide

Log = Sequence[Mapping[str, Any]]  # the lines of metrics.jsonl that hold a step's metrics


def own_terms(logs: Sequence[Log]) -> list[str]:
    """Return the names of the teachers that are runs' own, sorted."""
    names = {name.removeprefix("kl/") for log in logs for line in log for name in line if name.startswith("kl/")}
    return sorted(names - OF_TERM.keys())


@dataclass(frozen=True)
class Chart:
    """A drawing, a sentence about it, its legend, and its values as a table.

    Attributes:
        legend: (label, CSS colour, whether the line is dashed).
        points: what is shown under the pointer: `left`, `right`: edges of the axes, as shares of the drawing's width;
            `low`, `high`: steps there; `curves`: (label, steps, values as text).
    """

    name: str
    title: str
    text: str
    svg: str
    legend: list[tuple[str, str, bool]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    points: dict[str, Any] = field(default_factory=dict)


def series(log: Log, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a metric, averaged in at most `POINTS` bins of neighbouring steps."""
    points = [(float(line["step"]), float(line[name])) for line in log if isinstance(line.get(name), int | float)]
    if len(points) <= POINTS:
        return [s for s, _ in points], [v for _, v in points]
    edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return [sum(s for s, _ in b) / len(b) for b in bins], [sum(v for _, v in b) / len(b) for b in bins]


def smoothed(values: Sequence[float]) -> list[float]:
    """Average over a centred window of a tenth of the curve; short curves stay as they are."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def svg_of(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element for a page, hidden from screen readers, which read its table."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in COLOURS.items():
        text = text.replace(drawn, shown)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Ids are unique in a drawing, and must be in the page that holds ten of them.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None
    return re.sub(
        r"^<svg[^>]*>",
        f'<svg viewBox="0 0 {size[1]} {size[2]}" aria-hidden="true" focusable="false" role="presentation">',
        text,
        count=1,
    )


def new_figure(panels: int = 1, *, height: float = HEIGHT) -> tuple[Figure, list[Any]]:
    """Make a figure in the report's style and its axes, one below the other."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10.0, "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.grid.axis": "y", "grid.color": LINE, "grid.linewidth": 0.6, "axes.titlesize": 10.0,
        "axes.titlelocation": "left", "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
        "figure.constrained_layout.use": True, "axes.formatter.useoffset": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    return figure, list(axes)


# --- Kinds of figures -------------------------------------------------------------------------------------------------


def lines(
    name: str, title: str, text: str, logs: Sequence[Log], curves: Sequence[tuple[str, str, str]], *,
    share: bool = False, low: float | None = 0.0,
) -> Chart | None:  # fmt: skip
    """Draw curves (metric, label, colour) of one or two runs; None where nothing was logged."""
    figure, (axis,) = new_figure()
    table: list[list[str]] = []
    drawn: dict[str, tuple[str, str, bool]] = {}
    traced: list[tuple[str, list[float], list[str]]] = []
    for run, log in enumerate(logs):
        for metric, label, colour in curves:
            steps, values = series(log, metric)
            if not steps:
                continue
            values = [100 * v for v in values] if share else values
            if len(steps) > 40:
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8, linestyle=STYLES[run])
            axis.plot(
                steps, smoothed(values), color=colour, linestyle=STYLES[run], linewidth=1.8,
                marker="o" if len(steps) < 12 else None, markersize=3,
            )  # fmt: skip
            drawn[label] = (label, COLOURS[colour], False)
            table.append([label, *(["AB"[run]] if len(logs) > 1 else []), *_ends(values, share)])
            traced.append(_traced(label, run, logs, steps, values, share))
    if not table:
        return None
    _finish(axis, share, low)
    legend = list(drawn.values()) if len(curves) > 1 else []
    if len(logs) > 1:
        legend += [("run A", "var(--muted)", False), ("run B", "var(--muted)", True)]
    svg = svg_of(figure, name)  # which lays the axes out
    return Chart(name, title, text, svg, legend, ["curve", *_heads(logs)], table, _points(axis, traced))


def stacked(
    name: str, title: str, text: str, logs: Sequence[Log], parts: Sequence[tuple[str, str, str]], *,
    share: bool = False, derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Chart | None:  # fmt: skip
    """Draw areas (metric, label, colour) on top of each other, a panel a run; a metric that a line lacks counts 0."""
    figure, axes = new_figure(len(logs), height=HEIGHT + 1.5 * (len(logs) - 1))
    table: list[list[str]] = []
    drawn: dict[str, tuple[str, str, bool]] = {}
    traced: list[tuple[str, list[float], list[str]]] = []
    for run, (log, axis) in enumerate(zip(logs, axes, strict=True)):
        filled = [
            {"step": line["step"], **{m: 0.0 for m, _, _ in parts}, **(derive(line) if derive else line)}
            for line in log
        ]
        columns = [(label, colour, *series(filled, metric)) for metric, label, colour in parts]
        columns = [c for c in columns if any(c[3])]
        if not columns:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, color=MUTED, ha="center")
            continue
        scale = 100 if share else 1
        values = [[scale * v for v in smoothed(c[3])] for c in columns]
        axis.stackplot(columns[0][2], values, colors=[c[1] for c in columns], alpha=0.85)
        for c in columns:
            drawn[c[0]] = (c[0], COLOURS[c[1]], False)
            scaled = [scale * v for v in c[3]]
            table.append([c[0], *(["AB"[run]] if len(logs) > 1 else []), *_ends(scaled, share)])
            traced.append(_traced(c[0], run, logs, c[2], scaled, share))
        _finish(axis, share, 0.0)
        if len(logs) > 1:
            axis.set_title(f"run {'AB'[run]}", color=MUTED)
    if not table:
        return None
    svg, columns_ = svg_of(figure, name), ["part", *_heads(logs)]
    return Chart(name, title, text, svg, list(drawn.values()), columns_, table, _points(axes[-1], traced))


def _traced(
    label: str, run: int, logs: Sequence[Log], steps: list[float], values: list[float], share: bool
) -> tuple[str, list[float], list[str]]:
    name = f"{label}, run {'AB'[run]}" if len(logs) > 1 else label
    return name, [round(s, 1) for s in steps], [f"{v:.1f} %" if share else f"{v:.4g}" for v in values]


def _points(axis: Any, traced: list[tuple[str, list[float], list[str]]]) -> dict[str, Any]:
    """Return where the axes lie in a figure that was drawn, and the values of its curves."""
    place, (low, high) = axis.get_position(), axis.get_xlim()
    return {"left": place.x0, "right": place.x1, "low": low, "high": high, "curves": traced}


def _heads(logs: Sequence[Log]) -> list[str]:
    return [*(["run"] if len(logs) > 1 else []), "first tenth", "last tenth", "least", "most"]


def _ends(values: Sequence[float], share: bool) -> list[str]:
    tenth = max(1, len(values) // 10)
    first, last = (sum(part) / len(part) for part in (values[:tenth], values[-tenth:]))
    return [f"{v:.1f} %" if share else f"{v:.4g}" for v in (first, last, min(values), max(values))]


def _finish(axis: Any, share: bool, low: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.margins(x=0.01)
    if low is not None:
        axis.set_ylim(bottom=low)
    if share:
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        if axis.get_ylim()[1] > 100:
            axis.set_ylim(top=101)
