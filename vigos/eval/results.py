"""Turn the records of an evaluation into metrics with intervals, compare two evaluations, read and append records."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vigos.eval.statistics import bootstrap_interval, mean_interval, pass_at_k, sign_flip_test
from vigos.system.files import parsed, replace_file

logger = logging.getLogger(__name__)

FORMAT = 1  # of the records file
Metric = Literal["accuracy", "score", "prior", "valid_rate", "unparseable"]

LEVEL = 0.05 / len(get_args(Metric))  # Bonferroni: two runs are compared in every metric at once

ROLE, CONFLICT, PRIOR, TRIPLET, VARIANT = "role", "conflict", "prior", "triplet", "variant"


@dataclass(frozen=True)
class EvaluationResult:
    """Hold the records of an evaluation, one an example.

    Attributes:
        settings: everything the samples depend on: seed, sampling, prompts, model.
        records: one for each example, in order: key, problem_id, answer, extra and `samples`, a list of {text,
            prediction, correct, valid, reason, finished, tokens}; for an example that could not be used `skipped`
            {reason, detail}.
    """

    settings: dict[str, Any]
    records: list[dict[str, Any]]
    damaged: int = 0

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read a records file, or records.jsonl of a folder, around damaged lines, which `damaged` counts.

        Raises ValueError for another kind of file.
        """
        path = Path(path)
        path = path / "records.jsonl" if path.is_dir() else path
        settings, records, _, damaged = _read_records(path)
        if settings is None:
            raise ValueError(f"{path} is not a records file of an evaluation: its first line holds no settings")
        return cls(settings, records, damaged)

    @property
    def answered(self) -> list[dict[str, Any]]:
        """Return the records of examples that could be used."""
        return [r for r in self.records if "samples" in r]

    def mismatches(self, other: EvaluationResult) -> list[str]:
        """List what keeps two evaluations from being compared: prompts, sampling, judge, or other examples."""
        found = []
        for name in ("prompts", "sampling", "judge"):
            mine, theirs = self.settings.get(name), other.settings.get(name)
            if mine != theirs:
                shown = "" if name == "prompts" else f" ({mine!r} and {theirs!r})"
                found.append(f"they were asked with other {name}{shown}")
        answers = {r["key"]: r["answer"] for r in self.answered}
        shared = [r for r in other.answered if r["key"] in answers]
        differing = sum(answers[r["key"]] != r["answer"] for r in shared)
        fewest = min(len(answers), len(other.answered))
        if differing:
            found.append(f"{differing} of the {len(shared)} examples of the same id have another reference answer")
        elif 2 * len(shared) < fewest:
            found.append(f"only {len(shared)} of {fewest} examples are in both")
        return found

    def examples_of(self, metric: Metric) -> list[dict[str, Any]]:
        """Return the records that a metric is taken over."""
        role = {"score": CONFLICT, "prior": PRIOR}.get(metric)
        return [r for r in self.answered if role is None or r["extra"].get(ROLE) == role]

    def values(self, metric: Metric) -> dict[str, float]:
        """Return a metric's mean over the samples of each example it is taken over, by the example's key."""
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        return {r["key"]: _mean([_counts(s, metric) for s in r["samples"]]) for r in self.examples_of(metric)}

    def summary(self, group_by: str | None = None) -> dict[str, Any]:
        """Return shares in [0, 1] and, under `<name>_interval`, the 95 % interval of each over examples.

        Args:
            group_by: a field of the examples; adds `groups`, accuracy and interval for each of the field's values.
        """
        n, k = self.settings["n"], self.settings["k"]
        answered = self.answered
        samples = [s for r in answered for s in r["samples"]]
        found: dict[str, Any] = {"examples": len(answered), "samples": n, "skipped": len(self.records) - len(answered)}
        if self.damaged:
            found["damaged_lines"] = self.damaged

        triplets = {r["key"]: r["extra"].get(TRIPLET, r["key"]) for r in answered}

        def report(name: str, values: dict[str, float]) -> None:
            found[name] = _mean(list(values.values()))
            found[f"{name}_interval"] = list(mean_interval(list(values.values()), [triplets[key] for key in values]))

        report("accuracy", self.values("accuracy"))
        if n > 1:
            report(f"pass@{k}", {r["key"]: pass_at_k(n, sum(s["correct"] for s in r["samples"]), k) for r in answered})
            found[f"avg@{n}"] = found["accuracy"]
        for metric in ("score", "prior"):
            values = self.values(metric)
            if values:
                report(metric, values)
                found[f"{metric}_examples"] = len(values)
        report("valid_rate", self.values("valid_rate"))
        report("unparseable", self.values("unparseable"))
        found["unfinished"] = _mean([float(not s["finished"]) for s in samples])
        found["tokens_mean"] = _mean([s["tokens"] for s in samples])
        found["invalid_reasons"] = dict(Counter(s["reason"] for s in samples if s["reason"]).most_common())
        found["skipped_reasons"] = dict(
            Counter(r["skipped"]["reason"] for r in self.records if "skipped" in r).most_common()
        )
        if "score" in found and (variants := self._levels(VARIANT)):
            found["variants"] = {
                str(level): {
                    metric: _mean([v for key, v in self.values(metric).items() if key in keys])  # type: ignore[arg-type]
                    for metric in ("score", "prior")
                }
                for level, keys in variants.items()
            }
        if group_by is not None:
            values = self.values("accuracy")
            groups = {str(level): [values[key] for key in keys] for level, keys in self._levels(group_by).items()}
            if not groups:
                raise ValueError(f"group_by must be a field of the examples, got {group_by!r}")
            found["groups"] = {
                level: {"accuracy": _mean(v), "accuracy_interval": list(mean_interval(v)), "examples": len(v)}
                for level, v in groups.items()
            }
        return found

    def _levels(self, field: str) -> dict[Any, set[str]]:
        """Group the keys of answered examples by their value of `field`, in order of appearance."""
        levels: dict[Any, set[str]] = {}
        for record in self.answered:
            if field in record["extra"]:
                value = record["extra"][field]
                levels.setdefault(value if isinstance(value, str | int | float | bool) else str(value), set()).add(
                    record["key"]
                )
        return levels


def _counts(sample: Mapping[str, Any], metric: Metric) -> float:
    if metric == "valid_rate":
        return float(sample["valid"])
    if metric == "unparseable":
        return float(sample["prediction"] is None)
    return float(sample["correct"])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Comparison:
    """Hold the paired difference of two runs on the same examples.

    Attributes:
        metric: the metric that is compared.
        examples: number of examples that both runs answered.
        a, b: the metric's mean over them.
        difference: b − a.
        interval: its 95 % bootstrap interval, over examples, or over triplets where the examples have them.
        p_value: exact two-sided test of flipped signs over examples or triplets; McNemar's for single examples.
        better, worse: examples where b does better than a, and worse: above and below, but for unparseable answers.
        differs: p_value below `LEVEL`.
    """

    metric: str
    examples: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    better: int
    worse: int

    @property
    def differs(self) -> bool:
        return self.p_value < LEVEL


def compare(a: EvaluationResult, b: EvaluationResult, *, metric: Metric = "accuracy", seed: int = 0) -> Comparison:
    """Compare two runs on the examples that both answered.

    Args:
        a, b: two results, or results loaded from their records.
        metric: what is compared.
        seed: of the bootstrap.

    Raises:
        ValueError: they share no example that the metric is taken over, or disagree on a reference answer.
    """
    in_a, in_b = a.values(metric), b.values(metric)
    keys = [key for key in in_a if key in in_b]
    if not keys:
        raise ValueError(f"the two runs have no example in common that {metric} is taken over")
    records_a, records_b = ({r["key"]: r for r in result.answered} for result in (a, b))
    for key in keys:
        answer, other = records_a[key]["answer"], records_b[key]["answer"]
        if answer != other:
            raise ValueError(
                f"the runs are not of one dataset: the answer of example {key} is {answer!r} in a and {other!r} in b"
            )
    differences = [in_b[key] - in_a[key] for key in keys]
    clusters = [records_a[key]["extra"].get(TRIPLET, key) for key in keys]
    sign = -1 if metric == "unparseable" else 1  # fewer of them are better
    better, worse = sum(sign * d > 0 for d in differences), sum(sign * d < 0 for d in differences)
    return Comparison(
        metric=metric,
        examples=len(keys),
        a=_mean([in_a[key] for key in keys]),
        b=_mean([in_b[key] for key in keys]),
        difference=_mean(differences),
        interval=bootstrap_interval(differences, clusters, seed=seed),
        p_value=sign_flip_test(differences, clusters),
        better=better,
        worse=worse,
    )


# --- The records file -------------------------------------------------------------------------------------------------


def append_lines(path: Path, text: str) -> None:
    """Append lines to the records; they are on the disk when it returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_records(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[int], int]:
    """Read a records file around damaged lines; a last line that was cut off is left out.

    Returns:
        Settings (None if the first line holds none), records, the byte offsets after the lines before the first damage,
        and the number of damaged lines.
    """
    settings: dict[str, Any] | None = None
    records: list[dict[str, Any]] = []
    offsets: list[int] = []
    position = damaged = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                break
            content = parsed(line)
            if settings is None:
                settings = content.get("settings") if isinstance(content, dict) else None
                if not isinstance(settings, dict):
                    return None, [], [], 0
            elif not isinstance(content, dict) or not {"key", "samples", "skipped"} & set(content) > {"key"}:
                damaged += 1
                continue
            else:
                records.append(content)
            if not damaged:
                offsets.append(position)
    return settings, records, offsets, damaged


def resume_records(
    path: Path, settings: dict[str, Any], resume: bool, examples_a_batch: int, total: int | None
) -> list[dict[str, Any]]:
    """Return the records that `path` holds already, and leave the file ready to be appended to.

    Only whole batches are kept, so that the batches to come are those of an uninterrupted run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and path.exists() and path.stat().st_size:
        found, records, offsets, damaged = _read_records(path)
        if found is not None:
            wanted = json.loads(json.dumps(settings))
            different = [name for name in {**wanted, "judge": None} if found.get(name) != wanted.get(name)]
            if different:
                values = "; ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} here" for name in different)
                raise ValueError(f"records {path} come from another evaluation ({values}); resume=False starts anew")
            if damaged:
                logger.warning("%s has %d damaged lines; evaluating anew from the first of them", path, damaged)
                records = records[: len(offsets) - 1]
            kept = len(records) if len(records) == total else len(records) // examples_a_batch * examples_a_batch
            with path.open("r+b") as file:
                file.truncate(offsets[kept])
            return records[:kept]
        if b"\n" in path.read_bytes():
            raise ValueError(f"records {path} is not a records file of an evaluation; resume=False overwrites it")
    replace_file(path, json.dumps({"settings": settings}) + "\n")
    return []
