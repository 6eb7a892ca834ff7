"""Checksums of what a checkpoint or a folder of final weights holds: `vigos_manifest.json`, written last.

    {"run": "5f3a…", "global_step": 12, "epoch": 0.5, "files": {"trainer_state.json": "<sha256>", …}}

The run's identity tells its checkpoints from those that another run left in the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vigos.system.files import parsed

MANIFEST = "vigos_manifest.json"


def seal(folder: str | Path, **facts: Any) -> None:
    """Write the manifest of a folder that is not in its place yet: every file's checksum, and `facts` about the run."""
    folder = Path(folder)
    files = {str(p.relative_to(folder)): _checksum(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST, None)
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read a folder's manifest; an empty one where there is none, or it is damaged."""
    path = Path(folder) / MANIFEST
    value = parsed(path.read_bytes()) if path.is_file() else None
    return value if isinstance(value, dict) and isinstance(value.get("files"), dict) else {}


def damage(folder: str | Path) -> str:
    """Compare a folder with its manifest; return what is wrong with it, "" if every file is as it was written."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest:
        return f"{MANIFEST} is {'damaged' if (folder / MANIFEST).is_file() else 'missing'}"
    for name, checksum in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if _checksum(path) != checksum:
                return f"{name}, {path.stat().st_size:,} bytes, is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def is_trained(state: Mapping[str, Any], config: Any) -> bool:
    """Tell whether a run with these options is at its last step in a state: its `global_step` and `epoch`.

    Args:
        config: of the run, a `TrainingArguments`.
    """
    if config.max_steps > 0:
        return bool(state["global_step"] >= config.max_steps)
    return bool(state["epoch"] >= config.num_train_epochs)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
