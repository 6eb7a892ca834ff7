"""The built-in world: real handwritten digits, a prior to be misled by, and a tiny Qwen2.5-VL that is misled by it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vigos.world.prompts import world_prompts

if TYPE_CHECKING:
    from vigos.world.generate import write_world
    from vigos.world.warmup import pretrain

__all__ = ["checkpoint_path", "load_base", "pretrain", "world_prompts", "write_world"]

_LAZY = {"write_world": "generate", "pretrain": "warmup"}


def checkpoint_path() -> Path:
    """The folder of the base model that ships with the package, as `save_pretrained` wrote it (fp16)."""
    return Path(__file__).with_name("checkpoint")


def load_base(folder: str | Path | None = None) -> tuple[Any, Any]:
    """The base model (fp32 on the CPU, evaluation mode) and its processor.

    Args:
        folder: another checkpoint of the world; None takes the one that ships.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = checkpoint_path() if folder is None else Path(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def __getattr__(name: str) -> Any:
    # Resolved late, because these modules need NumPy, Pillow and transformers.
    if name in _LAZY:
        from importlib import import_module

        function = getattr(import_module(f"vigos.world.{_LAZY[name]}"), name)
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
