"""Evaluate a model under the student's structured prompt: accuracy, format, Score and Prior, with intervals.

    result = evaluate(model, processor, load_rows("test.jsonl"), k=5, temperature=1.0, records="records.jsonl")
    result.summary()                       # {"accuracy": …, "accuracy_interval": […], "pass@5": …, "valid_rate": …, …}
    compare(EvaluationResult.load("a/records.jsonl"), result, metric="score")  # difference, interval, exact p

Metrics:

- *accuracy*: the share of samples whose last `\\boxed{…}` grades as right; a sample without a box is wrong, and the
  share of those is *unparseable*;
- *valid_rate*: the share of samples in the format that `vigos.method.spans` parses, right or wrong;
- *score* and *prior*: accuracies over the examples of a paired set that contradict and that agree with a prior: those
  whose field `role` is "conflict" or "prior". `variant` (ViLP: "F" states the prior in the question, "P" does not)
  splits them further, `triplet` says which examples belong together;
- examples that could not be used are in none of these; `skipped` counts them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vigos.data.examples import BadExample, Example, ExampleDataset, ExampleStream, load_rows
from vigos.eval.config import EvalConfig
from vigos.eval.grading import grade, hints
from vigos.eval.judge import Judge, JudgeError
from vigos.eval.results import FORMAT, EvaluationResult, append_lines, resume_records
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.method.prompts import Prompts
from vigos.method.spans import Validity, parse_rollout, token_bytes


def evaluate(
    model: nn.Module | None,
    processor: Any,
    examples: Any,
    config: EvalConfig | None = None,
    *,
    prompts: Prompts | None = None,
    engine: Any = None,
    eos_token_ids: Sequence[int] | None = None,
    records: str | Path | None = None,
    grader: Callable[[str | None, str], bool] | None = None,
    judge: Judge | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> EvaluationResult:
    """Sample answers to every example under the student's prompt, and grade them.

    Args:
        model: a transformers model; None where `engine` holds it.
        processor: a transformers processor, or a tokenizer for a text-only model.
        examples: an `ExampleDataset` or `ExampleStream`, or whatever `load_rows` opens.
        config: how answers are sampled and counted.
        prompts: default `Prompts()`; only the student's is used.
        engine: a `RolloutEngine`; None: `TransformersEngine` on `model`.
        eos_token_ids: ids that end a completion; None takes them from the engine or the model.
        records: a file that gets one JSON line an example as it is finished. If it exists, an evaluation that was
            stopped goes on where it stopped; one with other settings, another model or other examples is refused.
        grader: (content of the last box or None, reference answer) → right or not; None: `vigos.eval.grading.grade`
            with the example's options, accepted answers and precision.
        judge: asked about boxes that `grader` calls wrong. An example of which it could not judge a sample is skipped,
            as "judge_failed".
        progress: called with (examples done, examples in all or None) after every batch.
        options: fields of `EvalConfig`, which replace those of `config`.

    Raises:
        ValueError: an option out of range, records of another evaluation, or no example that could be used.
    """
    from vigos.models.parts import base_model
    from vigos.rollout.engine import eos_ids, placeholder_ids
    from vigos.rollout.generate import TransformersEngine

    config = dataclasses.replace(config or EvalConfig(), **options)
    if model is None and engine is None:
        raise ValueError("model must be given where there is no engine, got None for both")
    sampling, prompts = config.sampling(), prompts or Prompts()
    engine = engine or TransformersEngine.for_model(model, processor, batch_size=config.batch_size)  # type: ignore[arg-type]
    tokenizer = getattr(processor, "tokenizer", processor)
    base = None if model is None else base_model(model)
    if eos_token_ids is None:
        eos_token_ids = engine.eos_token_ids or eos_ids(base, tokenizer)
    image_token_ids = placeholder_ids(base.config) if base is not None else ()

    validity: Validity = config.validity or "loose"
    settings = {
        "format": FORMAT, "k": config.k, "n": sampling.n, "seed": config.seed, "validity": validity,
        "max_prompt_length": config.max_prompt_length,
        "batch_size": config.batch_size, "sampling": dataclasses.asdict(sampling),
        "prompts": hashlib.blake2b(json.dumps(dataclasses.asdict(prompts)).encode(), digest_size=8).hexdigest(),
        "model": engine.served_name if model is None else model_fingerprint(model),
    }  # fmt: skip
    if judge is not None:
        settings["judge"] = judge.model
    source, total = _with_bad_examples(examples)
    batch_examples = max(1, config.batch_size // sampling.n)
    path = None if records is None else Path(records)
    finished = resume_records(path, settings, config.resume, batch_examples, total) if path is not None else []
    keys = _KeyMaker()
    for offset, past in enumerate(finished):  # the examples that were done before must be those that come now
        example = next(source, None)
        key = None if example is None else keys.next_key(example)
        if key != past["key"]:
            raise ValueError(
                f"records {records} belong to other examples: example {offset} is {past['key']!r} there and {key!r} "
                "here; resume=False starts anew"
            )

    def sample_record(ids: Tensor, problem: str, answer: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        spans = parse_rollout(
            ids, tokenizer, validity=validity, eos_token_ids=eos_token_ids, image_token_ids=image_token_ids
        )
        content = ids[: spans.length - spans.finished].tolist()
        text = b"".join(token_bytes(content, tokenizer)).decode("utf-8", "replace")
        prediction = spans.answer_text
        if grader is None:
            correct = grade(prediction, answer, **hints(problem, extra))
        else:
            correct = grader(prediction, answer)
        if judge is not None and prediction is not None and not correct:
            correct = judge(problem, answer, prediction)
        return {
            "text": text, "prediction": prediction, "correct": correct, "valid": spans.valid,
            "reason": spans.reason, "finished": spans.finished, "tokens": spans.length,
        }  # fmt: skip

    while batch := list(islice(source, batch_examples)):
        batch_keys = [keys.next_key(example) for example in batch]
        encoded = [_encode(processor, prompts, example, config.max_prompt_length) for example in batch]
        usable = [(k, p) for k, p in zip(batch_keys, encoded, strict=True) if not isinstance(p, BadExample)]
        seeds = [_example_seed(config.seed, key) for key, _ in usable]
        completions = iter(engine.generate([p for _, p in usable], sampling, seeds) if usable else [])
        lines = []
        for key, example, prompt in zip(batch_keys, batch, encoded, strict=True):
            record: dict[str, Any] = {"key": key}
            if isinstance(prompt, BadExample):
                record |= {
                    "problem_id": prompt.example_id,
                    "skipped": {"reason": prompt.reason, "detail": prompt.detail},
                }
            else:
                assert not isinstance(example, BadExample)
                record |= {name: example[name] for name in ("problem_id", "answer", "problem")}  # type: ignore[literal-required]
                record["images"] = example.get("image_paths", [None] * len(example["images"]))
                record["extra"] = _short_fields(example["extra"])
                sampled = [next(completions) for _ in range(sampling.n)]
                asked = example["problem"], example["answer"], example["extra"]
                try:
                    record["samples"] = [sample_record(ids, *asked) for ids in sampled]
                except JudgeError as error:
                    record["skipped"] = {"reason": "judge_failed", "detail": str(error)}
            text = json.dumps(record, ensure_ascii=False)
            lines.append(_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text) + "\n")
            finished.append(json.loads(lines[-1]))  # as a file gives it back
        if path is not None:
            append_lines(path, "".join(lines))
        if progress is not None:
            progress(len(finished), total)
    result = EvaluationResult(json.loads(json.dumps(settings)), finished)
    if not result.answered:
        reasons = Counter(r["skipped"]["reason"] for r in finished)
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()) or "there are none"
        raise ValueError(f"examples: none of the {len(finished)} could be used ({why})")
    return result


def model_fingerprint(model: nn.Module) -> str:
    """Digest the shapes, dtypes and 64 spread-out values of each parameter, to tell models apart."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


_SURROGATE = re.compile("[\ud800-\udfff]")  # UTF-8 cannot hold it, JSON can


def _example_seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big") >> 1


class _KeyMaker:
    """Name examples by their id; the second example of the same id is `id#2`."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def next_key(self, example: Example | BadExample) -> str:
        name = example.example_id if isinstance(example, BadExample) else example["problem_id"]
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}#{self.seen[name]}"


def _with_bad_examples(examples: Any) -> tuple[Iterator[Example | BadExample], int | None]:
    """Iterate over the examples, a `BadExample` in place of each that cannot be used; also their number, if known."""
    dataset = copy.copy(examples) if isinstance(examples, ExampleDataset | ExampleStream) else load_rows(examples)
    dataset.bad_examples = "return"
    return iter(dataset), len(dataset) if isinstance(dataset, ExampleDataset) else None


def _encode(processor: Any, prompts: Prompts, example: Example | BadExample, limit: int) -> EncodedPrompt | BadExample:
    if isinstance(example, BadExample):
        return example
    images = example["images"]
    if images and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"processor must have an image processor for example {example['problem_id']}, which has {len(images)} "
            f"image(s); got {type(processor).__name__}"
        )
    try:
        example["problem"].encode()  # a lone surrogate is a TypeError of the tokenizer's
        encoded = encode_prompt(processor, prompts, "student", example["problem"], images=images)
    except ValueError as error:  # the image processor's own limits
        return BadExample(example["problem_id"], "not_encodable", str(error))
    if 0 < limit < len(encoded.ids):
        return BadExample(example["problem_id"], "prompt_too_long", f"{len(encoded.ids)} tokens, more than {limit}")
    return encoded


def _short_fields(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the fields that JSON can hold in 256 characters: what examples are grouped by, without images."""
    kept = {}
    for name, value in extra.items():
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):  # images, bytes, dates
            continue
        if len(text) <= 256:
            kept[name] = value
    return kept
