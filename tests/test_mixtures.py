"""Mixtures of experts: adapters of experts and their merged copies, the load-balancing loss, frozen routers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training
from helpers.tiny_models import mixed_rows, tiny_model
from helpers.training import VALID_A, config, rows, trainer
from test_model_families import assert_same, far, grid_processor, student

from vigos.models.routers import LoadBalance, routers
from vigos.scoring.forwards import plan_forwards
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.teacher import TeacherScorer
from vigos.train.adapters import merged_copy, prepare_model

MIXTURES = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_next", "glm4v_moe", "nemotron_h")
EXPERTS = {"lora_target_parameters": ["auto"], "lora_dropout": 0.0}


def randomised(model: Any) -> Any:
    """The adapted model with small values in place of the zeros that an adapter begins with."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
            assert "lora_" in name
    return model


def merged(model: Any, folder: Path) -> Any:
    """The merged copy as it is read again."""
    copy = merged_copy(model)
    copy.save_pretrained(folder / "merged")
    return type(copy).from_pretrained(folder / "merged").eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_adapted_merged_and_scored_by_the_tree(family: str, tmp_path: Path) -> None:
    base, sequences = tiny_model(family, seed=2), mixed_rows(family)
    with torch.no_grad():
        plain = hidden_states(base, sequences)
    model = randomised(prepare_model(base, config(tmp_path, **EXPERTS, save_merged=True)))
    for part in ("experts.lora_", "experts.base_layer.lora_"):  # both parameters of a block's experts
        assert any(part in name for name, p in model.named_parameters() if p.requires_grad), part
    assert_same(model, sequences)
    with torch.no_grad():
        adapted = hidden_states(model, sequences)
        assert far(adapted, plain) > 1e-2
        assert far(hidden_states(merged(model, tmp_path), sequences), adapted) < 1e-4
    assert TeacherScorer(model).adapter == "off"
    with torch.no_grad(), model.disable_adapter():
        assert far(hidden_states(model, sequences), plain) < 1e-6


def test_what_stays_as_it_is_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vigos"):
        prepare_model(tiny_model("qwen3_5_moe"), config(tmp_path))
        assert "as they are: mlp.experts.down_proj, mlp.experts.gate_up_proj, shared_expert_gate, and" in caplog.text
        caplog.clear()
        prepare_model(tiny_model("qwen3"), config(tmp_path, lora_target_modules=["auto"]))
        assert "LoRA leaves" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_target_parameters": ["auto"], "lora_dropout": 0.05}, "lora_target_parameters needs lora_dropout 0"),
        ({"use_dora": True, "save_merged": True}, "save_merged must be false with use_dora"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be at least 0"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_experts_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none are known of Qwen3ForCausalLM"):
        prepare_model(tiny_model("qwen3"), config(tmp_path, **EXPERTS))
    with pytest.raises(ValueError, match=r"got 'w1'; it has mlp.experts.down_proj, mlp.experts.gate_up_proj"):
        prepare_model(tiny_model("qwen3_5_moe"), config(tmp_path, lora_target_parameters=["w1"]))


@pytest.mark.parametrize("option", ["use_rslora", "use_dora"])
def test_other_kinds_of_lora_pass_through(option: str, tmp_path: Path) -> None:
    """rsLoRA changes the scale, and so the merged copy; DoRA has an adapter-free teacher as LoRA has."""
    base, sequences = tiny_model("qwen3"), mixed_rows("qwen3")
    with torch.no_grad():
        plain = hidden_states(base, sequences)
        model = prepare_model(base, config(tmp_path, lora_r=4, lora_alpha=8, **{option: True}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        adapted = hidden_states(model, sequences)
        if option == "use_rslora":
            assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 4.0
            assert far(hidden_states(merged(model, tmp_path), sequences), adapted) < 1e-5
        with model.disable_adapter():
            assert far(hidden_states(model, sequences), plain) < 1e-6
    assert far(adapted, plain) > 1e-2


# ---- load balancing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_load_balance_of_the_tree_is_that_of_separate_forwards(family: str) -> None:
    """And in one padded batch it is transformers' own, padding left out, where the family has one."""
    model, sequences = tiny_model(family), mixed_rows(family)
    losses, gradients = [], []
    for options in ({"scoring": "separate"}, {"scoring": "tree"}, {"scoring": "tree", "token_budget": 60}):
        balance = LoadBalance(model)
        hidden_states(model, sequences, balance=balance, **options)
        losses.append(balance.loss())
        gradients.append(torch.autograd.grad(losses[-1], model.get_input_embeddings().weight)[0])
    assert losses[0] > 1.5  # two of four experts a token: 2 where all are used alike
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss.item() == pytest.approx(losses[0].item(), abs=1e-5)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()
    if family != "nemotron_h":
        (batch,) = plan_forwards(model, sequences, "separate", 10_000, "auto", None)
        theirs = model(**batch.build(), output_router_logits=True).aux_loss
        assert losses[0].item() == pytest.approx(theirs.item(), abs=1e-5)


def test_load_balance_is_an_option_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds its share to the loss, over two micro-batches; a model without experts refuses it."""
    monkeypatch.setattr(training, "processor", grid_processor)
    losses = {}
    for coefficient in (0.0, 0.01):
        args = config(
            tmp_path / str(coefficient), router_aux_loss_coef=coefficient, gradient_accumulation_steps=2,
            lora_target_modules=["auto"],
        )  # fmt: skip
        engine = trainer(student("qwen3_5_moe"), args, [{**r, "images": []} for r in rows(4)], texts=[VALID_A])
        engine.train()
        losses[coefficient] = engine.state.log_history[0]
    added = losses[0.01]["loss"] - losses[0.0]["loss"]
    assert losses[0.01]["loss/router"] > 1.5
    assert added == pytest.approx(0.01 * losses[0.01]["loss/router"], rel=1e-3)
    assert "loss/router" not in losses[0.0]
    with pytest.raises(ValueError, match="router_aux_loss_coef must be 0 for Qwen3ForCausalLM, which has no routers"):
        trainer(student("qwen3"), config(tmp_path, router_aux_loss_coef=0.01), rows(2))


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_routers_stay_frozen_in_full_fine_tuning(coefficient: float, tmp_path: Path) -> None:
    """Unless something keeps the experts evenly used."""
    model = prepare_model(
        tiny_model("qwen3_5_moe"), config(tmp_path, lora=False, router_aux_loss_coef=coefficient)
    )  # fmt: skip
    found = [parameter.requires_grad for router, _ in routers(model) for parameter in router.parameters()]
    assert found == [coefficient > 0] * len(found)
    assert found
