"""Measure how much accuracy depends on the image: remove it, blur it, or swap it for another example's.

    intact, found = probe(model, processor, load_rows("test.jsonl"), folder="probes", temperature=1.0)
    found["swapped"].comparison.difference     # how much accuracy the right image is worth

A model that answers as well without the image does not look at it. The questions, the prompts and the random numbers of
every sample are those of the intact evaluation, so that the difference is paired example by example.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vigos.data.examples import BadExample, Example, ExampleDataset, ExampleStream
from vigos.data.images import BadImage
from vigos.eval.config import EvalConfig
from vigos.eval.evaluate import evaluate
from vigos.eval.results import Comparison, EvaluationResult, compare
from vigos.method.views import BadView, View

if TYPE_CHECKING:
    from PIL.Image import Image

Probe = Literal["removed", "blurred", "swapped"]
PROBES: tuple[Probe, ...] = get_args(Probe)

BLUR = 0.15  # standard deviation of the blur, as a share of the image's shorter side: a few patches remain
TRIES = 64  # examples looked at for another image; an image that shows another answer is preferred


@dataclass(frozen=True)
class Probed:
    """Hold one probe's result; `comparison` is probe − intact, so a grounded model has a negative difference."""

    result: EvaluationResult
    comparison: Comparison


class ProbedExamples(ExampleDataset):
    """Read the examples of a dataset with their images removed, blurred or swapped, and nothing else changed.

    Args:
        examples: read by number, since a swapped image comes from somewhere else in the file.
        probe: what happens to the images. "removed" leaves a prompt of text alone.
        view: what happens to them in place of a probe, see `vigos.method.views`.
        seed: of the swaps, and of views. An example gets the images of one with as many of them, and with another
            answer if one of the first `TRIES` drawn has one. Without any such example it is a `BadExample`.
    """

    def __init__(
        self, examples: ExampleDataset, probe: Probe | None, *, view: View | None = None, seed: int = 0
    ) -> None:
        if view is None and probe not in PROBES:
            raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {probe!r}")
        super().__init__(examples.records, examples.reader, examples.bad_examples)
        self.probe, self.view, self.seed = probe, view, seed

    def __getitem__(self, index: int) -> Example:
        example: Any = super().__getitem__(index)
        if isinstance(example, BadExample) or not example["images"]:
            return example
        if self.view is not None:
            return self._viewed(index % len(self), example, self.view)
        if self.probe == "removed":
            return example | {"images": []}
        if self.probe == "blurred":
            return example | {"images": [blurred(image) for image in example["images"]]}
        images = self._others(index % len(self), example)
        if images is not None:
            return example | {"images": images}
        detail = f"no other example has {len(example['images'])} image(s) to swap in"
        return self._bad(BadExample(example["problem_id"], "no_other_image", detail))

    def _viewed(self, index: int, example: Example, view: View) -> Example:
        seed, load = f"{self.seed}/{example['problem_id']}", self.reader.images.load
        others = self._others(index, example) if view.kind == "other" else None
        try:
            return example | {"images": view(example["images"], example["extra"], seed=seed, others=others, load=load)}
        except (BadView, BadImage) as error:
            return self._bad(BadExample(example["problem_id"], error.reason, str(error)))

    def _bad(self, bad: BadExample) -> Example:
        if self.bad_examples == "return":
            return bad  # type: ignore[return-value]
        raise bad

    def _others(self, index: int, example: Example) -> list[Image] | None:
        """Return the images of an example with another answer, else of any with as many images."""
        rng = random.Random(f"{self.seed}/{example['problem_id']}")
        candidates = rng.sample(range(len(self)), min(len(self), TRIES))
        spare: list[Image] | None = None
        for other in candidates:
            if other == index:
                continue
            try:
                found: Any = super().__getitem__(other)
            except BadExample:
                continue
            if isinstance(found, BadExample) or len(found["images"]) != len(example["images"]):
                continue
            if found["answer"] != example["answer"]:
                return found["images"]
            spare = spare or found["images"]
        return spare


def blurred(image: Image) -> Image:
    """Blur with a Gaussian whose standard deviation is `BLUR` of the shorter side."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def probe(
    model: Any,
    processor: Any,
    examples: ExampleDataset | ExampleStream,
    config: EvalConfig | None = None,
    *,
    probes: Sequence[Probe] = PROBES,
    views: Mapping[str, View] | None = None,
    folder: str | Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    **options: Any,
) -> tuple[EvaluationResult, dict[str, Probed]]:
    """Evaluate a model on examples as they are, then under each probe; return the intact result and the probes'.

    Args:
        examples: from `load_rows`, not a stream.
        config: as in `evaluate`; its seed also draws the swaps.
        views: further probes by their names, such as what the teachers of a run see.
        folder: gets `intact.jsonl` and `<probe>.jsonl`; a probe that was stopped goes on where it stopped.
        progress: called with (name, examples done, examples in all).
        options: further arguments of `evaluate`: prompts, engine, judge, or fields of `EvalConfig`.
    """
    if not isinstance(examples, ExampleDataset):
        raise ValueError(
            f"examples must be an ExampleDataset from load_rows (not a stream), got {type(examples).__name__}"
        )
    for name in probes:
        if name not in PROBES:
            raise ValueError(f"probes must be among {', '.join(PROBES)}, got {name!r}")
    seed = options.get("seed", (config or EvalConfig()).seed)

    def run(name: str, data: ExampleDataset) -> EvaluationResult:
        records = None if folder is None else Path(folder) / f"{name}.jsonl"
        tick = None if progress is None else lambda done, total: progress(name, done, total)
        return evaluate(model, processor, data, config, records=records, progress=tick, **options)

    intact = run("intact", examples)
    found: dict[str, Probed] = {}
    changed: dict[str, ProbedExamples] = {name: ProbedExamples(examples, name, seed=seed) for name in probes}
    for role, view in (views or {}).items():
        changed[role] = ProbedExamples(examples, None, view=view, seed=seed)
    for title, probed in changed.items():
        result = run(title, probed)
        found[title] = Probed(result, compare(intact, result))
    return intact, found


def summarise(intact: EvaluationResult, probes: Mapping[str, Probed]) -> dict[str, Any]:
    """Return accuracies with intervals and each probe's paired difference from the intact images, ready for JSON."""
    found: dict[str, Any] = {"intact": _short(intact)}
    for name, probed in probes.items():
        c = probed.comparison
        found[name] = _short(probed.result) | {
            "difference": c.difference, "difference_interval": list(c.interval), "p_value": c.p_value,
            "examples": c.examples,
        }  # fmt: skip
    return found


def _short(result: EvaluationResult) -> dict[str, Any]:
    summary = result.summary()
    names = [f"{name}{end}" for name in ("accuracy", "score", "prior", "valid_rate") for end in ("", "_interval")]
    return {name: summary[name] for name in names if name in summary}
