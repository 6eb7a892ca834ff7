"""Folders that commands write to: free or replaced on request, and owned by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vigos.cli.options import UsageError
from vigos.system.files import owned

# What a demo leaves in its folder.
DEMO = ("summary.json", "before.jsonl", "after.jsonl", "report.html", "train", "world")


def is_leader() -> bool:
    """Tell whether this process is the first of its run, as launchers number them."""
    return int(os.environ.get("RANK", "0")) == 0


def check_exist(*paths: Path | None) -> None:
    """Raise UsageError for a file or folder that is not there, before anything heavy is imported."""
    for path in paths:
        if path is not None and not path.exists():
            raise UsageError(f"no such file or folder: {path}")


def earlier_run(folder: Path, holds: tuple[str, ...], *, allowed: bool = False) -> list[Path]:
    """Return what an earlier run left in a folder.

    Raises:
        UsageError: there is something and it is not `allowed`, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir must be a folder, got the file {folder}")
    found = sorted(p for pattern in holds for p in folder.glob(pattern))
    if found and not allowed:
        shown = ", ".join(p.name for p in found[:4]) + (", …" if len(found) > 4 else "")
        resumable = "go on with --resume auto, " if "checkpoint-*" in holds else ""
        ways = f"{resumable}replace it with --overwrite, or name another folder"
        raise UsageError(f"--output-dir: {folder} holds an earlier run ({shown}): {ways}")
    return found


@contextmanager
def output_folder(
    folder: str | Path, what: str, holds: tuple[str, ...] = (), *, resume: bool = False, overwrite: bool = False
) -> Iterator[None]:
    """Lock the folder while the block runs; the leader rank does so for all.

    Args:
        holds: names of files and folders that an earlier run leaves: with them the folder is refused.
        resume: the earlier run goes on.
        overwrite: the earlier run is deleted, as far as `holds` names it.

    Raises:
        UsageError: the folder holds an earlier run.
        FolderInUse: another process writes to it.
    """
    if not is_leader():
        yield
        return
    folder = Path(folder)
    found = earlier_run(folder, holds, allowed=resume or overwrite)
    with owned(folder, what):
        for path in found if overwrite and not resume else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
