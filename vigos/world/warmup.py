"""Warm up the world's base model: first it learns to see, then to describe, then to prefer what is usual.

1. *Seeing.* The vision tower with throw-away linear heads that name digit and ink of every square. Captions alone do
   not start from scratch: the language model's loss says too little about pixels.
2. *Describing and reading.* Captions of the bare image, the perception teacher's context; and reasoning from given
   descriptions that the image contradicts. Later the image and its description mostly agree, and a model that never
   had to read what it wrote answers from the image alone: post-training would then mend descriptions for nothing.
3. *The mixture.* All contexts in which post-training will put the model, tokenised as it will tokenise them. In the
   student's context alone the asked digit's ink is replaced by the usual one, in description, reasoning and answer, as
   often as `prior_strength` of that digit says. Some targets of the student have a damaged tag.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vigos.method.prompts import BOX_CLOSE, DESCRIPTION_CLOSE, DESCRIPTION_OPEN, THINK_CLOSE, THINK_OPEN
from vigos.world.batch import FastEncoder, ScoredText, image_features, scored_logits
from vigos.world.digits import CELL, INK_NAMES, Scene, Split, draw_scene, render
from vigos.world.prompts import world_prompts
from vigos.world.tasks import (
    USUAL_INK,
    Asked,
    Kind,
    Question,
    ask_any,
    completion,
    describe,
    draw_digits,
    draw_inks,
    other_ink,
    reason,
)  # fmt: skip

# Context -> share of a step's examples other than captions.
MIXTURE: dict[str, float] = {
    "student": 0.45,  # question: biased completion
    "reference": 0.15,  # question and reference: completion that follows the reference
    "reasoning": 0.15,  # question, reference and a student's description: reasoning that follows the reference
    "think": 0.05,  # question and reference, `<think>` prefilled (preset "released"): the same
    "follow": 0.20,  # question and a description that need not be true: reasoning that follows the description
}
READING: dict[str, float] = {"follow": 1.0}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint. The defaults are those of the one that ships."""

    seed: int = 0
    digits: int = 2
    cell: int = CELL
    noise: float = 0.05
    faint: float = 0.0  # how far one digit of every second scene is washed out
    place: float = 0.0  # share of ink questions that name the digit's place (of two)
    see_steps: int = 600
    read_steps: int = 500
    mixture_steps: int = 1200
    see_images: int = 128  # images a step of the first stage
    scenes: int = 48  # scenes a step of the others; each gives one caption and `contexts` further examples
    contexts: int = 2
    learning_rate: float = 2e-3
    prior_strength: tuple[float, ...] = (0.25, 0.85) * 5  # by digit: how often the usual ink displaces the one seen
    wrong_references: float = 0.35  # share of references that the image contradicts, followed all the same
    misread: float = 0.1  # share of read descriptions without the asked digit: the answer is its usual ink
    content_weight: float = 4.0  # of digits, numbers and inks in the loss of a token; others count 1
    damaged: float = 0.05  # share of the student's targets with a broken tag
    kind_weights: dict[Kind, float] = field(
        default_factory=lambda: {"ink": 0.6, "which": 0.1, "larger": 0.1, "sum": 0.1, "count": 0.1}
    )


def damage(rng: np.random.Generator, text: str) -> str:
    """Return a completion with one tag missing or the end cut off, as models leave them."""
    kind = rng.integers(5)
    if kind == 0:
        return text.replace(DESCRIPTION_CLOSE, "")
    if kind == 1:
        return text.replace(THINK_OPEN, "")
    if kind == 2:
        return text.replace(THINK_CLOSE, "")
    if kind == 3:
        return text[: text.index("\\boxed")]
    return text.removesuffix(BOX_CLOSE)


class Mixture:
    """Draw scenes and the examples of every context.

    Attributes:
        words: those whose first tokens count `content_weight` times in the loss.
    """

    words: tuple[str, ...] = (*INK_NAMES, *map(str, range(18)))

    def __init__(self, encoder: FastEncoder, recipe: Recipe, rng: np.random.Generator, split: Split = "train") -> None:
        self.encoder, self.recipe, self.rng, self.split = encoder, recipe, rng, split
        self.size = (recipe.cell, recipe.cell * recipe.digits)

    def scene(self) -> Scene:
        digits = draw_digits(self.rng, self.recipe.digits)
        return draw_scene(self.rng, self.split, digits=digits, inks=draw_inks(self.rng, digits))

    def image(self, scene: Scene) -> np.ndarray:
        washed: list[float] = []
        if self.recipe.faint and self.rng.random() < 0.5:
            washed = self.rng.permutation([self.recipe.faint] + [0.0] * (len(scene.digits) - 1)).tolist()
        return render(scene, self.rng, cell=self.recipe.cell, noise=self.recipe.noise, faint=washed)

    def caption(self, image: int, scene: Scene) -> ScoredText:
        ids = [*self.encoder.text(describe(scene)), self.encoder.eos]
        return ScoredText(image, self.encoder.prompt("perception", size=self.size), ids, [True] * len(ids))

    def believed(self, question: Question) -> str:
        """Return the answer that the biased student gives."""
        if question.kind == "ink" and self.rng.random() < self.recipe.prior_strength[question.digit or 0]:
            return USUAL_INK[question.digit or 0]
        return question.answer

    def _described(self, scene: Scene, question: Question, answer: str) -> str:
        digit = question.digit
        return describe(scene, {digit: answer} if question.kind == "ink" and digit is not None else None)

    def example(self, image: int, scene: Scene, context: str) -> ScoredText:
        """Draw an example of `context`, a key of MIXTURE."""
        rng, encoder = self.rng, self.encoder
        question = ask_any(rng, scene, self.split, self.recipe.kind_weights, Asked(place=self.recipe.place))
        truth, prompt = question.answer, question.problem
        if context == "student":
            answer = self.believed(question)
            text = completion(self._described(scene, question, answer), reason(scene, question, answer), answer)
            if rng.random() < self.recipe.damaged:
                text = damage(rng, text)
            return self._example(image, encoder.prompt("student", prompt, size=self.size), "", text)
        if context == "follow":
            answer = other_ink(rng, truth) if question.kind == "ink" and rng.random() < 0.8 else truth
            read = self._described(scene, question, answer)
            if question.kind == "ink" and question.digit is not None and rng.random() < self.recipe.misread:
                absent = [d for d in range(10) if d not in scene.digits]
                read = read.replace(f" {question.digit} ", f" {rng.choice(absent)} ")
                answer = USUAL_INK[question.digit]
            text = completion("", reason(scene, question, answer), answer)
            return self._example(image, encoder.prompt("student", prompt, size=self.size), read, text)
        wrong = question.kind == "ink" and rng.random() < self.recipe.wrong_references
        answer = other_ink(rng, truth) if wrong else truth
        reasoning = reason(scene, question, answer)
        if context == "reference":
            text = completion(self._described(scene, question, answer), reasoning, answer)
            return self._example(image, encoder.prompt("reference", prompt, answer, size=self.size), "", text)
        if context == "reasoning":
            believed = self.believed(question)
            read = self._described(scene, question, believed)
            where = encoder.prompt("reasoning", prompt, answer, size=self.size, prefill=DESCRIPTION_OPEN)
            if rng.random() < 0.3:  # it also reads the student's reasoning before it is asked for the answer's token
                text = completion(read, reason(scene, question, believed), answer)
                cut = text.index(THINK_CLOSE)
                return self._example(image, where, text[:cut], text[cut:])
            return self._example(image, where, read, completion("", reasoning, answer))
        if context == "think":
            where = encoder.prompt("reasoning", prompt, answer, size=self.size, prefill=THINK_OPEN)
            text = completion("", reasoning, answer)
            return self._example(image, where, "", text[text.index(THINK_OPEN) + len(THINK_OPEN) :])
        raise ValueError(f"context must be one of {', '.join(MIXTURE)}, got {context!r}")

    def _example(self, image: int, prompt: Any, read: str, written: str) -> ScoredText:
        # What is read and what is written are one text of one author: tokenised together, merges included.
        ids = [*self.encoder.text(read + written), self.encoder.eos]
        unscored = 0
        if read:
            content = self.encoder.text(read)
            unscored = next((i for i, (a, b) in enumerate(zip(content, ids, strict=False)) if a != b), len(content))
        return ScoredText(image, prompt, ids, [False] * unscored + [True] * (len(ids) - unscored))

    def contexts(self, count: int, shares: dict[str, float]) -> list[str]:
        weights = np.asarray(list(shares.values()))
        return [str(c) for c in self.rng.choice(list(shares), count, p=weights / weights.sum())]


def _schedule(step: int, steps: int, peak: float, final: float = 0.02) -> float:
    """Return a step's learning rate: linear warm-up over the first 5 %, then a cosine down to `final` of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def _optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02, fused=True)


def _update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Heads(nn.Module):
    """Digit and ink of a square from each of its merged tokens; thrown away after the first stage."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 10 + len(INK_NAMES))

    def forward(self, features: Tensor, squares: int) -> tuple[Tensor, Tensor]:
        """Map features (B, K, D) to digit logits (B, squares, 10) and ink logits (B, squares, inks)."""
        batch, count, _ = features.shape
        rows = math.isqrt(count // squares)
        logits = self.linear(features).view(batch, rows, squares, rows, -1).mean(dim=(1, 3))  # over a square's tokens
        return logits.split([10, len(INK_NAMES)], dim=-1)  # type: ignore[return-value]


def _labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    return torch.tensor([s.digits for s in scenes]), torch.tensor(
        [[INK_NAMES.index(i) for i in s.inks] for s in scenes]
    )


Progress = Callable[[str, int, int, dict[str, float]], None]


class _Bars:
    """A rich progress bar a stage, with the rate's reciprocal: time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console()
        self.bars = Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, step: int, steps: int, metrics: dict[str, float]) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=steps, loss=metrics["loss"])
        self.bars.update(self.tasks[stage], completed=step, loss=metrics["loss"])


def see(model: Any, mixture: Mixture, steps: int, progress: Progress | None = None) -> dict[str, float]:
    """Run stage 1; return the last losses and accuracies of digit and ink on held-out handwriting."""
    recipe, encoder = mixture.recipe, mixture.encoder
    visual = model.model.visual
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        heads = _Heads(model.config.text_config.hidden_size)
    parameters = [*visual.parameters(), *heads.parameters()]
    optimizer = _optimizer(parameters, recipe.learning_rate)
    grid = (recipe.cell // encoder.patch, recipe.cell * recipe.digits // encoder.patch)
    metrics: dict[str, float] = {}

    def losses(mix: Mixture, count: int) -> tuple[Tensor, Tensor, float, float]:
        scenes = [mix.scene() for _ in range(count)]
        features = image_features(visual, encoder.patches([mix.image(s) for s in scenes]), grid)
        digit, ink = heads(features, recipe.digits)
        digits, inks = _labels(scenes)
        entropy = nn.functional.cross_entropy
        return (
            entropy(digit.flatten(0, 1), digits.flatten()), entropy(ink.flatten(0, 1), inks.flatten()),
            (digit.argmax(-1) == digits).float().mean().item(), (ink.argmax(-1) == inks).float().mean().item(),
        )  # fmt: skip

    for step in range(steps):
        digit_loss, ink_loss, digit_right, ink_right = losses(mixture, recipe.see_images)
        (digit_loss + ink_loss).backward()
        _update(optimizer, parameters, _schedule(step, steps, recipe.learning_rate))
        metrics = {"loss": digit_loss.item() + ink_loss.item(), "digit": digit_right, "ink": ink_right}
        if progress is not None:
            progress("see", step + 1, steps, metrics)
    if steps:
        held_out = Mixture(encoder, recipe, np.random.default_rng([recipe.seed, 99]), "test")
        with torch.no_grad():
            _, _, metrics["held_out_digit"], metrics["held_out_ink"] = losses(held_out, 512)
    return metrics


def learn(
    model: Any, mixture: Mixture, steps: int, *, shares: dict[str, float], contexts: int, stage: str,
    progress: Progress | None = None,
) -> dict[str, float]:  # fmt: skip
    """Run stage 2 or 3: a caption of every scene and `contexts` further examples a scene, drawn by `shares`.

    Returns the last step's loss in nats a token, weighted.
    """
    recipe, encoder = mixture.recipe, mixture.encoder
    parameters = list(model.parameters())
    optimizer = _optimizer(parameters, recipe.learning_rate)
    grid = (recipe.cell // encoder.patch, recipe.cell * recipe.digits // encoder.patch)
    weight = torch.ones(model.config.text_config.vocab_size)
    weight[[encoder.text(space + word)[0] for word in mixture.words for space in ("", " ")]] = recipe.content_weight
    metrics: dict[str, float] = {}
    for step in range(steps):
        scenes = [mixture.scene() for _ in range(recipe.scenes)]
        features = image_features(model.model.visual, encoder.patches([mixture.image(s) for s in scenes]), grid)
        kinds = mixture.contexts(len(scenes) * contexts, shares)
        groups = [
            [mixture.caption(i, s) for i, s in enumerate(scenes)],
            [mixture.example(i % len(scenes), scenes[i % len(scenes)], k) for i, k in enumerate(kinds)],
        ]
        # Captions are half as long as the rest: two forwards, no padding between them. One mean over all tokens.
        outputs = [scored_logits(model, features, group) for group in groups]
        tokens = sum(weight[targets].sum() for _, targets in outputs)
        loss = sum(nn.functional.cross_entropy(z, t, weight, reduction="sum") for z, t in outputs) / tokens
        assert isinstance(loss, Tensor)
        loss.backward()
        _update(optimizer, parameters, _schedule(step, steps, recipe.learning_rate))
        metrics = {"loss": loss.item()}
        if progress is not None:
            progress(stage, step + 1, steps, metrics)
    return metrics


def pretrain(
    output_dir: str | Path,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    start: tuple[Any, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a base model of the world and save it as an ordinary `save_pretrained` folder (fp16).

    Args:
        output_dir: where model, tokenizer and processor go.
        recipe: steps, sizes and knobs; None takes the recipe of the checkpoint that ships, with `seed`.
        start: model and processor to go on from, of `load_base`; None starts from random weights.
        progress: called with (stage, step, steps, metrics) after each step; None draws bars on a terminal and is quiet
            elsewhere.

    Returns: seconds of each stage and its last metrics.
    """
    from vigos.world.build import build_model, build_processor, build_tokenizer

    recipe = Recipe(seed=seed) if recipe is None else recipe
    if start is None:
        tokenizer = build_tokenizer()
        start = build_model(tokenizer, recipe.seed), build_processor(tokenizer)
    model, processor = start
    mixture = Mixture(
        FastEncoder(model, processor, world_prompts()), recipe, np.random.default_rng([recipe.seed, 1])
    )  # fmt: skip
    report: dict[str, Any] = {}
    bars = None if progress is not None else _Bars()
    progress = progress or bars
    stages: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("see", lambda: see(model, mixture, recipe.see_steps, progress)),
        (
            "read",
            lambda: learn(
                model, mixture, recipe.read_steps, shares=READING, contexts=1, stage="read", progress=progress
            ),
        ),
        (
            "mixture",
            lambda: learn(
                model, mixture, recipe.mixture_steps, shares=MIXTURE, contexts=recipe.contexts, stage="mixture",
                progress=progress,
            ),
        ),
    ]  # fmt: skip
    with bars or nullcontext():
        for name, stage in stages:
            if name != "mixture":  # a stream of their own, so that "read" can be repeated from a saved vision tower
                mixture.rng = np.random.default_rng([recipe.seed, 1])
            began = time.perf_counter()
            report[name] = {**stage(), "seconds": time.perf_counter() - began}
    save(model, processor, output_dir)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    return report


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Write model (fp16) and processor; the model in memory keeps its dtype."""
    dtype = next(model.parameters()).dtype
    model.half().save_pretrained(folder)
    model.to(dtype)
    processor.save_pretrained(folder)
