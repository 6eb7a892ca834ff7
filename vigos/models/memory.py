"""Memory of the device."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Free unreferenced memory, after an allocation failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
