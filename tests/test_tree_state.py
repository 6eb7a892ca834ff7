"""The prefix tree over layers that carry state (Gated DeltaNet), against separate forwards, and what would break it."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import IMAGE, LAYERS, fed, fed_alone, mixed_rows, tiny_model
from helpers.training import VALID_A, config, processor, rows, tiny_student, trainer
from peft import LoraConfig, get_peft_model

from vigos.models.families import family_of
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.prefix_tree import PrefixTree
from vigos.scoring.tree_state import TreeState, cut_runs

# Seeds under which padding alone moves the states by less than 1e-6. With others the delta rule's chunks, which are
# cut elsewhere in a batch than in a run, round by more: 2e-5 for Qwen3-Next with seed 0, 1e-5 of it by padding.
MODELS = {"qwen3_5": 0, "qwen3_5_moe": 0, "qwen3_next": 2}
STATES, GRADIENTS = 1e-5, 2e-5  # of the norm of a state, of all gradients; float32


def states_and_gradients(model: Any, sequences: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = hidden_states(model, sequences, **options)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4)) / len(hidden)
    (hidden * upstream).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative distance of two states."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def assert_same(model: Any, sequences: Any, **options: Any) -> None:
    exact, wanted = states_and_gradients(model, sequences, scoring="separate")
    states, gradients = states_and_gradients(model, sequences, scoring="tree", **options)
    assert far(states, exact) < STATES
    assert_gradients(gradients, wanted)


def assert_gradients(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Together within GRADIENTS of their norm, and none of them far from its own."""
    assert ours.keys() == wanted.keys()
    errors = {name: (ours[name] - gradient).norm() for name, gradient in wanted.items()}
    assert sum(e**2 for e in errors.values()) <= GRADIENTS**2 * sum(g.norm() ** 2 for g in wanted.values())
    for name, gradient in wanted.items():
        assert errors[name] <= 1e-4 * gradient.norm(), name


def test_runs_are_cut_where_branches_leave() -> None:
    sequences = mixed_rows("qwen3_5")
    for budget in (16_384, 60):
        for pack in PrefixTree(sequences, token_budget=budget, image_token_id=IMAGE).packs:
            runs = cut_runs(pack)
            assert [place for run in runs for place in range(run.start, run.stop)] == list(range(pack.tokens))
            for number, run in enumerate(runs):
                assert len(run.path) == pack.depth[run.start]
                if run.parent is not None:
                    assert run.parent < number
                    assert runs[run.parent].stop == run.path[-1] + 1, "it begins where its parent ends"
                    assert runs[run.parent].level == run.level - 1
    (pack,) = PrefixTree(sequences, image_token_id=IMAGE).packs
    assert max(run.level for run in cut_runs(pack)) >= 2
    assert fed(PrefixTree(sequences, image_token_id=IMAGE)) < 0.6 * fed_alone(sequences)


@pytest.mark.parametrize("family", MODELS)
def test_states_and_gradients(family: str) -> None:
    """Depth 1 to 3, several images, no image, repeats; whole, and cut by two budgets."""
    model, sequences = tiny_model(family, seed=MODELS[family]), mixed_rows(family)
    for options in ({}, {"token_budget": 60}, {"token_budget": 1}):
        assert_same(model, sequences, **options)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = tiny_model(family, seed=MODELS[family]).train()
    exact, wanted = states_and_gradients(model, mixed_rows(family), scoring="separate")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    states, gradients = states_and_gradients(model, mixed_rows(family), scoring="tree")
    assert far(states, exact) < STATES
    assert_gradients(gradients, wanted)


@pytest.mark.parametrize("family", MODELS)
def test_through_an_adapter_of_every_block(family: str) -> None:
    """The family's default targets: each block of the language model gets one."""
    base = tiny_model(family, seed=MODELS[family])
    row = family_of(base.config)
    assert row is not None
    torch.manual_seed(1)
    names = "|".join(row.lora_targets)
    # Small, as adapters are: random ones of full size leave the delta rule ill-conditioned.
    targets = rf".*layers\.\d+\.(?:.*\.)?(?:{names})"
    lora = LoraConfig(r=2, lora_alpha=0.02, target_modules=targets, init_lora_weights=False)  # type: ignore[arg-type]
    model = get_peft_model(copy.deepcopy(base), lora)
    for block in range(LAYERS):
        adapted = [n for n, p in model.named_parameters() if p.requires_grad and f"layers.{block}." in n]
        assert any("attn" in name for name in adapted), f"nothing adapts how block {block} mixes tokens"
    assert_same(model, mixed_rows(family))


# ---- negative controls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("wrong", ["parent state dropped", "branches out of order", "convolution of another parent"])
def test_what_the_comparison_would_notice(family: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = tiny_model(family, seed=MODELS[family]), mixed_rows(family)
    batch, tails = TreeState._batch, TreeState.tails
    if wrong == "parent state dropped":
        monkeypatch.setattr(
            TreeState, "_batch", lambda self, *a: dataclasses.replace(batch(self, *a), parents=[])
        )  # fmt: skip
    elif wrong == "branches out of order":
        monkeypatch.setattr(
            TreeState, "_batch",
            lambda self, *a: dataclasses.replace(made := batch(self, *a), parents=[0] * len(made.parents)),
        )  # fmt: skip
    else:
        monkeypatch.setattr(
            TreeState, "tails", lambda self, k: [torch.where(t < self.tokens, 0, t) for t in tails(self, k)]
        )
    with torch.no_grad():
        exact = hidden_states(model, sequences, scoring="separate")
        assert far(hidden_states(model, sequences, scoring="tree"), exact) > 1e-2


def test_ordinary_calls_are_the_models_own() -> None:
    model, sequences = tiny_model("qwen3_5"), mixed_rows("qwen3_5")
    file = sys.modules[type(model).__module__]
    before = (file.causal_conv1d_fn, file.torch_chunk_gated_delta_rule)
    with torch.no_grad():
        exact = hidden_states(model, sequences, scoring="separate")
        hidden_states(model, sequences, scoring="tree")
        assert torch.equal(hidden_states(model, sequences, scoring="separate"), exact)
    assert (file.causal_conv1d_fn, file.torch_chunk_gated_delta_rule) == before


# ---- training ------------------------------------------------------------------------------------------------------


def qwen3_5_student() -> Any:
    """A random Qwen3.5 for the built-in world's processor: one block of each kind."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    like, image = tiny_student().config, processor().image_processor
    text = {
        "vocab_size": like.text_config.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "tie_word_embeddings": False,
        "eos_token_id": like.text_config.eos_token_id, "pad_token_id": like.text_config.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": image.patch_size, "spatial_merge_size": image.merge_size, "num_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config=text, vision_config=vision, image_token_id=like.image_token_id,
            video_token_id=like.video_token_id, vision_start_token_id=like.vision_start_token_id,
        )
    ).eval()  # fmt: skip


def test_two_steps_of_training_are_those_of_separate_forwards(tmp_path: Path) -> None:
    """Default options but for the dropout: rollouts by `generate` first, then two steps on one script."""
    losses = []
    for scoring in ("tree", "separate"):
        options = {"student_scoring": scoring, "teacher_scoring": scoring, "lora_dropout": 0.0, "max_steps": 2}
        engine = trainer(qwen3_5_student(), config(tmp_path / scoring, **options), rows(8), texts=[VALID_A])
        engine.train()
        losses.append([log["loss"] for log in engine.state.log_history if "loss" in log])
        assert engine.scorer.scoring == scoring, "verification found the tree exact"
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
