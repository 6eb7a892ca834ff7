"""Checkpoints that are whole or not there, and runs that stop in order when they are told to.

A checkpoint is written to `saving/checkpoint-N` in the run folder, flushed to the disk, and renamed to `checkpoint-N`:
whatever kills the process, what is called `checkpoint-N` is complete. Older ones are renamed away before they are
deleted, for the same reason.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vigos.errors import lost_peer

logger = logging.getLogger(__name__)

SAVING = "saving"
EXIT_CODE = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM ended
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest step first."""
    folder = Path(folder)
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((p for p in found if (p / "trainer_state.json").is_file()), key=_step)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder, what an interrupted replacement left over included."""
    folder = Path(folder)
    for old in folder.glob(f"{SAVING}/replaced-checkpoint-*"):
        place = folder / old.name.removeprefix("replaced-")
        if not place.exists():  # killed between two renames
            old.rename(place)
    found = checkpoints(folder)
    return found[-1] if found else None


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def publish(folder: str | Path, name: str) -> Path:
    """Makes `saving/name` the run folder's `name`, after everything in it has reached the disk."""
    folder = Path(folder)
    source, place = folder / SAVING / name, folder / name
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


def rotate(folder: str | Path, limit: int | None) -> None:
    """Deletes all but the newest `limit` checkpoints; None keeps all."""
    if not limit or limit < 1:
        return
    for old in checkpoints(folder)[:-limit]:
        away = Path(folder) / SAVING / f"old-{old.name}"
        away.parent.mkdir(exist_ok=True)
        old.rename(away)
    shutil.rmtree(Path(folder) / SAVING, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_state(folder: str | Path, rank: int, state: dict[str, Any]) -> None:
    """What a rank of the trainer has to know beside weights, optimizer and random numbers. Floats keep every bit."""
    Path(folder).mkdir(parents=True, exist_ok=True)  # with save_only_model, other ranks have written nothing yet
    (Path(folder) / f"vigos_state-{rank}.json").write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: str | Path, rank: int) -> dict[str, Any] | None:
    """What `write_state` wrote; None where this rank left nothing (another number of ranks, or another trainer)."""
    path = Path(folder) / f"vigos_state-{rank}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


@contextmanager
def saving(folder: str | Path, name: str) -> Iterator[None]:
    """Turns any failure to write into one message that says what is left."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are how torch and safetensors say it
        if lost_peer(error):
            raise
        shutil.rmtree(Path(folder) / SAVING, ignore_errors=True)
        last = last_checkpoint(folder)
        left = f"the last complete one is {last}" if last else "there is none before it"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        free = shutil.disk_usage(folder).free / 2**30
        raise CheckpointError(
            f"{name} could not be written to {folder} ({reason}; {free:.1f} GiB are free there); {left}. Make room, "
            "or keep fewer with --save-total-limit, and go on with --resume auto"
        ) from error


class StopSignal:
    """Remembers that SIGTERM came. A second one ends the process at once, as if nobody had listened."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens inside; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.received = True
            signal.signal(signal.SIGTERM, before if callable(before) else signal.SIG_DFL)
            logger.warning("SIGTERM: a checkpoint will be written after this step; a second SIGTERM ends at once")

        signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
