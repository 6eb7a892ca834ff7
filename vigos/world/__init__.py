"""The built-in world: real handwritten digits, a prior to be misled by, and a tiny Qwen2.5-VL that is misled by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vigos.world.generate import write_world
from vigos.world.prompts import world_prompts

__all__ = ["checkpoint_path", "load_base", "servable_copy", "world_prompts", "write_world"]


def checkpoint_path() -> Path:
    """Return the folder of the base model that ships with the package, as `save_pretrained` wrote it (fp16)."""
    return Path(__file__).with_name("checkpoint")


def servable_copy(folder: str | Path) -> Path:
    """Copy the base model as vLLM reads it, with the processor of Qwen2.5-VL, and return the copy's folder."""
    copy = Path(shutil.copytree(checkpoint_path(), Path(folder) / "servable", dirs_exist_ok=True))

    def edit(name: str, **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads((copy / name).read_text(encoding="utf-8"))
        (copy / name).write_text(json.dumps(settings | changes), encoding="utf-8")
        return settings

    images = dict(edit("processor_config.json")["image_processor"])
    images.pop("image_processor_type")
    videos = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
    edit("processor_config.json", processor_class="Qwen2_5_VLProcessor", video_processor=videos)
    edit("tokenizer_config.json", processor_class="Qwen2_5_VLProcessor")
    return copy


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
