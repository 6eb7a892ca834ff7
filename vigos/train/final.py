"""The final model of a run: the adapter and a merged copy, or the fully fine-tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vigos.method.asking import Asking
from vigos.models.parts import unwrap
from vigos.train.adapters import merged_copy, plain_class, plain_copy
from vigos.train.card import model_card
from vigos.train.checkpoint import SAVING, publish, run_id, saving
from vigos.train.manifest import damage, read_manifest

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig


def final_names(config: ViGOSConfig) -> list[str]:
    """Name the folders of a run's final weights."""
    return ["adapter", *(["merged"] if config.save_merged else [])] if config.lora else ["model"]


def final_state(config: ViGOSConfig) -> dict[str, Any] | None:
    """Return the manifest of the final weights in a run folder; None where one is not there, damaged, or another's."""
    folders = [Path(str(config.output_dir)) / name for name in final_names(config)]
    states = [read_manifest(folder) for folder in folders]
    first = states[0]
    same = all(first and state.get(key) == first[key] for state in states for key in ("run", "global_step"))
    if not same or first["run"] != run_id(str(config.output_dir)):
        return None
    return None if any(damage(folder) for folder in folders) else first


def save_final(
    folder: str | Path, model: nn.Module, processor: Any, asking: Asking, *, merged: bool, facts: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None, check: Callable[[str, Path], None] | None = None,
) -> None:  # fmt: skip
    """Write the trained weights into a run folder, each of its folders completely or not at all.

    Call it on the leader rank.

    Args:
        asking: saved with the weights: asked in other words, a trained model may answer nothing that can be read.
        merged: also write the adapter merged into a copy of the model.
        facts: of the run, for the manifests.
        weights: the gathered state dict where the model's parameters are sharded; None: the model's own.
        check: called with name and path of each folder before it takes its place; it raises if that is a wrong one.

    Raises:
        CheckpointError: the disk is full, or cannot be written.
    """
    core: Any = unwrap(model)

    def write(name: str, save: Callable[[Path], None]) -> None:
        with saving(folder, f"{name}/"):
            part = Path(folder) / SAVING / name
            save(part)
            if check is not None:
                check(name, part)
            asking.save(part)
            (part / "README.md").write_text(model_card(folder, name), encoding="utf-8")
            publish(folder, name, **facts)

    def model_and_processor(part: Path, model: Any) -> None:
        model.save_pretrained(part)
        processor.save_pretrained(part)

    def adapter(part: Path) -> None:
        core.save_pretrained(part, state_dict=weights)
        _name_base(part / "adapter_config.json", plain_class(core.get_base_model()))

    if not hasattr(core, "peft_config"):
        trained = core if weights is None else plain_copy(core, weights)
        write("model", lambda part: model_and_processor(part, trained))
        return
    write("adapter", adapter)
    if merged:
        write("merged", lambda part: model_and_processor(part, merged_copy(core, weights)))


def _name_base(path: Path, kind: type) -> None:
    """Write the class of the base model into an adapter's config: under FSDP2 peft writes one that cannot be loaded."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("auto_mapping"):
        config["auto_mapping"] |= {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
