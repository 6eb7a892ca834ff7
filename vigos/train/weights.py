"""Load a checkpoint's weights into the model in training, every tensor or none."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vigos.models.parts import unwrap
from vigos.train.adapters import plain_class

logger = logging.getLogger(__name__)


def load_model(model: nn.Module, folder: str | Path) -> None:
    """Load a fully fine-tuned, unsharded model from a checkpoint that `save_pretrained` wrote.

    Such a file holds the names of the hub, which only `from_pretrained` translates into those of the modules:
    `load_state_dict` would find none of them. Raises ValueError for missing, unexpected and unfitting tensors.
    """
    core: Any = unwrap(model)
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in core.parameters()})  # the widest rounds nothing
    loaded, info = plain_class(core).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, use_safetensors=True
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(name) or ())):
            raise ValueError(
                f"{folder} must hold every tensor of {type(core).__name__} and no other, got {len(keys)} "
                f"{name.replace('_', ' ')}, such as {keys[0]}"
            )
    core.load_state_dict(loaded.state_dict(), strict=True)
    logger.info("took all %d tensors of %s", len(core.state_dict()), folder)
