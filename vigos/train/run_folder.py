"""`RunFolder`: the files of a run.

    config.yaml                       every option as it ran, the library's own first
    metrics.jsonl                     one line for each log: the step and every metric
    completions/step-000012.jsonl     rollouts: text, spans, validity and its reason, per-token divergence by teacher
    completions/images/               the images they were shown, made small
    skipped.jsonl                     examples that could not be used: id, reason, detail
    faults/step-000012.jsonl          rollouts of steps with a loss or gradient that was not finite
    profile/                          a trace and a table of where time went (`profile`)
    checkpoint-12/                    transformers' checkpoints, complete or not there (vigos.train.checkpoint)
    aside/1/                          what an earlier run left, and checkpoints that this one does not go on from
    adapter/, merged/                 the final adapter, and the model with the adapter added (a copy)
    model/                            the final model, after full fine-tuning

Lines are written whole and flushed, so that a killed run leaves readable files. A resumed run cuts off what the
checkpoint it starts from has not seen.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigos.system.files import RUN, parsed, replace_file
from vigos.train.checkpoint import SAVING, checkpoints, run_id, set_aside, step_of

if TYPE_CHECKING:
    from vigos.data.examples import BadExample
    from vigos.train.config import ViGOSConfig

logger = logging.getLogger(__name__)


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
        replace_file(self.path / "config.yaml", yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def begin(self, config: ViGOSConfig, step: int, **facts: Any) -> None:
        """Write `config.yaml`, and clear the folder of what the checkpoint after `step` steps (0: none) has not seen.

        What another run left, and later checkpoints than the one that this run starts from, are moved to `aside/N`.

        Args:
            facts: about the run; `id` is its identity.
        """
        if self.rank != 0:
            return
        before = run_id(self.path)
        if step == 0 or before not in (None, facts.get("id")):
            names = [name for name in RUN if name not in (SAVING, "config.yaml")]
            earlier = sorted(path for name in names for path in self.path.glob(name))
        else:
            earlier = [path for path in checkpoints(self.path) if step_of(path) > step]
        if not earlier:
            self.write_config(config, **facts)
        else:
            place = set_aside(self.path, [])
            if (self.path / "config.yaml").is_file():
                shutil.copy(self.path / "config.yaml", place)
            self.write_config(config, **facts)  # after it nothing of another run counts as this one's
            for path in earlier:
                path.rename(place / path.name)
            shown = ", ".join(path.name for path in earlier[:4]) + (", …" if len(earlier) > 4 else "")
            logger.warning("set aside in %s, since this run does not go on from it: %s", place, shown)
        self.cut_after(step)

    def cut_after(self, step: int) -> None:
        """Delete the records of later steps than `step`, and the summary that the run ended with there."""
        if self.rank != 0:
            return
        self._keep("metrics.jsonl", lambda line: _step_of(line) <= step and "train_runtime" not in line)
        shutil.rmtree(self.path / SAVING, ignore_errors=True)  # of a process that was killed while it saved
        self._keep("skipped.jsonl", lambda line: _step_of(line) < step)  # steps count from 0 there: the one under way
        for path in [p for name in ("completions", "faults") for p in (self.path / name).glob("step-*.jsonl")]:
            if int(path.stem.split("-")[1]) > step:
                path.unlink()

    def _keep(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Keep the lines of a file that are wanted, and damaged ones where they stand; not what a kill cut off."""
        path = self.path / name
        if not path.is_file():
            return
        *lines, _ = path.read_bytes().split(b"\n")
        records = [parsed(line) for line in lines]
        if lines and not any(isinstance(record, dict) and "step" in record for record in records):
            raise ValueError(
                f"{path} must hold one JSON object with a step a line, got {lines[0][:80].decode(errors='replace')!r}"
            )
        kept = [line for line, r in zip(lines, records, strict=True) if not isinstance(r, dict) or wanted(r)]
        if not kept:
            path.unlink()
        elif (content := b"".join(line + b"\n" for line in kept)) != path.read_bytes():
            replace_file(path, content)

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
        with path.open(
            "a", encoding="utf-8", errors="backslashreplace"
        ) as file:  # half a surrogate pair, as JSON has it
            file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else 0


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
