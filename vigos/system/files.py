"""Files that other processes read, or that this one may be killed while writing."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vigos.system.secrets import masked

LOCK = ".vigos-lock"  # held by the operating system for as long as its process lives
OWNER = ".vigos-owner"  # who holds it, for the message
RUN = (  # what a run leaves in its folder; config.yaml says which run it is
    "metrics.jsonl", "skipped.jsonl", "completions", "faults", "profile", "checkpoint-*", "adapter", "merged", "model",
    "saving", "config.yaml",
)  # fmt: skip


def replace_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file aside, flush it to the disk and rename it: at every moment the path holds the old or the new one.

    Keys of servers are masked in text.

    Raises:
        OSError: naming the path, with the old file untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = masked(content).encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        Path(part).unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); it is as it was") from error
    _flush_folder(path.parent)
    return path


def replace_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON by `replace_file`."""
    return replace_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_sections(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the sections of a run's config.yaml; an empty dictionary where the file is missing or damaged."""
    from vigos.system.yaml_file import read_yaml

    try:
        loaded = read_yaml(path)
    except (FileNotFoundError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) and all(isinstance(part, dict) for part in loaded.values()) else {}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    """Flush the rename itself, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json_lines(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Read the objects of a JSONL file around damaged lines.

    Returns:
        The objects, and how many lines were left out: not UTF-8, not JSON, or not an object. A last line without an
        end is what a killed process left of it, and not counted.
    """
    found: list[dict[str, Any]] = []
    damaged = 0
    with Path(path).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            value = parsed(line)
            if isinstance(value, dict):
                found.append(value)
            elif line.strip():
                damaged += 1
    return found, damaged


def parsed(line: bytes) -> Any:
    """Return the JSON value of a line, or None where it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested without end
        return None


class FolderInUse(OSError):
    """Another process writes to the folder."""


@contextmanager
def owned(folder: str | Path, what: str) -> Iterator[Path]:
    """Lock a folder while the block runs, so that no second process writes to it.

    The lock is the operating system's: it ends with the process, however that ends, so none is ever stale. On a shared
    file system it holds between hosts if the file system passes locks on (NFS 4 does).

    Args:
        what: the command, for the message of whoever comes second.

    Raises:
        FolderInUse: naming the host, process and time of the owner.
    """
    import filelock

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        owner = folder / OWNER
        values = parsed(owner.read_bytes()) if owner.is_file() else None
        who = "another process"
        if isinstance(values, dict):
            who = "`{what}`, process {process} on {host} since {since}".format_map(defaultdict(str, values))
        raise FolderInUse(f"{folder} is in use by {who}; wait for it, end it, or take another folder") from error
    try:
        facts = {"what": what, "process": os.getpid(), "host": socket.gethostname()}
        replace_json(folder / OWNER, {**facts, "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        yield folder
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()
