"""Write checkpoints that are complete or not there, and stop a run in order on SIGTERM.

A checkpoint is written to `saving/checkpoint-N` in the run folder, sealed with checksums, flushed to the disk, and
renamed to `checkpoint-N`: whatever kills the process, what is called `checkpoint-N` is complete. Older ones are renamed
away before they are deleted, for the same reason. What a run must not go on from is set aside, and never deleted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from vigos.errors import lost_peer
from vigos.models.compat import loss_totals, set_loss_totals
from vigos.system.files import read_sections
from vigos.train.manifest import MANIFEST, damage, read_manifest, seal

logger = logging.getLogger(__name__)

SAVING = "saving"
ASIDE = "aside"
EXIT_CODE = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM ended
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: str | Path, run: str | None = None) -> list[Path]:
    """List the complete checkpoints of a run folder, oldest step first.

    Args:
        run: leave out those that another run's manifest is in.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    found = [p for p in found if (p / "trainer_state.json").is_file() or (p / MANIFEST).is_file()]
    if run is not None:
        found = [p for p in found if read_manifest(p).get("run", run) == run]
    return sorted(found, key=step_of)


def run_id(folder: str | Path) -> str | None:
    """Return the identity of the run in a folder, from its config.yaml; None where that has none."""
    return read_sections(Path(folder) / "config.yaml").get("run", {}).get("id")


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint of the run in a folder, one left by an interrupted replacement included."""
    folder = Path(folder)
    for old in folder.glob(f"{SAVING}/replaced-checkpoint-*"):
        place = folder / old.name.removeprefix("replaced-")
        if not place.exists():  # killed between two renames
            old.rename(place)
    found = checkpoints(folder, run_id(folder))
    return found[-1] if found else None


def whole_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that holds what was written into it; None where there is none.

    Damaged newer ones are set aside, with a warning each.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; they stay where they are.
    """
    if last_checkpoint(folder) is None:
        return None
    damaged: list[tuple[Path, str]] = []
    for found in reversed(checkpoints(folder, run_id(folder))):
        if (reason := damage(found)) and not _before_manifests(found):
            damaged.append((found, reason))
            continue
        place = set_aside(folder, [path for path, _ in damaged]) if damaged else None
        for path, reason in damaged:
            logger.warning("%s is damaged (%s) and set aside in %s; %s is whole", path, reason, place, found.name)
        return found
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
    raise CheckpointError(
        f"no checkpoint in {folder} is whole ({reasons}); put a copy of one there, or begin anew with --overwrite"
    )


def _before_manifests(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is of a version that wrote no manifests: the run has no identity either."""
    return not (checkpoint / MANIFEST).exists() and run_id(checkpoint.parent) is None


def set_aside(folder: str | Path, paths: Sequence[Path]) -> Path:
    """Move what a run must not go on from, or mix with its own, to the next free `aside/N`, which is returned."""
    numbers = [int(p.name) for p in (Path(folder) / ASIDE).glob("*") if p.name.isdigit()]
    place = Path(folder) / ASIDE / str(max(numbers, default=0) + 1)
    place.mkdir(parents=True)
    for path in paths:
        path.rename(place / path.name)
    return place


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def publish(folder: str | Path, name: str, **facts: Any) -> Path:
    """Rename `saving/name`, with a manifest that holds `facts`, to the run folder's `name` once it is on the disk."""
    folder = Path(folder)
    source, place = folder / SAVING / name, folder / name
    seal(source, **facts)
    for directory, _, files in os.walk(source):
        for file in files:
            _sync(Path(directory) / file)
        _sync(Path(directory))
    if place.exists():  # of an earlier run that went further than the checkpoint this one started from
        replaced = folder / SAVING / f"replaced-{name}"
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    source.rename(place)
    _sync(folder)
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    return place


def rotate(folder: str | Path, limit: int | None, run: str | None = None) -> None:
    """Delete all but the newest `limit` checkpoints of a run; None keeps all."""
    for old in checkpoints(folder, run)[:-limit] if limit and limit > 0 else ():
        remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: renamed first, so that no half of one is ever there under its name."""
    saving = checkpoint.parent / SAVING
    saving.mkdir(exist_ok=True)
    checkpoint.rename(saving / f"old-{checkpoint.name}")
    shutil.rmtree(saving, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Stateful(Protocol):
    """Anything with a state that a resumed run has to go on from."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state by name: tensors, and values that JSON knows. Every rank calls it together."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; an empty one is that of a checkpoint in which this rank left nothing."""
        ...


def write_parts(folder: str | Path, rank: int, parts: Mapping[str, Stateful]) -> None:
    """Write a rank's states into a checkpoint: JSON (floats keep every bit), and safetensors for the leader's tensors.

    `vigos_state-RANK.json` holds all parts, `vigos_PART.safetensors` the tensors of a part that has any.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)  # with save_only_model, other ranks have written nothing yet
    plain: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        state = part.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        plain[name] = {key: value for key, value in state.items() if key not in tensors}
        if tensors:
            save_file(tensors, folder / f"vigos_{name}.safetensors")
    (folder / f"vigos_state-{rank}.json").write_text(json.dumps(plain), encoding="utf-8")


def read_parts(folder: str | Path, rank: int, parts: Mapping[str, Stateful]) -> None:
    """Give every part the state that `write_parts` wrote; an empty one where this rank left none."""
    from safetensors.torch import load_file

    folder = Path(folder)
    path = folder / f"vigos_state-{rank}.json"
    plain = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, part in parts.items():
        tensors = folder / f"vigos_{name}.safetensors"
        part.load_state_dict(plain.get(name, {}) | (load_file(tensors) if tensors.is_file() else {}))


class LossSums:
    """Keep the sums of losses that `transformers.Trainer` logs at the end; older versions keep them to themselves."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.complete = True  # the sums are those of all steps

    def mean(self) -> float | None:
        """Return the mean loss of all steps; None where the sums of those before a restart are not known."""
        totals = loss_totals(self.trainer)
        return totals[1] / max(self.trainer.state.global_step, 1) if totals and self.complete else None

    def state_dict(self) -> dict[str, Any]:
        """Return the sums; None where transformers keeps them as local variables."""
        return {"totals": loss_totals(self.trainer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        set_loss_totals(self.trainer, state.get("totals"))
        self.complete = state.get("totals") is not None


class CheckpointError(OSError):
    """Say that a checkpoint could not be written; earlier ones are as they were."""


@contextmanager
def saving(folder: str | Path, name: str) -> Iterator[None]:
    """Turn any failure to write into one message that says which checkpoints are left."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are how torch and safetensors say it
        if lost_peer(error):
            raise
        shutil.rmtree(Path(folder) / SAVING, ignore_errors=True)
        last = last_checkpoint(folder)
        left = f"the last complete checkpoint is {last}" if last else "there is no checkpoint before it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        free = shutil.disk_usage(folder).free / 2**30
        raise CheckpointError(
            f"{name} could not be written to {folder} ({reason}; {free:.1f} GiB are free there); {left}. Make room, "
            "or keep fewer with --save-total-limit, and go on with --resume auto"
        ) from error


class StopSignal:
    """Remember that SIGTERM or SIGINT (Ctrl-C) came; a second one ends the process at once.

    Attributes:
        follows: what the run does about the first one, for the message.
    """

    def __init__(self) -> None:
        self.received = False
        self.exit_code = EXIT_CODE
        self.follows = "a checkpoint will be written after this step"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside; does nothing outside the main thread, which alone can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.received, self.exit_code = True, 128 + number
            restore()
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            logger.warning("%s: %s; a second one ends at once", name, self.follows)

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            restore()
