"""Collect what repeats a run beside its options: versions, machine and command line, and a digest of the data."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"(--[\w-]*(?:token|key|secret|password)[\w-]*)(=|\s+)\S+", re.I)


def process_facts() -> dict[str, Any]:
    """Return the versions that run here, the machine, and the command line without its secrets."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": platform.python_version()}
    for package in ("vigos", "torch", "transformers", "peft", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{torch.get_num_threads()} threads"
    return {
        "versions": versions,
        "machine": f"{device}, {platform.machine()}, {platform.system()}",
        "command": _SECRET.sub(r"\1\2<SECRET>", shlex.join(sys.argv)),
    }


def data_facts(data: str | Path) -> dict[str, Any]:
    """Return the name of the data and its digest: of a file, or of the names and sizes in a folder; None on the hub."""
    path, digest = Path(data).expanduser(), hashlib.blake2b(digest_size=16)
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    elif path.is_dir():
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file_path.relative_to(path)} {file_path.stat().st_size}\n".encode())
    else:
        return {"data": str(data), "data_digest": None}
    return {"data": str(data), "data_digest": digest.hexdigest()}
