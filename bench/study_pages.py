"""Tables of the study and of what stands beside it, from bench/results/study; `pages.py` fills them in."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vigos.study.results import Difference

STUDY_RESULTS = Path(__file__).resolve().parent / "results" / "study"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def study_rows(name: str = "results") -> list[Any]:
    from vigos.study.results import read_csv

    return read_csv(STUDY_RESULTS / f"{name}.csv")


def percent(values: Iterable[float]) -> str:
    """The mean over bases, in percent."""
    shares = [100 * v for v in values]
    return f"{sum(shares) / len(shares):.1f}" if shares else ""


def points(found: Difference | None) -> str:
    """A difference in points with its 95 % t interval over bases."""
    if found is None or found.interval is None:
        return ""
    low, high = found.interval
    return f"{100 * found.mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def study_arms() -> str:
    """Every arm of the default world."""
    from vigos.study.plan import ARMS
    from vigos.study.results import against_vigos, by_base, in_world

    own = in_world(study_rows())
    against = against_vigos(own)
    lines = []
    for arm in ARMS:
        names = ("score", "prior", "valid_rate", "description", "palr_all")
        gap, p = against.get(arm.name, (None, None))
        shares = (percent(by_base(own, arm.name, n).values()) for n in names)
        lines.append([f"`{arm.name}`", *shares, points(gap), "" if p is None else f"{p:.2g}"])
    measures = ["Score", "Prior", "in the format", "description right", "PALR"]
    return table(["arm", *measures, "Score against `vigos`", "p (Holm)"], lines)


def study_axes() -> str:
    """The arms of the other worlds."""
    from vigos.study.plan import FULL, World
    from vigos.study.results import by_base, difference, in_world

    found = study_rows()
    lines = []
    for world in (World(), *(World(**{axis.knob: level}) for axis in FULL.axes for level in axis.levels)):
        here, name = in_world(found, world), "default"
        if not by_base(here, "vigos", "score"):
            continue
        for axis in FULL.axes:
            if getattr(world, axis.knob) != getattr(World, axis.knob):
                name = f"`{axis.knob}` {getattr(world, axis.knob):g}"
        scores, described = (
            [percent(by_base(here, arm, metric).values()) for arm in ("base", "opsd", "vigos")]
            for metric in ("score", "description")
        )
        gaps = [points(difference(here, "opsd", "vigos", metric)) for metric in ("score", "description")]
        lines.append([name, " / ".join(scores), gaps[0], " / ".join(described), gaps[1]])
    against = "`opsd` against `vigos`"
    head = ["world", "Score: `base` / `opsd` / `vigos`", against, "description right", against]
    return table(head, lines)


def study_findings() -> str:
    """H1 to H3, base by base."""
    from vigos.eval.statistics import holm
    from vigos.study.results import findings

    tested = [f for f in findings(study_rows()) if f.difference and f.difference.p_value is not None]
    lines = []
    for finding, p in zip(tested, holm([f.difference.p_value for f in tested]), strict=True):
        each = " / ".join(f"{100 * v:+.1f}" for v in finding.difference.by_base.values())
        lines.append([f"{finding.name}: {finding.says}", each, points(finding.difference), f"{p:.2g}"])
    return table(["above 0 is what was expected", "base by base", "mean (95 % interval)", "p (Holm)"], lines)


def chance(p: float) -> str:
    """A p value."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def inside(found: list[Any], arm: str, other: str) -> tuple[str, float | None]:
    """A difference in Score in points, and its p: over bases, or over the triplets of the only base and seed."""
    from vigos.study.results import difference, pairs

    if len({row["base"] for row in found}) > 1:
        gap = difference(found, arm, other)
        return points(gap), gap.p_value if gap else None
    each = pairs(found, arm, other)
    if not each:
        return "", None
    low, high = each[0].interval
    return f"{100 * each[0].difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", each[0].p_value


def against(named: list[tuple[str, list[Any], str, str]]) -> list[list[str]]:
    """Lines of name, Score, Prior, descriptions, and the Score against another arm with p corrected for their number.

    `named`: what a line is called, the rows of its world, its arm, and the other one (empty: none).
    """
    from vigos.eval.statistics import holm
    from vigos.study.results import by_base

    gaps = [inside(found, arm, other) if other else ("", None) for _, found, arm, other in named]
    tested = [p for _, p in gaps if p is not None]
    corrected = iter(holm(tested))
    lines = []
    for (name, found, arm, other), (gap, p) in zip(named, gaps, strict=True):
        shares = (percent(by_base(found, arm, n).values()) for n in ("score", "prior", "description"))
        words = ["", ""] if p is None else [f"{gap}, `{other}`", chance(next(corrected))]
        lines.append([name, *shares, *words])
    return lines


def study_controls() -> str:
    """Teachers that were told something else, against the same method told the truth."""
    from vigos.study.plan import CONTROL
    from vigos.study.results import in_world

    found = in_world(study_rows("controls"))
    named = []
    for arm in ("base", *sorted(CONTROL.arms[1:], key=lambda name: name.split("_")[0])):  # each beside its method
        method = arm.split("_")[0]
        if any(row["arm"] == arm for row in found):
            named.append((f"`{arm}`", found, arm, method if arm != method and arm != "base" else ""))
    head = ["arm", "Score", "Prior", "description right", "Score against", "p (Holm)"]
    return table(head, against(named))


def study_methods() -> str:
    """Recipes of others, with true references and with such as always state the habit."""
    from vigos.study.plan import METHOD, World
    from vigos.study.results import in_world

    named = []
    for world, words in ((World(), "true"), (World(label_bias=1.0), "the habit")):
        found = in_world(study_rows("methods"), world)
        for arm in METHOD.arms:
            if any(row["arm"] == arm for row in found):
                named.append((f"{words}: `{arm}`", found, arm, "base" if arm != "base" else ""))
    head = ["references: arm", "Score", "Prior", "description right", "Score against", "p (Holm)"]
    return table(head, against(named))


def study_search() -> str:
    """Worlds whose training scenes follow the habit: base, OPSD and ViGOS, in small."""
    from vigos.study.plan import SEARCH
    from vigos.study.results import by_base, in_world

    found, lines, gaps = study_rows("search"), [], []
    for world in sorted(SEARCH.worlds, key=lambda w: (w.place, w.faint, w.conflict)):
        here = in_world(found, world)
        if not by_base(here, "vigos", "score") or not by_base(here, "opsd", "score"):
            continue
        described = (
            " / ".join(percent(by_base(here, arm, metric).values()) for arm in ("base", "opsd", "vigos"))
            for metric in ("score", "description")
        )
        gap, p = inside(here, "vigos", "opsd")
        gaps.append(p)
        seen, asked = "faint" if world.faint else "plain", "its place" if world.place else "the digit"
        lines.append([f"{100 * world.conflict:g} %, {seen}, question names {asked}", *described, gap])
    from vigos.eval.statistics import holm

    corrected = holm([p for p in gaps if p is not None])
    lines = [[*line, chance(p)] for line, p in zip(lines, corrected, strict=True)]
    arms = "`base` / `opsd` / `vigos`"
    return table(
        ["conflict, asked digit", f"Score: {arms}", "description right", "`vigos` - `opsd`", "p (Holm)"], lines
    )


def study_frozen() -> str:
    """The worlds that the search chose, on five other bases: who differs from whom in Score."""
    from vigos.eval.statistics import holm
    from vigos.study.plan import FROZEN, World
    from vigos.study.results import by_base, difference, in_world

    rows, lines, tests = study_rows("frozen"), [], []
    for level in FROZEN.axes[0].levels:
        here = in_world(rows, World(conflict=level))
        means = {arm: percent(by_base(here, arm, "score").values()) for arm in ("base", "opsd", "vigos")}
        for arm, other in (("vigos", "opsd"), ("vigos", "base"), ("opsd", "base")):
            gap = difference(here, arm, other)
            assert gap is not None
            each = " / ".join(f"{100 * v:+.1f}" for v in gap.by_base.values())
            name = f"{100 * level:g} %: `{arm}` {means[arm]} - `{other}` {means[other]}"
            lines.append([name, each, points(gap), points(difference(here, arm, other, "description"))])
            tests.append(gap.p_value if gap.p_value is not None else 1.0)
    lines = [[*line[:3], chance(p), line[3]] for line, p in zip(lines, holm(tests), strict=True)]
    head = ["conflict: Score, %", "base by base", "mean (95 % interval)", "p (Holm)", "description right"]
    return table(head, lines)


def own_data() -> str:
    """Accuracy on data that nobody here made, before and after."""
    with (STUDY_RESULTS / "own-data.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))

    def share(text: str) -> str:
        return f"{100 * float(text):.1f}" if text else ""

    def gap(row: dict[str, str], name: str) -> str:
        values = [100 * float(row[key]) for key in (name, f"{name}_low", f"{name}_high") if row[key]]
        return f"{values[0]:+.1f} ({values[1]:+.1f} to {values[2]:+.1f})" if values else ""

    lines = []
    for row in found:
        right = f"{share(row['accuracy'])} ({share(row['low'])} to {share(row['high'])})"
        p = chance(float(row["p_holm"])) if row["p_holm"] else ""
        gaps = gap(row, "difference"), p, gap(row, "from_vigos")
        lines.append(
            [f"{row['data']}: {row['arm']}", right, row["kinds"], share(row["score"]), share(row["prior"]), *gaps]
        )
    head = ["data: arm", "right, %", "by kind of question", "Score", "Prior", "against the warm-up", "p (Holm)",
            "against `vigos`"]  # fmt: skip
    return table(head, lines)


def study_preconditions() -> str:
    """P1 to P5 of the default world, base by base."""
    from vigos.study.plan import World
    from vigos.study.results import read_csv

    measures = (
        ("P1", "difference"), ("P2", "difference"), ("P3", "score"), ("P3", "prior"), ("P3", "valid"),
        ("P4", "reasoning"), ("P4", "reference"), ("P5", "answer_follows_description"),
    )  # fmt: skip
    checks = read_csv(STUDY_RESULTS / "preconditions.csv")
    lines = []
    for key, measure in measures:
        own = [
            c for c in checks
            if (c["precondition"], c["measure"]) == (key, measure)
            and (c["noise"], c["shortcut"]) == (World.noise, World.shortcut)
        ]  # fmt: skip
        own.sort(key=lambda c: c["base"])
        met = "" if key == "P5" else f"{sum(c['met'] == 'True' for c in own)} of {len(own)}"
        lines.append([f"{key} {measure.replace('_', ' ')}", " / ".join(f"{100 * c['rate']:.1f}" for c in own), met])
    return table(["precondition, %", "base by base", "met"], lines)


STUDY: dict[str, Callable[[], str]] = {
    "study-arms": study_arms, "study-axes": study_axes, "study-controls": study_controls,
    "study-methods": study_methods, "study-search": study_search, "study-frozen": study_frozen, "own-data": own_data,
    "study-findings": study_findings, "study-preconditions": study_preconditions,
}  # fmt: skip
