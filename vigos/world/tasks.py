"""Questions about a scene, the prior's answers, and the texts that describe, reason and answer.

Every digit has a *usual* ink. Questions about an ink are where the prior competes with the image: a triplet asks one
question of three images, one that agrees with the usual ink and two that contradict it. The F variant of a question
states the usual fact first, the P variant does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vigos.world.digits import INK_NAMES, Scene, Split, draw_scene

Kind = Literal["ink", "which", "larger", "sum", "count"]
KINDS: tuple[Kind, ...] = ("ink", "which", "larger", "sum", "count")
Variant = Literal["F", "P"]

USUAL_INK: tuple[str, ...] = tuple(INK_NAMES[digit % len(INK_NAMES)] for digit in range(10))

WORDINGS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "ink": (
            "What ink is the {d}?", "Which color is the {d}?", "Name the ink of the {d}.", "Tell the color of the {d}.",
            "The {d} is written in which ink?", "What is the color of the {d}?", "In what color is the {d}?",
        ),
        "place": (
            "What ink is on the {p}?", "Which color is on the {p}?", "Name the ink on the {p}.",
            "The {p} digit is in which ink?",
        ),
        "which": (
            "Which digit is {i}?", "Name the {i} digit.", "What digit is written in {i}?", "Tell the digit in {i} ink.",
        ),
        "larger": (
            "Which digit is larger?", "Name the larger digit.", "What is the larger digit?",
            "Tell which digit is more.",
        ),
        "sum": (
            "What is the sum?", "Name the sum of the digits.", "Tell the sum.", "What is the sum of the digits?",
        ),
        "count": (
            "How many digits are {i}?", "Count the {i} digits.", "How many are in {i} ink?", "Tell how many are {i}.",
        ),
        "fact": ("The {d} is usually {i}.", "A {d} is usually in {i} ink.", "The usual color of the {d} is {i}.",
                 "Usually a {d} is {i}."),
    },
    "test": {
        "ink": ("What color is the {d}?", "Tell the ink of the {d}.", "In which ink is the {d} written?"),
        "place": ("What color is on the {p}?", "Tell the ink of the {p} digit."),
        "which": ("Tell which digit is {i}.", "What is the {i} digit?"),
        "larger": ("Tell the larger digit.", "What digit is larger?"),
        "sum": ("Tell the sum of the digits.", "Name the sum."),
        "count": ("How many are {i}?", "Count the digits in {i} ink."),
        "fact": ("Usually the {d} is {i}.", "The usual ink of the {d} is {i}."),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question about one scene. `digit` is the digit it is about, by name or by place (None: about none)."""

    kind: Kind
    problem: str
    answer: str
    digit: int | None = None
    ink: str | None = None


@dataclass(frozen=True)
class Asked:
    """Tell how the digit that an ink question is about is shown and named.

    Attributes:
        faint: how far its ink is washed out, 0 (not) to 1 (white).
        place: share of the questions that name its place (of two), and neither digit nor ink.
    """

    faint: float = 0.0
    place: float = 0.0

    def __post_init__(self) -> None:
        for name in ("faint", "place"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")

    def by_place(self, rng: np.random.Generator) -> bool:
        """Draw whether a question names a place; nothing is drawn where none does."""
        return bool(self.place) and bool(rng.random() < self.place)

    def washed(self, scene: Scene, question: Question) -> list[float]:
        """Return how far each digit of the scene is washed out."""
        return [self.faint if question.kind == "ink" and d == question.digit else 0.0 for d in scene.digits]


def draw_inks(rng: np.random.Generator, digits: tuple[int, ...], conflict: float | None = None) -> tuple[str, ...]:
    """Draw an ink for each digit: uniform, or with `conflict` the probability that it is not the digit's usual one."""
    if conflict is None:
        return tuple(str(ink) for ink in rng.choice(INK_NAMES, len(digits)))
    return tuple(other_ink(rng, USUAL_INK[digit]) if rng.random() < conflict else USUAL_INK[digit] for digit in digits)


def other_ink(rng: np.random.Generator, ink: str) -> str:
    return str(rng.choice([name for name in INK_NAMES if name != ink]))


def draw_digits(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Draw `count` different digits in random order."""
    return tuple(int(d) for d in rng.permutation(10)[:count])


def ask(
    rng: np.random.Generator, scene: Scene, kind: Kind, split: Split, *, digit: int | None = None,
    variant: Variant = "P", place: bool = False,
) -> Question:  # fmt: skip
    """Ask a question of `kind` about `scene`, worded as in `split`; `digit` fixes what an ink question is about.

    With `place` an ink question says "left" or "right" of two digits and names neither digit nor ink.
    """
    wordings = WORDINGS[split]
    ink: str | None = None
    if kind == "ink":
        digit = scene.digits[rng.integers(len(scene.digits))] if digit is None else digit
        answer = ink = scene.ink_of(digit)
    elif kind == "which":
        unique = [i for i in scene.inks if scene.inks.count(i) == 1]
        if not unique:
            raise ValueError(f"a question for the digit of an ink needs an ink used once, got {scene.inks}")
        ink = unique[rng.integers(len(unique))]
        digit = scene.digits[scene.inks.index(ink)]
        answer = str(digit)
    elif kind == "larger":
        answer = str(max(scene.digits))
    elif kind == "sum":
        answer = str(sum(scene.digits))
    elif kind == "count":
        # Half the time an ink that is there, so that zero is not the safe answer.
        ink = str(rng.choice(scene.inks if rng.random() < 0.6 else INK_NAMES))
        answer = str(scene.inks.count(ink))
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if place and (kind != "ink" or len(scene.digits) != 2):
        raise ValueError(f"place needs an ink question about two digits, got kind {kind!r} and {len(scene.digits)}")
    template = str(rng.choice(wordings["place" if place else kind]))
    problem = template.replace("{d}", str(digit)).replace("{i}", str(ink))
    if place:
        problem = problem.replace("{p}", "left" if digit == scene.digits[0] else "right")
    if variant == "F":
        if kind != "ink" or digit is None or place:
            raise ValueError(f"only ink questions that name a digit have an F variant, got kind {kind!r}")
        fact = str(rng.choice(wordings["fact"]))
        problem = fact.replace("{d}", str(digit)).replace("{i}", USUAL_INK[digit]) + " " + problem
    return Question(kind, problem, answer, digit, ink)


def ask_any(
    rng: np.random.Generator, scene: Scene, split: Split, weights: dict[Kind, float],
    asked: Asked = Asked(),
) -> Question:  # fmt: skip
    """Ask a question whose kind is drawn by `weights`; kinds that do not fit the scene give way to an ink question."""
    kinds = list(weights)
    probabilities = np.asarray([weights[kind] for kind in kinds], dtype=np.float64)
    kind = kinds[rng.choice(len(kinds), p=probabilities / probabilities.sum())]
    if kind == "which" and all(scene.inks.count(i) > 1 for i in scene.inks):
        kind = "ink"
    if kind == "ink" and asked.by_place(rng):
        return ask(rng, scene, kind, split, place=True)
    variant: Variant = "F" if kind == "ink" and rng.random() < 0.5 else "P"
    return ask(rng, scene, kind, split, variant=variant)


def triplet(
    rng: np.random.Generator, split: Split, *, count: int, variant: Variant, place: bool = False
) -> tuple[list[Scene], list[Question]]:  # fmt: skip
    """Draw three scenes of the same digits and one question: one scene agrees with the prior, two contradict it."""
    digits = draw_digits(rng, count)
    asked = digits[rng.integers(count)]
    first = other_ink(rng, USUAL_INK[asked])
    second = str(rng.choice([i for i in INK_NAMES if i not in (USUAL_INK[asked], first)]))
    scenes = []
    for ink in (USUAL_INK[asked], first, second):
        inks = tuple(ink if d == asked else i for d, i in zip(digits, draw_inks(rng, digits), strict=True))
        scenes.append(draw_scene(rng, split, digits=digits, inks=inks))
    question = ask(rng, scenes[0], "ink", split, digit=asked, variant=variant, place=place)
    return scenes, [Question("ink", question.problem, s.ink_of(asked), asked, s.ink_of(asked)) for s in scenes]


def describe(scene: Scene, override: dict[int, str] | None = None) -> str:
    """Describe the scene, every digit before its ink; `override` gives digits another ink than the image does.

    Each digit follows a space, so that it is the same token in descriptions, questions and reasoning.
    """
    override = override or {}
    parts = (f"a {d} in {override.get(d, i)}" for d, i in zip(scene.digits, scene.inks, strict=True))
    return ("A" + ", ".join(parts)[1:]) + "."


def reason(scene: Scene, question: Question, answer: str) -> str:
    """Return one line of reasoning that ends in `answer`, whether it is right or not."""
    if question.kind == "ink":
        return f"The {question.digit} is {answer}."
    if question.kind == "which":
        return f"In {question.ink} ink is the {answer}."
    if question.kind == "larger":
        return f"Of {' and '.join(map(str, scene.digits))} the larger is {answer}."
    if question.kind == "sum":
        return f"{' + '.join(map(str, scene.digits))} = {answer}."
    return f"Digits in {question.ink}: {answer}."


def completion(description: str, reasoning: str, answer: str) -> str:
    """Return the text that follows the prefilled `<description>`."""
    return f"{description}</description><think>{reasoning}</think>\\boxed{{{answer}}}"
