"""The built-in world: real handwritten digits, a prior to be misled by, and a tiny Qwen2.5-VL that is misled by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vigos.world.generate import write_world
from vigos.world.prompts import world_prompts

__all__ = ["checkpoint_path", "load_base", "world_prompts", "write_world"]


def checkpoint_path() -> Path:
    """Return the folder of the base model that ships with the package, as `save_pretrained` wrote it (fp16)."""
    return Path(__file__).with_name("checkpoint")


def load_base(folder: str | Path | None = None) -> tuple[Any, Any]:
    """Load the base model (fp32 on the CPU, evaluation mode) and its processor.

    Args:
        folder: another checkpoint of the world; None takes the one that ships.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = checkpoint_path() if folder is None else Path(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=False)
