"""Load a checkpoint's weights into the model in training, every tensor or none."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vigos.models.load import check_adapter_file, check_names
from vigos.models.parts import unwrap
from vigos.train.adapters import plain_class

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig

logger = logging.getLogger(__name__)


def load_model(model: nn.Module, folder: str | Path) -> None:
    """Load a fully fine-tuned, unsharded model from a checkpoint that `save_pretrained` wrote.

    Such a file holds the names of the hub, which only `from_pretrained` translates into those of the modules:
    `load_state_dict` would find none of them. Raises ValueError for missing, unexpected and unfitting tensors.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} must hold a whole model, got none: resume with the lora option of its run")
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


def check_saved_adapter(model: nn.Module, folder: str | Path) -> None:
    """Raise ValueError unless a checkpoint's files hold every tensor of the model's adapter and no other."""
    if (Path(folder) / "adapter_model.safetensors").is_file():  # else in a folder of its name
        check_adapter_file(model, folder)
    files = ("adapter_model.safetensors", "*/adapter_model.safetensors", "pytorch_model_fsdp*")
    if not any(path for name in files for path in Path(folder).glob(name)):
        raise ValueError(f"{folder} must hold an adapter, got none: resume with the lora option of its run")
    full = Path(folder) / "pytorch_model_fsdp.bin"
    if full.is_file():  # what FSDP2 loads, without minding what is missing
        found = set(torch.load(full, map_location="meta", mmap=True, weights_only=True))
        names = (name for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad)
        check_names(folder, found, {name.replace("_checkpoint_wrapped_module.", "") for name in names})


def check_loaded_adapter(model: nn.Module, folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the adapter in training is that of a checkpoint: DeepSpeed loads what it finds.

    Args:
        weights: the trained parameters by name, gathered.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    core: Any = unwrap(model)
    current = get_peft_model_state_dict(core, state_dict=dict(weights), adapter_name=core.active_adapters[0])
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    other = [name for name in saved if name not in current or not torch.equal(saved[name], current[name].cpu())]
    if other:
        raise ValueError(
            f"{folder} must give all {len(saved)} tensors of the adapter to DeepSpeed, {len(other)} are others, such "
            f"as {other[0]}"
        )


def check_states(folder: str | Path, config: ViGOSConfig) -> None:
    """Check that a checkpoint holds optimizer, schedule and random state, which transformers goes on without.

    With `save_only_model` what is missing is a warning; so is this rank's random state, which a run on more ranks than
    before has not.

    Raises:
        ValueError: naming what is missing.
    """
    rank = f"_{config.process_index}" if config.world_size > 1 else ""
    missing = [n for n in ("optimizer", "scheduler") if not config.deepspeed and not any(Path(folder).glob(f"{n}*"))]
    if missing and not config.save_only_model:
        raise ValueError(
            f"{folder} must hold the state of the {' and the '.join(missing)}, got none; save_only_model=True goes on "
            "from its weights with a new one"
        )
    missing += [] if (Path(folder) / f"rng_state{rank}.pth").is_file() else ["random numbers"]
    if missing:
        logger.warning("%s holds no state of the %s: a new one is used", folder, " and the ".join(missing))
