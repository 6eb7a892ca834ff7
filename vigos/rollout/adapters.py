"""Adapters as files, by which engines with weights of their own follow the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor


def adapter_name(step: int | str) -> str:
    """Return the name of the student's adapter after `step` optimizer steps; "*" gives the pattern of all names."""
    return f"vigos-{step}"


def save_adapter(adapters: Path | None, step: int, model: Any, weights: dict[str, Tensor]) -> Path:
    """Save the adapter of a peft model under its name of `step` and return its folder.

    Args:
        weights: the trained parameters by name, gathered (`vigos.models.sharding.gather_trained`).
    """
    if adapters is None:
        raise ValueError("adapters must be a folder that the engine reads too, got None")
    folder = (adapters / adapter_name(step)).resolve()
    model.save_pretrained(str(folder), state_dict=weights)
    return folder


def drop_adapters(adapters: Path, keep: str) -> None:
    """Remove the adapters of other steps, those of an interrupted run among them."""
    for old in adapters.glob(adapter_name("*")):
        if old.name != keep:
            shutil.rmtree(old, ignore_errors=True)
