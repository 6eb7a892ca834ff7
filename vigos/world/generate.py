"""Write the world to disk as a user would bring it: PNG images and a JSONL file of questions."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vigos.system.files import replace_file
from vigos.world.digits import SPLITS, Scene, draw_scene, render
from vigos.world.tasks import KINDS, USUAL_INK, Asked, Kind, Question, ask_any, draw_digits, draw_inks, triplet

# Questions of a training file: mostly inks, because that is where the prior lives.
KIND_WEIGHTS: dict[Kind, float] = {"ink": 0.6, "which": 0.1, "larger": 0.1, "sum": 0.1, "count": 0.1}


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return value


def write_world(
    folder: str | Path,
    split: str = "train",
    n: int = 1000,
    seed: int = 0,
    *,
    triplets: bool | None = None,
    digits: int | tuple[int, int] = 2,
    noise: float = 0.05,
    conflict: float = 0.5,
    label_bias: float = 0.0,
    asked: Asked = Asked(),  # noqa: B008 (frozen)
    kind_weights: dict[Kind, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `<folder>/<split>.jsonl` and `<folder>/images/<split>-*.png`; return the path of the JSONL file.

    Over an older world of the same split it never mixes the two, whenever it is killed: an image's name tells its
    pixels, the lines are replaced at once, and the images that only older lines named go last.

    Each line has the fields problem, images (paths relative to the file), answer and problem_id, and for those who
    look further kind, digits and inks. Lines of triplets add triplet, variant ("F" or "P") and role ("prior" for the
    image that agrees with the usual ink, "conflict" for the two that do not).

    Args:
        split: "train" or "test"; they share neither handwriting nor wordings.
        n: questions, or triplets of three questions each.
        seed: the same seed and knobs write the same bytes.
        triplets: True or False; None writes triplets for the test split and independent questions for training.
        digits: digits an image, or the least and the most of them (2 to 4).
        noise: pixel noise and variation of the inks, as a share of the full range.
        conflict: how many of the digits in independent questions have another ink than their usual one: the lower,
            the stronger the shortcut.
        label_bias: how many of the ink questions carry the usual ink as their reference whatever the image shows.
        asked: how the digit that an ink question is about is shown and named.
        kind_weights: relative frequency of the kinds of questions (independent questions only).
        progress: called with (written, total) after each image.
    """
    name = next((known for known in SPLITS if known == split), None)
    if name is None:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    _share("conflict", conflict)
    _share("label_bias", label_bias)
    least, most = (digits, digits) if isinstance(digits, int) else digits
    if not 2 <= least <= most <= 4:
        raise ValueError(f"digits must lie between 2 and 4, got {digits}")
    if asked.place and most > 2:
        raise ValueError(f"digits must be 2 where questions name a place, got {digits}")
    weights = KIND_WEIGHTS if kind_weights is None else kind_weights
    if unknown := set(weights) - set(KINDS):
        raise ValueError(f"kind_weights must name kinds among {', '.join(KINDS)}, got {sorted(unknown)}")
    triplets = split == "test" if triplets is None else triplets

    rng = np.random.default_rng([seed, SPLITS.index(name), int(triplets)])
    items: list[tuple[Scene, Question, dict[str, Any]]] = []
    for index in range(n):
        count = int(rng.integers(least, most + 1))
        if triplets:
            by_place = asked.by_place(rng)
            variant = "P" if by_place else "FP"[index % 2]
            scenes, questions = triplet(rng, name, count=count, variant=variant, place=by_place)  # type: ignore[arg-type]
            for position, (scene, question) in enumerate(zip(scenes, questions, strict=True)):
                role = "conflict" if position else "prior"
                items.append((scene, question, {"triplet": index, "variant": variant, "role": role}))
        else:
            shown = draw_digits(rng, count)
            scene = draw_scene(rng, name, digits=shown, inks=draw_inks(rng, shown, conflict))
            items.append((scene, ask_any(rng, scene, name, weights, asked), {}))

    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    from PIL import Image

    # Written to a temporary folder and moved when complete: a reader, or a rank that writes the same, never meets half
    # a file.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temporary:
        part = Path(temporary)
        (part / "images").mkdir()
        rows, files = [], []
        for index, (scene, question, extra) in enumerate(items):
            pixels = render(scene, rng, noise=noise, faint=asked.washed(scene, question))
            image = f"images/{split}-{index:05d}-{hashlib.blake2b(pixels.tobytes(), digest_size=4).hexdigest()}.png"
            Image.fromarray(pixels).save(part / image)
            answer = question.answer
            if question.kind == "ink" and rng.random() < label_bias:
                assert question.digit is not None
                answer = USUAL_INK[question.digit]
            row = {
                "problem": question.problem, "images": [image], "answer": answer,
                "problem_id": f"{split}-{index:05d}", "kind": question.kind, "digits": scene.digits,
                "inks": scene.inks, **extra,
            }  # fmt: skip
            rows.append(json.dumps(row) + "\n")
            files.append(image)
            if progress is not None:
                progress(index + 1, len(items))
        for file in files:
            (part / file).replace(folder / file)
        replace_file(folder / f"{split}.jsonl", "".join(rows))
    for path in {*folder.glob(f"images/{split}-*.png")} - {folder / file for file in files}:
        path.unlink(missing_ok=True)
    return folder / f"{split}.jsonl"
