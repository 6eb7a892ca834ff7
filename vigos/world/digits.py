"""Scenes of real handwritten digits, each written in an ink of its own, as small RGB images.

The handwriting is the UCI set that scikit-learn ships: 1,797 digits of 8 x 8 pixels with values 0 to 16. A fixed
quarter of every class is held out: its strokes appear in test images only. A digit is drawn into a square cell after a
random shift, scale and rotation; an image is a row of cells, read from left to right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from vigos.system.extras import install

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

INKS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "orange": (250, 140, 10),
    "purple": (140, 50, 170),
}
INK_NAMES = tuple(INKS)

CELL = 28  # pixels a side; two patches of the vision tower's merged grid, each of two 7-pixel patches
_HELD_OUT = 0.25
_SPLIT_SEED = 20260619  # fixed: no caller may move a test digit into training
_MARGIN = 3  # empty pixels around the 8 x 8 bitmap, so that a rotated stroke is not cut


@dataclass(frozen=True)
class Scene:
    """Digits written from left to right (all different), the ink of each, and the handwriting of each."""

    digits: tuple[int, ...]
    inks: tuple[str, ...]
    glyphs: tuple[int, ...]  # row of the handwriting set

    def ink_of(self, digit: int) -> str:
        return self.inks[self.digits.index(digit)]


@lru_cache(maxsize=1)
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """Load all bitmaps (1797, 14, 14) uint8 with an empty margin, and their classes (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the built-in world needs scikit-learn: {install('demo')}") from error
    data = load_digits()
    bitmaps = np.pad(data.images * (255.0 / 16.0), ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    return bitmaps.round().astype(np.uint8), data.target.astype(np.int64)


@lru_cache(maxsize=2)
def handwriting(split: Split) -> tuple[np.ndarray, ...]:
    """Return for each digit 0 to 9 the rows of the handwriting set that `split` may use. The splits share none."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    classes = _handwriting()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    rows = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(classes == digit))
        held_out = round(len(members) * _HELD_OUT)
        rows.append(np.sort(members[:held_out] if split == "test" else members[held_out:]))
    return tuple(rows)


def draw_scene(
    rng: np.random.Generator, split: Split, *, digits: tuple[int, ...], inks: tuple[str, ...]
) -> Scene:  # fmt: skip
    """Pick somebody's handwriting from `split` for digits and inks that were chosen already."""
    rows = handwriting(split)
    return Scene(tuple(digits), tuple(inks), tuple(int(rng.choice(rows[digit])) for digit in digits))


def render(
    scene: Scene, rng: np.random.Generator, *, cell: int = CELL, noise: float = 0.05, faint: Sequence[float] = ()
) -> np.ndarray:
    """Render the scene as an image (cell, cell * len(digits), 3) uint8.

    Args:
        cell: side of a digit's square in pixels, at least 8.
        noise: standard deviation of Gaussian pixel noise and of the inks' own variation, in units of the full range.
        faint: how far each digit's ink is washed out, 0 (not) to 1 (white); empty: none is.
    """
    from PIL import Image

    if cell < 8:
        raise ValueError(f"cell must be at least 8 pixels, got {cell}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must lie between 0 and 1, got {noise}")
    bitmaps = _handwriting()[0]
    middle = bitmaps.shape[1] / 2
    canvas = np.ones((cell, cell * len(scene.digits), 3))
    for position, (ink, glyph) in enumerate(zip(scene.inks, scene.glyphs, strict=True)):
        angle = rng.uniform(-0.26, 0.26)  # 15 degrees: more, and a 1 or a 7 becomes another digit
        scale_x, scale_y = rng.uniform(0.75, 1.0, 2) * (cell / 8)
        shift_x, shift_y = rng.uniform(-0.08, 0.08, 2) * cell
        cos, sin = math.cos(angle), math.sin(angle)
        a, b, d, e = cos / scale_x, sin / scale_x, -sin / scale_y, cos / scale_y
        centre_x, centre_y = cell / 2 + shift_x, cell / 2 + shift_y
        affine = (a, b, middle - a * centre_x - b * centre_y, d, e, middle - d * centre_x - e * centre_y)
        bitmap = Image.fromarray(bitmaps[glyph]).transform(
            (cell, cell), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
        )
        strokes = np.clip(np.asarray(bitmap, dtype=np.float64) / 255.0 * 1.6 - 0.3, 0.0, 1.0)[..., None]
        colour = np.clip(np.asarray(INKS[ink]) / 255.0 + rng.normal(0.0, noise, 3), 0.0, 1.0)
        if faint:
            colour = colour + faint[position] * (1 - colour)
        square = canvas[:, position * cell : (position + 1) * cell]
        square += strokes * (colour - square)
    if noise:
        canvas += rng.normal(0.0, noise, canvas.shape)
    return (np.clip(canvas, 0.0, 1.0) * 255.0).round().astype(np.uint8)
