"""Evaluation under the student's own structured prompt: accuracy, format, Score and Prior, with intervals.

    result = evaluate(model, processor, load_rows("test.jsonl"), k=5, temperature=1.0, records="records.jsonl")
    result.summary()                       # {"accuracy": …, "accuracy_interval": […], "pass@5": …, "valid_rate": …, …}
    compare(EvaluationResult.load("a/records.jsonl"), result, metric="score")  # difference, interval, exact p

What is counted, and apart from what:

- *accuracy* is the share of samples whose last `\\boxed{…}` grades as right; a sample without a box is wrong, and the
  share of those is *unparseable*;
- *valid_rate* is the share of samples in the asked format (`vigos.spans`), right or wrong;
- *score* and *prior* are accuracies over the rows of a paired set that contradict and that agree with a prior: those
  whose field `role` is "conflict" or "prior". `variant` (ViLP: "F" states the prior in the question, "P" does not)
  splits them further, `triplet` says which rows belong together;
- rows that could not be used are in none of these; `skipped` counts them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vigos.data import BadRow, Row, RowDataset, RowStream, load_rows
from vigos.grading import extract_boxed, grade
from vigos.judge import Judge, JudgeError
from vigos.prompts import Prompts
from vigos.sequences import EncodedPrompt, encode_prompt
from vigos.spans import Validity, parse_rollout, token_bytes

FORMAT = 1  # of the records file
Metric = Literal["accuracy", "score", "prior", "valid_rate", "unparseable"]

# Two runs are compared in every metric at once; so that a false alarm in any of them is rarer than 5 %.
LEVEL = 0.05 / len(get_args(Metric))

ROLE, CONFLICT, PRIOR, TRIPLET, VARIANT = "role", "conflict", "prior", "triplet", "variant"


# --- Statistics -------------------------------------------------------------------------------------------------------


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


# --- Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found, row by row.

    Attributes:
        settings: what the samples depend on: seed, sampling, prompts, model.
        records: one for each row, in order: key, problem_id, answer, extra and `samples`, a list of {text, prediction,
            correct, valid, reason, finished, tokens}; for a row that could not be used `skipped` {reason, detail}.
    """

    settings: dict[str, Any]
    records: list[dict[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Reads a records file; a line cut off by a kill is left out."""
        settings, records, _ = _read_records(Path(path))
        if settings is None:
            raise ValueError(f"{path} is not a records file of an evaluation: its first line holds no settings")
        return cls(settings, records)

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The records of rows that could be used."""
        return [r for r in self.records if "samples" in r]

    def check_same_prompt(self, other: EvaluationResult) -> None:
        """Raises ValueError unless both were asked with the same prompts, sampling and judge."""
        for name in ("prompts", "sampling", "judge"):
            mine, theirs = self.settings.get(name), other.settings.get(name)
            if mine != theirs:
                raise ValueError(f"baseline must be asked the same way: {name} {mine!r} there, {theirs!r} here")

    def rows_of(self, metric: Metric) -> list[dict[str, Any]]:
        """The records that a metric is taken over."""
        role = {"score": CONFLICT, "prior": PRIOR}.get(metric)
        return [r for r in self.answered if role is None or r["extra"].get(ROLE) == role]

    def values(self, metric: Metric) -> dict[str, float]:
        """Mean over the samples of each row the metric is taken over, by the row's key."""
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        return {r["key"]: _mean([_counts(s, metric) for s in r["samples"]]) for r in self.rows_of(metric)}

    def summary(self, by: str | None = None) -> dict[str, Any]:
        """Shares in [0, 1]; beside each, under `<name>_interval`, its 95 % interval over rows.

        Args:
            by: a field of the rows; adds `groups`, the accuracy and its interval for each of the field's values.
        """
        n, k = self.settings["n"], self.settings["k"]
        answered = self.answered
        samples = [s for r in answered for s in r["samples"]]
        found: dict[str, Any] = {"rows": len(answered), "samples": n, "skipped": len(self.records) - len(answered)}

        def report(name: str, values: list[float]) -> None:
            found[name] = _mean(values)
            found[f"{name}_interval"] = list(mean_interval(values))

        report("accuracy", list(self.values("accuracy").values()))
        if n > 1:
            report(f"pass@{k}", [pass_at_k(n, sum(s["correct"] for s in r["samples"]), k) for r in answered])
            found[f"avg@{n}"] = found["accuracy"]
        for metric in ("score", "prior"):
            values = self.values(metric)
            if values:
                report(metric, list(values.values()))
                found[f"{metric}_rows"] = len(values)
        report("valid_rate", list(self.values("valid_rate").values()))
        report("unparseable", list(self.values("unparseable").values()))
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
        if by is not None:
            values = self.values("accuracy")
            groups = {str(level): [values[key] for key in keys] for level, keys in self._levels(by).items()}
            if not groups:
                raise ValueError(f"by must be a field of the rows, got {by!r}")
            found["groups"] = {
                level: {"accuracy": _mean(v), "accuracy_interval": list(mean_interval(v)), "rows": len(v)}
                for level, v in groups.items()
            }
        return found

    def _levels(self, field: str) -> dict[Any, set[str]]:
        """Keys of the answered rows by their value of `field`, in order of appearance."""
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
    """Two runs on the same rows. `difference` is b − a.

    Attributes:
        interval: 95 % bootstrap interval of the difference, over rows, or over triplets where the rows have them.
        p_value: exact two-sided sign test on the rows where they differ; with one sample a row, McNemar's test.
        better, worse: rows where b is above a, and below.
        differs: p_value below `LEVEL`.
    """

    metric: str
    rows: int
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
    """Paired comparison on the rows that both runs answered.

    Raises:
        ValueError: they share no row that the metric is taken over, or disagree on a row's reference answer.
    """
    in_a, in_b = a.values(metric), b.values(metric)
    keys = [key for key in in_a if key in in_b]
    if not keys:
        raise ValueError(f"the two runs have no row in common that {metric} is taken over")
    records_a, records_b = ({r["key"]: r for r in result.answered} for result in (a, b))
    for key in keys:
        if records_a[key]["answer"] != records_b[key]["answer"]:
            raise ValueError(
                f"the two runs are not of one dataset: the answer of row {key} is {records_a[key]['answer']!r} in a "
                f"and {records_b[key]['answer']!r} in b"
            )
    differences = [in_b[key] - in_a[key] for key in keys]
    clusters = [records_a[key]["extra"].get(TRIPLET, key) for key in keys]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        metric=metric,
        rows=len(keys),
        a=_mean([in_a[key] for key in keys]),
        b=_mean([in_b[key] for key in keys]),
        difference=_mean(differences),
        interval=bootstrap_interval(differences, clusters, seed=seed),
        p_value=sign_test(better, worse),
        better=better,
        worse=worse,
    )


# --- Evaluating -------------------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module | None,
    processor: Any,
    rows: Any,
    *,
    prompts: Prompts | None = None,
    k: int = 1,
    n: int | None = None,
    engine: Any = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
    validity: Validity = "loose",
    records: str | Path | None = None,
    resume: bool = True,
    grader: Callable[[str | None, str], bool] = grade,
    judge: Judge | None = None,
    eos_token_ids: Sequence[int] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> EvaluationResult:
    """Samples answers to every row under the student's prompt, and grades them.

    Every sample has a random stream of its own, which follows from `seed` and the row's id: neither the batch size (up
    to rounding) nor the other rows change it, and two models are compared under the same random numbers.

    Args:
        model: None where `engine` holds the model.
        processor: a transformers processor, or a tokenizer for a text-only model.
        rows: a `RowDataset` or `RowStream`, or whatever `load_rows` opens.
        prompts: default `Prompts()`; only the student's is used.
        k, n: `n` samples a row (default k) give pass@k and avg@n. More than one need a temperature.
        engine: a `RolloutEngine`; None: `TransformersEngine` on `model`.
        max_new_tokens: of a completion; one that is cut there is "unfinished".
        batch_size: sequences generated together.
        records: a file that gets one JSON line a row as it is finished. If it exists, an evaluation that was stopped
            goes on where it stopped; one with other settings, another model or other rows is refused.
        resume: False writes `records` anew.
        grader: (content of the last box or None, reference answer) → right or not.
        judge: asked about boxes that `grader` calls wrong. A row of which it could not judge a sample is skipped, as
            "judge_failed".
        eos_token_ids: ids that end a completion; None takes them from the engine or the model.
        progress: called with (rows done, rows in all or None) after every batch.
    """
    from vigos.rollout import Sampling, TransformersEngine, eos_ids, placeholder_ids
    from vigos.scoring import base_model

    n = k if n is None else n
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and n = {n}, got {k}")
    if n > 1 and temperature == 0:
        raise ValueError(f"temperature must be above 0 for {n} samples a row: at 0 they are all the same")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model is None and engine is None:
        raise ValueError("model must be given where there is no engine, got None for both")
    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, n)
    prompts = prompts or Prompts()
    engine = engine or TransformersEngine.for_model(model, processor, batch_size=batch_size)  # type: ignore[arg-type]
    tokenizer = getattr(processor, "tokenizer", processor)
    base = None if model is None else base_model(model)
    if eos_token_ids is None:
        eos_token_ids = getattr(engine, "eos_token_ids", None) or eos_ids(base, tokenizer)
    image_token_ids = placeholder_ids(base.config) if base is not None else ()

    settings = {
        "format": FORMAT, "k": k, "n": n, "seed": seed, "validity": validity, "batch_size": batch_size,
        "sampling": dataclasses.asdict(sampling), "prompts": _digest(json.dumps(dataclasses.asdict(prompts))),
        "model": "" if model is None else model_fingerprint(model),
    }  # fmt: skip
    if judge is not None:
        settings["judge"] = judge.model
    source, total = _quiet(rows)
    rows_a_batch = max(1, batch_size // n)
    done = _resume(Path(records), settings, resume, rows_a_batch, total) if records is not None else []
    finished = list(done)
    keys = _KeyMaker()
    for offset, past in enumerate(done):  # the rows that were done before must be the rows that come now
        known = next(source, None)
        now = None if known is None else keys.of(known)
        if now != past["key"]:
            raise ValueError(
                f"records {records} belong to other rows: row {offset} is {past['key']!r} there and {now!r} here; "
                "resume=False starts anew"
            )

    def sample_record(ids: Tensor, problem: str, answer: str) -> dict[str, Any]:
        spans = parse_rollout(
            ids, tokenizer, validity=validity, eos_token_ids=eos_token_ids, image_token_ids=image_token_ids
        )
        content = ids[: spans.length - spans.finished].tolist()
        text = b"".join(token_bytes(content, tokenizer)).decode("utf-8", "replace")
        prediction = extract_boxed(text)
        correct = grader(prediction, answer)
        if judge is not None and prediction is not None and not correct:
            correct = judge(problem, answer, prediction)
        return {
            "text": text, "prediction": prediction, "correct": correct, "valid": spans.valid,
            "reason": spans.reason, "finished": spans.finished, "tokens": spans.length,
        }  # fmt: skip

    while batch := list(islice(source, rows_a_batch)):
        batch_keys = [keys.of(row) for row in batch]
        encoded = [_encode(processor, prompts, row) for row in batch]
        asked = [
            (key, prompt) for key, prompt in zip(batch_keys, encoded, strict=True) if not isinstance(prompt, BadRow)
        ]
        completions = iter(
            engine.generate([p for _, p in asked], sampling, [_row_seed(seed, key) for key, _ in asked])
            if asked
            else []
        )
        lines = []
        for key, row, prompt in zip(batch_keys, batch, encoded, strict=True):
            record: dict[str, Any] = {"key": key}
            if isinstance(prompt, BadRow):
                record |= {"problem_id": prompt.row_id, "skipped": {"reason": prompt.reason, "detail": prompt.detail}}
            else:
                assert not isinstance(row, BadRow)
                record |= {"problem_id": row["problem_id"], "answer": row["answer"], "extra": _plain(row["extra"])}
                sampled = [next(completions) for _ in range(n)]
                try:
                    record["samples"] = [sample_record(ids, row["problem"], row["answer"]) for ids in sampled]
                except JudgeError as error:
                    record["skipped"] = {"reason": "judge_failed", "detail": str(error)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            finished.append(json.loads(lines[-1]))  # as a file gives it back
        if records is not None:
            _append(Path(records), "".join(lines))
        if progress is not None:
            progress(len(finished), total)
    result = EvaluationResult(json.loads(json.dumps(settings)), finished)
    if not result.answered:
        reasons = Counter(r["skipped"]["reason"] for r in finished)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "there are none"
        raise ValueError(f"rows: none of the {len(finished)} rows could be used ({why})")
    return result


def model_fingerprint(model: nn.Module) -> str:
    """Differs between models that differ: shapes, dtypes and 64 spread-out values of each parameter."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _row_seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big") >> 1


class _KeyMaker:
    """Names rows by their id; the second row of the same id is `id#2`."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def of(self, row: Row | BadRow) -> str:
        row_id = row.row_id if isinstance(row, BadRow) else row["problem_id"]
        self.seen[row_id] += 1
        return row_id if self.seen[row_id] == 1 else f"{row_id}#{self.seen[row_id]}"


def _quiet(rows: Any) -> tuple[Iterator[Row | BadRow], int | None]:
    """The rows, those that cannot be used as `BadRow` in their place, and how many there are if that is known."""
    dataset = copy.copy(rows) if isinstance(rows, RowDataset | RowStream) else load_rows(rows)
    dataset.bad_rows = "return"
    return iter(dataset), len(dataset) if isinstance(dataset, RowDataset) else None


def _encode(processor: Any, prompts: Prompts, row: Row | BadRow) -> EncodedPrompt | BadRow:
    if isinstance(row, BadRow):
        return row
    if row["images"] and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor must have an image processor for row {row['problem_id']}, which has {len(row['images'])} "
            f"image(s); got {type(processor).__name__}"
        )
    try:
        return encode_prompt(processor, prompts, "student", row["problem"], images=row["images"])
    except ValueError as error:  # the image processor's own limits
        return BadRow(row["problem_id"], "not_encodable", str(error))


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that JSON can hold and that are short: what rows are grouped by, not what they weigh."""
    kept = {}
    for name, value in extra.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):  # images, bytes, dates
            continue
        if len(text) <= 256:
            kept[name] = value
    return kept


# --- The records file -------------------------------------------------------------------------------------------------


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_records(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], list[int]]:
    """(settings or None, records, byte offset after the settings and after each record); a cut line is left out."""
    settings: dict[str, Any] | None = None
    records: list[dict[str, Any]] = []
    offsets: list[int] = []
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                break
            if settings is None:
                settings = content.get("settings") if isinstance(content, dict) else None
                if settings is None:
                    break
            else:
                records.append(content)
            offsets.append(position)
    return settings, records, offsets


def _resume(
    path: Path, settings: dict[str, Any], resume: bool, rows_a_batch: int, total: int | None
) -> list[dict[str, Any]]:
    """The records that stand in `path` already; the file is left with those alone, ready to be appended to.

    Only whole batches are kept, so that the batches to come are those of an uninterrupted run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and path.exists() and path.stat().st_size:
        found, records, offsets = _read_records(path)
        if found is not None:
            wanted = json.loads(json.dumps(settings))
            different = [name for name in {**wanted, "judge": None} if found.get(name) != wanted.get(name)]
            if different:
                values = "; ".join(f"{name} {found.get(name)!r} there, {wanted.get(name)!r} here" for name in different)
                raise ValueError(f"records {path} come from another evaluation ({values}); resume=False starts anew")
            kept = len(records) if len(records) == total else len(records) // rows_a_batch * rows_a_batch
            with path.open("r+b") as file:
                file.truncate(offsets[kept])
            return records[:kept]
        if b"\n" in path.read_bytes():
            raise ValueError(f"records {path} is not a records file of an evaluation; resume=False overwrites it")
    path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    return []
