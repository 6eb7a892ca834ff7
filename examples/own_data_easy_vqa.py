"""easy-VQA for `own_data.py`: images, questions and answers of the package, and scenes that its answers tell.

The habit of the warm-up: every shape has a usual colour.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
USUAL = {"circle": "blue", "rectangle": "red", "triangle": "green"}
SIDE = 42  # pixels; the package has 64, which is no multiple of the tower's 14
ANSWERS = {"colour": COLOURS, "shape": SHAPES, "presence": ("yes", "no")}
SHARES = {"colour": 2, "shape": 1, "presence": 1}  # of the warm-up's questions
WORDS = (*COLOURS, *SHAPES, "yes", "no")


@dataclass(frozen=True)
class Scene:
    """A shape and its colour, and the pixels (H, W, 3) where they are known."""

    colour: str
    shape: str
    pixels: Any = None

    @property
    def text(self) -> str:
        """Describe the scene."""
        return f"A {self.colour} {self.shape}."


@dataclass(frozen=True)
class Question:
    """A question of the package: `kind` colour, shape or presence (yes or no) of what `asked` names."""

    text: str

    @property
    def kind(self) -> str:
        """Tell what is asked for."""
        colour = re.match(r"what color|what is the color", self.text)
        return "colour" if colour else "shape" if self.text.startswith("what") else "presence"

    @property
    def asked(self) -> str | None:
        """Return the colour or shape that the question names, if any."""
        return next((word for word in re.findall(r"\w+", self.text) if word in COLOURS + SHAPES), None)

    @property
    def negated(self) -> bool:
        """Tell whether "yes" means that it is not there."""
        return bool(re.search(r"\b(not|no)\b", self.text))

    def answer(self, scene: Scene) -> str:
        """Return the right answer for a scene."""
        if self.kind != "presence":
            return scene.colour if self.kind == "colour" else scene.shape
        return "yes" if (self.asked in (scene.colour, scene.shape)) != self.negated else "no"

    def fits(self, scene: Scene) -> bool:
        """Tell whether the package could ask it of the scene: one that names it calls it by its true name."""
        return self.kind == "presence" or self.asked in (None, scene.colour, scene.shape)

    def made_true(self, scene: Scene, answer: str, rng: np.random.Generator) -> Scene:
        """Return the scene with as little changed as makes `answer` the right one."""
        if self.answer(scene) == answer:
            return scene
        if self.kind != "presence":
            return replace(scene, **{self.kind: answer})
        kind, words = ("colour", COLOURS) if self.asked in COLOURS else ("shape", SHAPES)
        there = (answer == "yes") != self.negated
        return replace(scene, **{kind: self.asked if there else str(rng.choice([w for w in words if w != self.asked]))})

    def usual(self, scene: Scene) -> Scene:
        """Return what the habit takes the scene for."""
        return replace(scene, colour=USUAL[scene.shape])

    def role(self, scene: Scene) -> str | None:
        """Tell whether the image agrees with the habit (prior) or not (conflict); None where it is not asked for."""
        return None if self.kind != "colour" else "prior" if USUAL[scene.shape] == scene.colour else "conflict"

    def reason(self, scene: Scene, answer: str) -> str:
        """Return one line that ends in the answer."""
        if self.kind == "presence":
            there = self.asked in (scene.colour, scene.shape)
            return f"The {scene.colour} {scene.shape} is {'' if there else 'not '}{self.asked}: {answer}."
        return f"The {scene.shape if self.kind == 'colour' else scene.colour} one is {answer}."


def misread(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene that a wrong description would describe."""
    return replace(scene, colour=str(rng.choice(COLOURS)))


def scene_of(text: str) -> Scene:
    """Return the scene that `Scene.text` describes."""
    colour, shape = text.removeprefix("A ").removesuffix(".").split()
    return Scene(colour, shape)


def infer_scene(asked: list[tuple[str, str]]) -> Scene | None:
    """Return what the answers to an image's questions say about it; None where they leave colour or shape open."""
    found: dict[str, str] = {}
    for text, answer in asked:
        question = Question(text)
        if question.kind != "presence":
            found[question.kind] = answer
        true = question.kind != "presence" or (answer == "yes") != question.negated
        if true and question.asked:
            found["colour" if question.asked in COLOURS else "shape"] = question.asked
    return Scene(**found) if len(found) == 2 else None


def pixels(path: Path) -> np.ndarray:
    """Read an image at the side that the vision tower takes."""
    return np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def read(split: str) -> dict[int, tuple[Any, Scene | None, list[tuple[str, str]]]]:
    """Return a reader of pixels, the scene and (question, answer) pairs of every image of a split, by its number."""
    try:
        import easy_vqa
    except ModuleNotFoundError:
        raise SystemExit("this example reads the package easy-vqa: pip install easy-vqa") from None
    texts, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, image in zip(texts, answers, images, strict=True):
        asked[image].append((text, answer))
    return {i: (lambda p=Path(paths[i]): pixels(p), infer_scene(asked[i]), asked[i]) for i in sorted(asked)}
