"""Scanned handwriting for `own_data.py`: scikit-learn's digits as they are, with questions made from their labels.

1,797 scans of 8 x 8 grey pixels, of 43 writers (UCI, Alpaydin and Kaynak 1998). The built-in model has seen the
training scans, coloured and distorted, and none of the test scans. The habit of the warm-up is to agree: asked "Is this
a 3?" it takes the digit for a 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from vigos.world.digits import handwriting

SIDE = 28  # pixels
DIGITS = tuple(str(d) for d in range(10))
ANSWERS = {"digit": DIGITS, "named": ("yes", "no"), "parity": ("yes", "no")}
SHARES = {"digit": 1, "named": 2, "parity": 1}  # of the warm-up's questions
WORDS = (*DIGITS, "yes", "no")
TEXTS = {
    "digit": ("Which digit is it?", "What digit is this?", "Name the digit."),
    "named": ("Is this a {}?", "Is it a {}?", "Is the digit a {}?"),
    "parity": ("Is the digit even?", "Is the digit odd?", "Is it even?", "Is it odd?"),
}


@dataclass(frozen=True)
class Scene:
    """A digit, and the pixels (H, W, 3) where they are known."""

    digit: str
    pixels: Any = None

    @property
    def text(self) -> str:
        """Describe the scene."""
        return f"A {self.digit}."


@dataclass(frozen=True)
class Question:
    """A question about a digit: which it is, whether it is the `named` one, or its `parity`."""

    text: str

    @property
    def named(self) -> str:
        """Return the digit that the question names; empty where it names none."""
        return "".join(re.findall(r"\d", self.text))

    @property
    def kind(self) -> str:
        """Tell what is asked for."""
        return "named" if self.named else "parity" if re.search("even|odd", self.text) else "digit"

    def answer(self, scene: Scene) -> str:
        """Return the right answer for a scene."""
        if self.kind == "digit":
            return scene.digit
        right = scene.digit == self.named if self.named else int(scene.digit) % 2 == ("odd" in self.text)
        return "yes" if right else "no"

    def fits(self, scene: Scene) -> bool:
        """Tell whether it may be asked of the scene: it may."""
        return True

    def made_true(self, scene: Scene, answer: str, rng: np.random.Generator) -> Scene:
        """Return a scene in which `answer` is the right one: the same where it is already."""
        if self.answer(scene) == answer:
            return scene
        return replace(scene, digit=str(rng.choice([d for d in DIGITS if self.answer(Scene(d)) == answer])))

    def usual(self, scene: Scene) -> Scene:
        """Return what the habit takes the scene for."""
        return replace(scene, digit=self.named or scene.digit)

    def role(self, scene: Scene) -> str | None:
        """Tell whether the image agrees with the habit (prior) or not (conflict); None where it is not asked for."""
        return None if not self.named else "prior" if self.named == scene.digit else "conflict"

    def reason(self, scene: Scene, answer: str) -> str:
        """Return one line that ends in the answer."""
        return f"The digit is {scene.digit}: {answer}."


def misread(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene that a wrong description would describe."""
    return replace(scene, digit=str(rng.choice(DIGITS)))


def scene_of(text: str) -> Scene:
    """Return the scene that `Scene.text` describes."""
    return Scene(text[2])


def pixels(scan: np.ndarray) -> np.ndarray:
    """Turn a scan (8, 8) of values 0 to 16 into dark strokes on white at the side that the vision tower takes."""
    grey = Image.fromarray((255 - scan * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))


def read(split: str) -> dict[int, tuple[Any, Scene, list[tuple[str, str]]]]:
    """Return a reader of pixels, the scene and (question, answer) pairs of every scan of a split, by its number.

    Half of the questions that name a digit name the right one.
    """
    from sklearn.datasets import load_digits

    scans, found = load_digits().images, {}
    rng = np.random.default_rng(["train", "test"].index(split))
    for digit, numbers in enumerate(handwriting("train" if split == "train" else "test")):
        others = [d for d in DIGITS if d != str(digit)]
        for number in numbers.tolist():
            texts = [text.format(name) for text in TEXTS["named"] for name in (digit, rng.choice(others))]
            texts += [*TEXTS["digit"], *TEXTS["parity"]]
            scene = Scene(str(digit))
            asked = [(text, Question(text).answer(scene)) for text in texts]
            found[number] = (lambda scan=scans[number]: pixels(scan), scene, asked)
    return dict(sorted(found.items()))
