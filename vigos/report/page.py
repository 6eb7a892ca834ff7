"""Write a run folder as one HTML file that needs nothing else and fetches nothing (`vigos report`).

    write_report("runs/demo", "report.html")                        # a run folder, or the demo's folder around it
    write_report("runs/a", "report.html", compare="runs/b")         # two runs, side by side

Everything that comes from a run (problems, completions, file names) is text: the template escapes it, the script sets
it as text, and the page's content security policy allows one script, by its hash, and no connection at all. A run of
any length gives a page of a bounded size: a sample of its rollouts, drawn evenly over its steps.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

from vigos.eval.results import Comparison, EvaluationResult, Metric, compare
from vigos.method.supervise import TERMS
from vigos.report.evaluations import Found, find_evaluations, flipped
from vigos.report.figures import Chart, own_terms
from vigos.system.extras import install
from vigos.system.files import parsed, read_json_lines, read_sections, replace_file

MAX_ROLLOUTS = 400
MAX_TOKENS = 120_000  # over the rollouts of a page; with the likeliest tokens of both models about 12 MB
MAX_IMAGE_BYTES = 400_000
MAX_DATA_BYTES = 24_000_000  # rollouts of a page with their images, as JSON; the rest of it is a few megabytes at most
MAX_RECORD_BYTES = 4_000_000  # of a rollout's line
MAX_IMAGES = 8  # a rollout, and each of its views
MAX_VIEWS, MAX_NAME = 12, 60  # roles of a rollout with views of their own, and characters of their names
MAX_CHARACTERS = 4000  # of a question, a reference, an answer
_IMAGE_NAME = re.compile(r"images/[0-9a-f]{8,64}\.(png|webp)")
_MEDIA = {"png": "image/png", "webp": "image/webp"}

HEADLINE: tuple[tuple[Metric, str, str], ...] = (
    ("score", "Score", "right where the image contradicts the prior"),
    ("prior", "Prior", "right where the image agrees with it"),
    ("accuracy", "Accuracy", "right over all examples"),
    ("valid_rate", "In format", "outputs in the asked format, right or wrong"),
)


# --- Reading a run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The contents of one run that a report shows.

    Attributes:
        config: the sections of config.yaml.
        log: the lines of metrics.jsonl that hold a step's metrics.
        evaluations: of the untrained model under the same prompt, and of the trained one.
        duration_s: seconds that its steps took.
        rollouts: the sampled records of completions/, in order of their steps.
        written: how many records completions/ holds.
        skipped: examples that could not be used, by reason.
        damaged: lines of its files that could not be read, and are left out.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    log: list[dict[str, Any]]
    evaluations: Found
    rollouts: list[dict[str, Any]]
    written: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    damaged: int = 0
    duration_s: float = 0.0


def load_run(
    folder: str | Path, *, before: str | Path | None = None, after: str | Path | None = None,
    rollouts: int = MAX_ROLLOUTS, seed: int = 0, like: Run | None = None,
) -> Run:  # fmt: skip
    """Read a run folder, or the demo's: the run in `train/`, its evaluations beside it or under it.

    Args:
        before, after: records of two evaluations, in place of those that are found.
        rollouts: how many to sample at most.
        like: a run whose sampled examples are preferred, so that two runs can be compared side by side.
    """
    outer = Path(folder)
    if not outer.is_dir():
        raise ValueError(f"the run must be a folder, got {outer}, which is none")
    inner = outer if (outer / "metrics.jsonl").is_file() else outer / "train"
    if not (inner / "metrics.jsonl").is_file():
        raise ValueError(f"{outer} is no run folder: it holds neither metrics.jsonl nor train/metrics.jsonl")
    config = read_sections(inner / "config.yaml")
    damaged = int((inner / "config.yaml").is_file() and not config)
    wanted = {(r["step"], r["problem_id"]) for r in like.rollouts} if like else set()
    sampled, written, lines = _sample(inner / "completions", rollouts, seed, wanted)
    damaged += lines
    metrics, lines = read_json_lines(inner / "metrics.jsonl")
    damaged += lines
    skipped, lines = read_json_lines(inner / "skipped.jsonl") if (inner / "skipped.jsonl").is_file() else ([], 0)
    damaged += lines
    config = config if isinstance(config, dict) else {}
    found = find_evaluations(outer, inner, _section(config, "run").get("model"))
    if before is not None:
        found = replace(found, before=EvaluationResult.load(before))
    if after is not None:
        found = replace(found, after=EvaluationResult.load(after))
    given = before is not None or after is not None
    if found.before and found.after and not given and found.before.mismatches(found.after):
        found = replace(found, before=None)  # another time, other questions: not those before
    return Run(
        name=(outer.resolve().parent if outer.name == "train" else outer.resolve()).name,
        folder=inner,
        config=config,
        log=[line for line in metrics if "loss" in line and "step" in line],
        evaluations=found,
        duration_s=sum(float(line.get("perf/step_s") or 0.0) for line in metrics),
        rollouts=sampled,
        written=written,
        skipped=Counter(str(line.get("reason")) for line in skipped),
        damaged=damaged,
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _sample(folder: Path, limit: int, seed: int, wanted: set[tuple[int, str]]) -> tuple[list[dict[str, Any]], int, int]:
    """Return records spread evenly over the files of `folder`, how many there are, and how many chosen are damaged.

    Only chosen lines are parsed.
    """
    places: list[tuple[Path, int]] = []  # (file, byte offset) of every record, in the order of steps
    for path in sorted(folder.glob("step-*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    places.append((path, offset))
                offset += len(line)
    rng = random.Random(seed)
    edges = [round(i * len(places) / limit) for i in range(limit + 1)] if len(places) > limit else []
    chosen = [rng.randrange(a, b) for a, b in pairwise(edges) if b > a] if edges else None
    records: list[tuple[int, dict[str, Any]]] = []
    tokens = damaged = 0
    picked = places if chosen is None else [places[i] for i in chosen]
    if wanted:
        picked = _preferring(places, picked, wanted)
    order = list(range(len(picked)))
    rng.shuffle(order)  # where the tokens are too many, what is left is still spread over the steps
    for i in order:
        record = _record_at(*picked[i])
        if record is None:
            damaged += 1
            continue
        tokens += len(record["tokens"])
        if tokens > MAX_TOKENS and records:
            break
        records.append((i, record))
    return [record for _, record in sorted(records, key=lambda pair: pair[0])], len(places), damaged


def _record_at(path: Path, offset: int) -> dict[str, Any] | None:
    """Return the record of a rollout at a byte offset; None where it is damaged."""
    with path.open("rb") as file:
        file.seek(offset)
        record = parsed(file.readline(MAX_RECORD_BYTES))  # a longer one is cut, and so damaged
    return record if isinstance(record, dict) and set(record) >= _RECORD and _is_scored(record) else None


_RECORD = {"step", "problem_id", "problem", "answer", "valid", "reason", "tokens"}


def _is_scored(record: Mapping[str, Any]) -> bool:
    """Return True if every teacher of a record has as many scores as tokens."""
    try:
        scores = record.get("teachers", {}).values()
        return all(len(s["tokens"]) == len(s["segments"]) == len(s["divergence"]) == len(s["clipped"]) for s in scores)
    except (AttributeError, TypeError, KeyError):
        return False


def _preferring(
    places: Sequence[tuple[Path, int]], picked: list[tuple[Path, int]], wanted: set[tuple[int, str]]
) -> list[tuple[Path, int]]:
    """Return the places of wanted (step, example) pairs first, then picked ones, as many as were picked."""
    steps = {step for step, _ in wanted}
    found = []
    for path, offset in places:
        if int(path.stem.split("-")[1]) not in steps:
            continue
        record = _record_at(path, offset)
        if record is not None and (record["step"], record["problem_id"]) in wanted:
            found.append((path, offset))
    rest = [place for place in picked if place not in set(found)]
    return sorted([*found, *rest][: len(picked)])


# --- Headline numbers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """One line of the headline: shares in per cent, with 95 % intervals; the difference is paired by example."""

    label: str
    meaning: str
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None
    comparison: Comparison | None


def headline(before: EvaluationResult | None, after: EvaluationResult | None) -> list[Number]:
    """Return Score, Prior, accuracy and format of two evaluations, as far as there are any."""
    found = []
    summaries = [r.summary() if r else {} for r in (before, after)]
    for metric, label, meaning in HEADLINE:
        if metric == "accuracy" and any("score" in s for s in summaries):
            continue  # a mixture of the two that are shown
        values = [
            (100 * s[metric], *(100 * v for v in s[f"{metric}_interval"])) if metric in s else None for s in summaries
        ]
        if any(values):
            both = before is not None and after is not None and all(values) and _same_examples(before, after)
            paired = compare(before, after, metric=metric) if both else None  # type: ignore[arg-type]
            found.append(Number(label, meaning, values[0], values[1], paired))  # type: ignore[arg-type]
    return found


def _same_examples(a: EvaluationResult, b: EvaluationResult) -> bool:
    """Return True if two evaluations share examples, and agree on the answers of those they share."""
    answers = {r["key"]: r["answer"] for r in a.answered}
    shared = [r for r in b.answered if r["key"] in answers]
    return bool(shared) and all(answers[r["key"]] == r["answer"] for r in shared)


# --- Rollouts for the page --------------------------------------------------------------------------------------------


def rollout_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the data that the page's script reads: texts are shared in a table, images are data: addresses.

    `rollouts`: run, step, id, problem, answer, valid, reason, right, `age` (of the weights that sampled it, in steps),
    images, `views` ([role, images] of those that saw others), tokens (indices of `texts`), and `taught`: for each
    supervised token [token, teacher, segment, KL, clipped, log p, log q, top of student, top of teacher]; a top is a
    flat list of text, share in thousandths.
    """
    texts: dict[str, int] = {}
    images: dict[str, int] = {}
    teachers = {term: i for i, term in enumerate((*TERMS, *own_terms([run.log for run in runs])))}
    pictures: list[dict[str, Any]] = []
    found = []

    def text(value: Any) -> int:
        return texts.setdefault(str(value), len(texts))

    def tops(values: Sequence[Sequence[Any]] | None) -> list[int] | None:
        return None if values is None else [x for piece, p in values for x in (text(piece), round(1000 * p))]

    def placed_images(number: int, names: Any) -> list[int]:
        """Return where the images of a run are in `pictures`, those that can be shown."""
        shown = []
        for name in names[:MAX_IMAGES] if isinstance(names, list) else ():
            key = f"{number}/{name}"
            if key not in images:
                picture = _picture(runs[number].folder / "completions", name)
                if picture is None:
                    continue
                images[key] = len(pictures)
                pictures.append(picture)
            shown.append(images[key])
        return shown

    size, placed = 0, []
    places = list(zip_longest(*(run.rollouts for run in runs)))
    order = list(range(len(places)))
    random.Random(0).shuffle(order)  # a page that is full holds as many of each run, spread over its steps
    turns = [(i, n, record) for i in order for n, record in enumerate(places[i]) if record is not None]
    for place, number, record in turns:
        known = (len(texts), len(pictures))
        shown = placed_images(number, record.get("images", []))
        seen: Any = record.get("views")
        taught = []
        for term, scores in record.get("teachers", {}).items():
            none = [None] * len(scores["tokens"])
            for i, token in enumerate(scores["tokens"]):
                taught.append(
                    [
                        token,
                        teachers.setdefault(term, len(teachers)),
                        scores["segments"][i],
                        _number(scores["divergence"][i]),
                        int(scores["clipped"][i]),
                        _number(scores.get("student_logprob", none)[i]),
                        _number(scores.get("teacher_logprob", none)[i]),
                        tops(scores.get("student_top", none)[i]),
                        tops(scores.get("teacher_top", none)[i]),
                    ]
                )
        found.append(
            {
                "run": number,
                "step": record["step"],
                "id": str(record["problem_id"]),
                "problem": str(record["problem"])[:MAX_CHARACTERS],
                "answer": str(record["answer"])[:MAX_CHARACTERS],
                "valid": bool(record["valid"]),
                "reason": str(record["reason"]),
                "right": record.get("correct"),
                "age": max(0, record["step"] - 1 - version) if isinstance(version := record.get("version"), int) else 0,
                "images": shown,
                "views": [
                    [str(role)[:MAX_NAME], placed_images(number, names)]
                    for role, names in islice(seen.items() if isinstance(seen, dict) else (), MAX_VIEWS)
                ],
                "said": said[:MAX_CHARACTERS] if isinstance(said := record.get("answer_text"), str) else None,
                "tokens": [text(t) for t in record["tokens"]],
                "taught": taught,
            }
        )
        added = [found[-1], list(islice(texts, known[0], None)), pictures[known[1] :]]
        size += len(json.dumps(added, ensure_ascii=False).encode("utf-8", "replace"))
        if size > MAX_DATA_BYTES:
            found.pop()
            break
        placed.append((number, place))
    ordered = [found[i] for i in sorted(range(len(found)), key=placed.__getitem__)]
    return {
        "texts": list(texts),
        "images": pictures,
        "rollouts": ordered,
        "runs": [run.name for run in runs],
        "teachers": list(teachers),
    }


def _number(value: Any) -> float | None:
    """Round a finite number; None for infinities (words in the records), which the page shows as a dash."""
    return round(value, 5) if isinstance(value, int | float) and math.isfinite(value) else None


def _picture(folder: Path, name: Any) -> dict[str, Any] | None:
    """Return an image as the page holds it; None where it is not one that a run wrote, or too large."""
    from PIL import Image

    match = _IMAGE_NAME.fullmatch(str(name))
    path = folder / str(name)
    if match is None or not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
        return None
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            width, height = image.size
            image.verify()
    except (OSError, ValueError, SyntaxError):  # a damaged picture costs itself
        return None
    return {
        "src": f"data:{_MEDIA[match[1]]};base64,{base64.b64encode(path.read_bytes()).decode()}",
        "width": width, "height": height,
    }  # fmt: skip


# --- The page ---------------------------------------------------------------------------------------------------------


def write_report(
    run: str | Path, output: str | Path, *, compare: str | Path | None = None, before: str | Path | None = None,
    after: str | Path | None = None, rollouts: int = MAX_ROLLOUTS, seed: int = 0, force: bool = False,
) -> Path:  # fmt: skip
    """Write the report of a run, or of two, to `output`; return its path.

    Args:
        run, compare: run folders, see `load_run`.
        before, after: records of evaluations of `run`, where they are not in its folder.
        rollouts: at most so many of each run are shown.
        force: also show two evaluations that were asked otherwise or of other examples.

    Raises:
        ValueError: no run folder, or evaluations that do not measure the same thing.
    """
    if rollouts < 1:
        raise ValueError(f"rollouts must be at least 1, got {rollouts}")
    first = load_run(run, before=before, after=after, rollouts=rollouts, seed=seed)
    both = first.evaluations
    if both.before and both.after and not force and (found := both.before.mismatches(both.after)):
        raise ValueError(f"before and after do not measure the same thing: {'; '.join(found)}; force shows them")
    runs = [first] if compare is None else [first, load_run(compare, rollouts=rollouts, seed=seed, like=first)]
    return replace_file(output, render(runs))


def render(runs: Sequence[Run]) -> str:
    """Render the page."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup

        from vigos.report.charts import charts_of
    except ImportError as error:
        raise ValueError(f"a report needs {error.name}: {install('report')}") from error
    environment = Environment(
        loader=PackageLoader("vigos.report", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    source = environment.loader
    assert source is not None
    script, style = (source.get_source(environment, name)[0].strip() for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ends = [run.evaluations.after for run in runs]
    sections: list[tuple[str, str, list[Chart]]] = charts_of([run.log for run in runs])
    data = rollout_data(runs)
    data["charts"] = {c.name: c.points for _, _, charts in sections for c in charts if c.points}
    return environment.get_template("report.html").render(
        runs=runs,
        letters="AB",
        teachers=_legend(runs, data["teachers"]),
        facts=_fact_examples(runs),
        headlines=[headline(run.evaluations.before, run.evaluations.after) for run in runs],
        versus=headline(*ends) if len(ends) == 2 and all(ends) else [],
        flips=[flipped(run.evaluations) for run in runs],
        sections=[(key, title, [(c, Markup(c.svg)) for c in charts]) for key, title, charts in sections],
        data=Markup(script_json(data)),
        shown=[sum(r["run"] == n for r in data["rollouts"]) for n in range(len(runs))],
        script=Markup(script),
        style=Markup(style),
        script_hash=digest,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


_MEANINGS = {
    "perception": "sees the image alone", "reasoning": "image, question and answer",
    "reference": "the same, over a rollout out of format",
}  # fmt: skip


def _legend(runs: Sequence[Run], teachers: Sequence[str]) -> list[tuple[int, str, str]]:
    """Return (colour, name, what it sees) of the built-in teachers, where a run has them, and of own ones."""
    options = [_section(run.config, "vigos") for run in runs]
    found = []
    for i, name in enumerate(teachers):
        given = [t for o in options for t in o.get("teachers") or () if isinstance(t, dict) and t.get("name") == name]
        if given:
            reads = str(given[0].get("reads", "reasoning")).split("\n")[0]
            view = given[0].get("view")
            words = f"of the run's own: reads {reads or 'nothing'}" + (f", sees {view}" if view else "")
        elif i >= len(TERMS):
            words = "of the run's own"
        elif all(o.get("teachers") for o in options):
            continue
        else:
            opsd = name == "reference" and any(o.get("method") == "opsd" for o in options)
            words = _MEANINGS[name] + (", or over all of it (opsd)" if opsd else "")
        found.append((i if i < 3 else 3 + (i - 3) % 6, name[:MAX_NAME], words[:MAX_CHARACTERS]))
    return found


def script_json(value: Any) -> str:
    """Return JSON for a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_SHOWN = (
    "method", "preset", "clip_mode", "token_clip", "teacher", "learning_rate", "max_steps", "temperature", "lora_r",
    "seed",
)  # fmt: skip


def _fact_examples(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (run, facts): of two runs first the facts they share, then those of each."""
    facts = [_facts(run) for run in runs]
    if len(facts) == 1:
        return [("", facts[0])]
    shared = [fact for fact in facts[0] if fact in facts[1]]
    rest = [(letter, [f for f in run if f not in shared]) for letter, run in zip("AB", facts, strict=True)]
    return [("both", shared), *((letter, different) for letter, different in rest if different)]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the few options that tell runs apart, as far as the folder says them."""
    facts = _section(run.config, "run")
    options = {**_section(run.config, "transformers"), **_section(run.config, "vigos"), **facts}
    idle = {"token_clip"} if options.get("clip_mode", "token") != "token" else set()
    found = [(name, str(options[name])) for name in _SHOWN if options.get(name) not in (None, "") and name not in idle]
    for name in ("data", "model"):  # the last part of a path: a shared page should not show folders of a machine
        if value := str(options.get(name) or ""):
            path = Path(value)
            shown = "builtin" if path.parts[-3:] == ("vigos", "world", "checkpoint") else path.name
            found.insert(0, (name, shown if path.is_absolute() else value))
    steps = str(int(run.log[-1]["step"])) if run.log else "0"
    found = [*((name, value) for name, value in found if name != "max_steps"), ("steps", steps)]
    if run.duration_s:
        found.append(
            ("duration", f"{run.duration_s / 60:.0f} min" if run.duration_s > 90 else f"{run.duration_s:.0f} s")
        )
    versions = _section(facts, "versions")
    found += [("machine", str(facts["machine"]))] if facts.get("machine") else []
    return found + [(name, str(versions[name])) for name in ("vigos", "torch", "transformers") if name in versions]
