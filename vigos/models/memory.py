"""Memory of the device."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give back what is held by nobody any more, after an allocation failed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
