"""The evaluations of a run: found in its folder, and the held-out questions whose answers training turned."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vigos.eval.results import EvaluationResult
from vigos.system.files import parsed

FACTS = "evaluation.json"  # model, adapter, data and its folder: written by `vigos eval` beside its records
SHOWN = 8  # flipped questions a direction
_SIDE = 240  # pixels
_CHARACTERS = 2000


@dataclass(frozen=True)
class Found:
    """Evaluations of the untrained and of the trained model, and the folder that their images lie in."""

    before: EvaluationResult | None = None
    after: EvaluationResult | None = None
    images: Path | None = None


def find_evaluations(outer: Path, inner: Path, model: Any) -> Found:
    """Return the demo's evaluations, or the newest of `vigos eval` in folders under the run's.

    Args:
        outer, inner: the demo's folder and the run's, or twice the run's.
        model: of the run. An evaluation of it without an adapter is the one before; one of weights in the run's folder
            is the one after.
    """
    places = [outer, inner, *([outer.parent] if outer.name == "train" else [])]
    named = [next((p / name for p in places if (p / name).is_file()), None) for name in ("before.jsonl", "after.jsonl")]
    if any(named):
        before, after = (EvaluationResult.load(path) if path else None for path in named)
        return Found(before, after, next((p / "world" for p in places if (p / "world").is_dir()), None))
    found = {path.parent for place in places[:2] for path in place.glob("*/records.jsonl")}
    before_, after_, images = None, None, None
    for folder in sorted(found, key=lambda path: (path / "records.jsonl").stat().st_mtime):
        facts = _facts(folder)
        weights = str(facts.get("adapter") or facts.get("model"))
        if Path(weights).resolve().is_relative_to(inner.resolve()):
            after_ = folder
        elif not facts.get("adapter") and weights == str(model):
            before_ = folder
        else:
            continue
        images = Path(str(facts["data_root"])) if facts.get("data_root") else images
    before, after = (EvaluationResult.load(folder) if folder else None for folder in (before_, after_))
    return Found(before, after, images)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    facts = parsed(path.read_bytes()) if path.is_file() else None
    return facts if isinstance(facts, dict) else {}


def flipped(found: Found) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, questions) of those that became right and of those that became wrong, as far as there are any.

    A question: problem, reference, said (before and after, each text, prediction, right), images as data addresses.
    """
    if found.before is None or found.after is None:
        return []
    before = {r["key"]: r for r in found.before.answered}
    turned: dict[bool, list[tuple[float, dict[str, Any], dict[str, Any]]]] = {True: [], False: []}
    for record in found.after.answered:
        if (old := before.get(record["key"])) is not None and old["answer"] == record["answer"]:
            change = _share(record) - _share(old)
            if change:
                turned[change > 0].append((abs(change), old, record))
    sections = []
    for better, words in ((True, "became right"), (False, "became wrong")):
        largest = sorted(turned[better], key=lambda entry: -entry[0])
        if largest:
            shown = [_question(old, new, better, found.images) for _, old, new in largest[:SHOWN]]
            count = f"{len(largest)} {words}" + (f", {SHOWN} of them here" if len(largest) > SHOWN else "")
            sections.append((count, shown))
    return sections


def _share(record: Mapping[str, Any]) -> float:
    return sum(bool(s["correct"]) for s in record["samples"]) / max(1, len(record["samples"]))


def _question(old: Mapping[str, Any], new: Mapping[str, Any], better: bool, images: Path | None) -> dict[str, Any]:
    said = []
    for name, record, right in (("before", old, not better), ("after", new, better)):
        sample = next((s for s in record["samples"] if bool(s["correct"]) == right), record["samples"][0])
        said.append(
            {"when": name, "right": bool(sample["correct"]), "text": str(sample["text"])[:_CHARACTERS],
             "prediction": str(sample["prediction"])[:_CHARACTERS] if sample["prediction"] is not None else "no answer"}
        )  # fmt: skip
    return {
        "id": str(new.get("problem_id", new["key"])), "problem": str(new.get("problem", ""))[:_CHARACTERS],
        "answer": str(new["answer"])[:_CHARACTERS], "said": said,
        "images": [src for name in (new.get("images") or [])[:2] if (src := _thumbnail(images, name))],
    }  # fmt: skip


def _thumbnail(folder: Path | None, name: Any) -> str | None:
    """Return a small copy of an image as a data address; None where it cannot be had."""
    from vigos.data.images import BadImage, ImageLoader

    if folder is None or not isinstance(name, str):
        return None
    try:
        image = ImageLoader(folder).load(name)
    except BadImage:
        return None
    image.thumbnail((_SIDE, _SIDE))
    image.save(buffer := io.BytesIO(), format="PNG" if max(image.size) < 100 else "WEBP")
    kind = "png" if max(image.size) < 100 else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
