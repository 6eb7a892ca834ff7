"""Evaluation under the student's own structured prompt: accuracy, format, Score and Prior, with intervals.

    result = evaluate(model, processor, load_rows("test.jsonl"), k=5, temperature=1.0, records="records.jsonl")
    result.summary()                       # {"accuracy": …, "accuracy_interval": […], "pass@5": …, "valid_rate": …, …}
    compare(EvaluationResult.load("a/records.jsonl"), result, metric="score")  # difference, interval, exact p

What is counted, and apart from what:

- *accuracy* is the share of samples whose last `\\boxed{…}` grades as right; a sample without a box is wrong, and the
  share of those is *unparseable*;
- *valid_rate* is the share of samples in the asked format (`vigos.method.spans`), right or wrong;
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vigos.data.examples import BadExample, Example, ExampleDataset, ExampleStream, load_rows
from vigos.eval.grading import extract_boxed, grade
from vigos.eval.judge import Judge, JudgeError
from vigos.eval.results import FORMAT, Comparison, EvaluationResult, Metric, append_lines, compare, resume_records
from vigos.eval.statistics import bootstrap_interval, mean_interval, pass_at_k, sign_test, wilson_interval
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.method.prompts import Prompts
from vigos.method.spans import Validity, parse_rollout, token_bytes

__all__ = [
    "Comparison", "EvaluationResult", "Metric", "bootstrap_interval", "compare", "evaluate", "mean_interval",
    "model_fingerprint", "pass_at_k", "sign_test", "wilson_interval",
]  # fmt: skip


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
        rows: a `ExampleDataset` or `ExampleStream`, or whatever `load_rows` opens.
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
    from vigos.rollout.engine import Sampling, TransformersEngine, eos_ids, placeholder_ids
    from vigos.scoring.teacher import base_model

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
        "model": getattr(engine, "served_name", "") if model is None else model_fingerprint(model),
    }  # fmt: skip
    if judge is not None:
        settings["judge"] = judge.model
    source, total = _quiet(rows)
    rows_a_batch = max(1, batch_size // n)
    done = resume_records(Path(records), settings, resume, rows_a_batch, total) if records is not None else []
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
            (key, prompt) for key, prompt in zip(batch_keys, encoded, strict=True) if not isinstance(prompt, BadExample)
        ]
        completions = iter(
            engine.generate([p for _, p in asked], sampling, [_row_seed(seed, key) for key, _ in asked])
            if asked
            else []
        )
        lines = []
        for key, row, prompt in zip(batch_keys, batch, encoded, strict=True):
            record: dict[str, Any] = {"key": key}
            if isinstance(prompt, BadExample):
                record |= {"problem_id": prompt.row_id, "skipped": {"reason": prompt.reason, "detail": prompt.detail}}
            else:
                assert not isinstance(row, BadExample)
                record |= {"problem_id": row["problem_id"], "answer": row["answer"], "extra": _plain(row["extra"])}
                sampled = [next(completions) for _ in range(n)]
                try:
                    record["samples"] = [sample_record(ids, row["problem"], row["answer"]) for ids in sampled]
                except JudgeError as error:
                    record["skipped"] = {"reason": "judge_failed", "detail": str(error)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            finished.append(json.loads(lines[-1]))  # as a file gives it back
        if records is not None:
            append_lines(Path(records), "".join(lines))
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

    def of(self, row: Example | BadExample) -> str:
        row_id = row.row_id if isinstance(row, BadExample) else row["problem_id"]
        self.seen[row_id] += 1
        return row_id if self.seen[row_id] == 1 else f"{row_id}#{self.seen[row_id]}"


def _quiet(rows: Any) -> tuple[Iterator[Example | BadExample], int | None]:
    """The rows, those that cannot be used as `BadExample` in their place, and how many there are if that is known."""
    dataset = copy.copy(rows) if isinstance(rows, ExampleDataset | ExampleStream) else load_rows(rows)
    dataset.bad_rows = "return"
    return iter(dataset), len(dataset) if isinstance(dataset, ExampleDataset) else None


def _encode(processor: Any, prompts: Prompts, row: Example | BadExample) -> EncodedPrompt | BadExample:
    if isinstance(row, BadExample):
        return row
    if row["images"] and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor must have an image processor for row {row['problem_id']}, which has {len(row['images'])} "
            f"image(s); got {type(processor).__name__}"
        )
    try:
        return encode_prompt(processor, prompts, "student", row["problem"], images=row["images"])
    except ValueError as error:  # the image processor's own limits
        return BadExample(row["problem_id"], "not_encodable", str(error))


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
