"""`RunFolder`: the files of a run.

    config.yaml                       every option as it ran, the library's own first
    metrics.jsonl                     one line for each log: the step and every metric
    completions/step-000012.jsonl     rollouts: text, spans, validity and its reason, per-token divergence by teacher
    completions/images/               the images they were shown, made small
    skipped.jsonl                     examples that could not be used: id, reason, detail
    faults/step-000012.jsonl          rollouts of steps with a loss or gradient that was not finite
    profile/                          a trace and a table of where time went (`profile`)
    checkpoint-12/                    transformers' checkpoints, complete or not there (vigos.train.checkpoint)
    adapter/, merged/                 the final adapter, and the model with the adapter added (a copy)
    model/                            the final model, after full fine-tuning

Lines are written whole and flushed, so that a killed run leaves readable files. A resumed run cuts off what the
checkpoint it starts from has not seen.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigos.train.checkpoint import SAVING

if TYPE_CHECKING:
    from vigos.data.examples import BadExample
    from vigos.train.config import ViGOSConfig


class RunFolder:
    """Write the files of a run.

    Args:
        path: the run's `output_dir`.
        rank: of this process; rank 0 writes what all ranks share.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path, self.rank = Path(path), rank

    def write_config(self, config: ViGOSConfig, **facts: Any) -> None:
        """Write `config.yaml`: the options of ViGOS, those inherited from transformers, and `facts` about the run."""
        if self.rank != 0:
            return
        import yaml

        values = config.to_dict()  # secrets are masked in it
        ours = [f.name for f in fields(config) if f.name in type(config).__annotations__ and f.name in values]
        document = {
            "vigos": {name: plain(values[name]) for name in ours},
            "transformers": {name: plain(v) for name, v in values.items() if name not in ours},
            "run": {name: plain(v) for name, v in facts.items()},
        }
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def cut_after(self, step: int) -> None:
        """Delete the records of later steps than `step`, which the run starts from; all of them at 0."""
        if self.rank != 0:
            return
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file():
            kept = [line for line in _lines(metrics) if _step_of(line) <= step > 0]
            metrics.write_text("".join(kept), encoding="utf-8")
        shutil.rmtree(self.path / SAVING, ignore_errors=True)  # of a process that was killed while it saved
        skipped = self.path / "skipped.jsonl"
        if skipped.is_file():  # steps count from 0 there: the one under way
            kept = [line for line in _lines(skipped) if _step_of(line) < step]
            skipped.write_text("".join(kept), encoding="utf-8") if kept else skipped.unlink()
        for path in sorted((self.path / "completions").glob("step-*.jsonl")):
            if int(path.stem.split("-")[1]) > step:
                path.unlink()
        if step == 0:
            shutil.rmtree(self.path / "faults", ignore_errors=True)

    def write_metrics(self, step: int, logs: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.rank == 0:
            self._append("metrics.jsonl", [{"step": step, **logs}])

    def write_skipped(self, step: int, bad: BadExample) -> None:
        """Append an example that was left out to `skipped.jsonl`."""
        self._append(
            "skipped.jsonl", [{"step": step, "example": bad.example_id, "reason": bad.reason, "detail": bad.detail}]
        )

    def write_completions(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Append the records of a step's rollouts on this rank to `completions/`."""
        if records:
            self._append(f"completions/{self._name(step)}", records)

    def write_fault(self, step: int, records: Sequence[dict[str, Any]]) -> Path:
        """Append the rollouts of a step whose gradients were thrown away to `faults/`; return the file."""
        self._append(f"faults/{self._name(step)}", records)
        return self.path / "faults" / self._name(step)

    def write_images(self, images: Sequence[Any], side: int) -> list[str]:
        """Write images under `completions/`, each once; return their paths from there.

        Args:
            side: the longest side in pixels, to which larger ones are shrunk; smaller ones are kept exactly. 0: none.
        """
        return [self._write_image(image, side) for image in images] if side else []

    def _write_image(self, image: Any, side: int) -> str:
        exact = max(image.size) <= side
        if not exact:
            image = image.copy()
            image.thumbnail((side, side))
        key = hashlib.blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=12).hexdigest()
        name = f"images/{key}.{'png' if exact else 'webp'}"
        path = self.path / "completions" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{self.rank}.part")  # ranks may meet the same image
            image.save(part, format="PNG" if exact else "WEBP", quality=80)
            part.replace(path)
        return name

    def _name(self, step: int) -> str:
        return f"step-{step:06d}" + (f"-rank{self.rank}" if self.rank else "") + ".jsonl"

    def _append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)


def _lines(path: Path) -> list[str]:
    """Return the complete lines: the last one of a killed process may not be."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"metrics.jsonl must hold one JSON object with a step a line, got {line[:80]!r}") from error


def plain(value: Any) -> Any:
    """Return a value as JSON and YAML can hold it: they know no tensors, enums, paths or infinities."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
