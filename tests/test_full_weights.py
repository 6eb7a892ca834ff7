"""All weights of the student to an engine with a copy of them, in named groups: repeated when cut off or lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.training import CopyEngine, config, processor, rows, tiny_student, trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralModel

from vigos.models.compat import keep_checkpoint_names
from vigos.models.sharding import parameter_groups
from vigos.rollout.checks import RolloutError
from vigos.rollout.engine import Completion
from vigos.rollout.full_weights import StaleWeights, checkpoint_groups, checkpoint_names

UNTOLD = ("perf/", "mismatch/", "train_")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "qwen3", "smolvlm", "gemma3"])
def test_groups_have_the_names_and_tensors_of_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = {name: x for group in checkpoint_groups(model, trained=False) for name, x in group.items()}
    assert sorted(saved) == sorted(sent) == checkpoint_names(model, trained=False)
    assert all(torch.equal(saved[name], x) for name, x in sent.items())


def test_names_of_a_model_whose_class_is_renamed(tmp_path: Path) -> None:
    """FSDP2 renames the class of what it shards, and transformers finds a checkpoint's names by that name."""
    settings = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=30,
    )  # fmt: skip
    names = {}
    for how in ("plain", "kept", "lost"):
        model = MixtralModel(settings)
        if how == "kept":
            keep_checkpoint_names(model)
        if how != "plain":
            model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})
        model.save_pretrained(tmp_path / how)
        names[how] = sorted(load_file(tmp_path / how / "model.safetensors"))
    assert names["kept"] == names["plain"] != names["lost"]


def test_a_group_is_as_large_as_was_asked_for() -> None:
    model = tiny_model("qwen2_5_vl")
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    groups = list(parameter_groups(model, 10_000))
    assert len(groups) > 3
    assert all(len(group) == 1 or sum(x.nbytes for x in group.values()) <= 10_000 for group in groups)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for group in groups for name in group] == trained


class CutOff(CopyEngine):
    """Its first update after a step ends half way."""

    cut, updates = False, 0

    def update_weights(self, step: int, model: Any, weights: Iterator[dict[str, Tensor]]) -> None:
        self.updates += 1
        if step and not self.cut:
            self.cut, self.version = True, None
            next(iter(weights))
            raise RolloutError("the connection is gone")
        super().update_weights(step, model, weights)


class Restarted(CopyEngine):
    """In the second step it has the first step's weights again, as a server that was killed and came back."""

    updates = 0

    def update_weights(self, step: int, model: Any, weights: Iterator[dict[str, Tensor]]) -> None:
        self.updates += 1
        super().update_weights(step, model, weights)

    def sample(self, *args: Any) -> list[Completion]:
        if self.version == 1 and self.updates == 2:
            self.version = None
        if self.version is None:
            raise StaleWeights("it was started again")
        return super().sample(*args)


def run(folder: Path, kind: type[CopyEngine] | None) -> tuple[Any, list[dict[str, Any]], dict[str, Tensor]]:
    """Three greedy steps of full fine-tuning: the engine, the logs, the weights."""
    model = tiny_student()
    own = kind.for_model(copy.deepcopy(model), processor()) if kind else None
    args = config(folder, max_steps=3, learning_rate=1e-2, lora=False, clip_mode="none", temperature=0.0)
    trained = trainer(model, args, rows(6), rollout_engine=own)
    trained.train()
    logs = [{k: v for k, v in log.items() if not k.startswith(UNTOLD)} for log in trained.state.log_history]
    return own, logs, {name: p.detach() for name, p in trained.model.named_parameters()}


@pytest.mark.parametrize(("kind", "updates"), [(CopyEngine, 0), (CutOff, 4), (Restarted, 4)])
def test_full_fine_tuning_with_an_engine_that_is_sent_weights(kind: Any, updates: int, tmp_path: Path) -> None:
    """Equal to three steps that sample from the model itself, whatever happens to an update."""
    _, wanted, parameters = run(tmp_path / "own", None)
    engine, found, same = run(tmp_path / "sent", kind)
    assert found == wanted
    assert all(torch.equal(parameters[name], p) for name, p in same.items())
    assert engine.version == 2
    assert getattr(engine, "updates", 0) == updates
