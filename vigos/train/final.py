"""The final model of a run: the adapter and a merged copy, or the fully fine-tuned model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vigos.models.parts import unwrap
from vigos.train.adapters import merged_copy, plain_class, plain_copy


def save_final(
    folder: str | Path, model: nn.Module, processor: Any, *, merged: bool, weights: Mapping[str, Tensor] | None = None
) -> dict[str, str]:
    """Write the trained weights into a run folder; return which folder holds what. Call it on the leader rank.

    Args:
        merged: also write the adapter merged into a copy of the model.
        weights: the gathered state dict where the model's parameters are sharded; None: the model's own.
    """
    core: Any = unwrap(model)
    folder = Path(folder)
    if not hasattr(core, "peft_config"):
        trained = core if weights is None else plain_copy(core, weights)
        trained.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        return {"model": str(folder / "model")}
    core.save_pretrained(folder / "adapter", state_dict=weights)
    _name_base(folder / "adapter" / "adapter_config.json", plain_class(core.get_base_model()))
    saved = {"adapter": str(folder / "adapter")}
    if merged:
        merged_copy(core, weights).save_pretrained(folder / "merged")
        processor.save_pretrained(folder / "merged")
        saved["merged"] = str(folder / "merged")
    return saved


def _name_base(path: Path, kind: type) -> None:
    """Write the class of the base model into an adapter's config: under FSDP2 peft writes one that cannot be loaded."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("auto_mapping"):
        config["auto_mapping"] |= {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
