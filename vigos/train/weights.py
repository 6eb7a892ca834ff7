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


def check_adapter_file(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError unless a checkpoint's adapter holds every tensor of the model's adapter and no other."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    core: Any = unwrap(model)
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        found = set(file.keys())
    wanted = get_peft_model_state_dict(core, adapter_name=core.active_adapters[0]).keys()
    if found != wanted:
        missing, unexpected = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{folder} must hold the {len(wanted)} tensors of this run's adapter, got {len(found)}: {len(missing)} "
            f"missing, {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}; resume with the lora_ "
            "options that it was trained with"
        )
    logger.info("took all %d tensors of the adapter in %s", len(wanted), folder)
