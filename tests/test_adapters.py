"""Whose weights train and whose teach: adapters, frozen, averaged and merged copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    TEXTS,
    config,
    move,
    parameters,
    rows,
    tiny_student,
    trainer,
)

from vigos.train.adapters import build_lora, merged_copy, prepare_model
from vigos.train.teacher_weights import TeacherWeights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_weights_are_bit_identical_after_lora_training(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_student(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = config(
        tmp_path, max_steps=4, clip_mode="none", save_merged=True, learning_rate=1e-2, max_completion_length=12
    )
    engine = trainer(model, args, rows(8))
    start = parameters(engine)
    engine.train()
    assert any(not torch.equal(p, start[n]) for n, p in parameters(engine).items()), "nothing was trained"
    after = dict(engine.model.get_base_model().named_parameters())
    for name, parameter in before.items():
        inside, _, last = name.rpartition(".")
        assert torch.equal(after.get(f"{inside}.base_layer.{last}", after.get(name)), parameter), name


def test_frozen_teacher_of_full_training_stays(tmp_path: Path) -> None:
    args = config(tmp_path, lora=False, max_steps=3, clip_mode="none", learning_rate=1e-2, max_completion_length=12)
    model = tiny_student()
    before = copy.deepcopy(model)
    engine = trainer(model, args, rows(6))
    names = set(engine.teacher.parameters)
    assert names
    assert not any(n.startswith(("model.visual", "lm_head")) for n in names), "tower and head are frozen by default"
    engine.train()
    own = dict(engine.model.named_parameters())
    assert any(not torch.equal(own[n], p) for n, p in before.named_parameters())
    with engine.teacher.weights():
        assert all(torch.equal(own[n], p) for n, p in before.named_parameters())
    assert any(not torch.equal(own[n], p) for n, p in before.named_parameters()), "the student's own weights are back"
    for name, parameter in before.named_parameters():
        if name.startswith(("model.visual", "lm_head")):
            assert torch.equal(own[name], parameter), name


def test_moving_average_follows_its_recursion(tmp_path: Path) -> None:
    for lora in (True, False):
        args = config(tmp_path, lora=lora)
        model = prepare_model(tiny_student(torch.bfloat16 if not lora else torch.float32), args)
        policy = TeacherWeights(model, "ema", decay=0.75)
        assert policy.adapter == "on"
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert policy.copies.keys() == trained.keys()
        expected = {n: p.detach().float().clone() for n, p in trained.items()}
        for step in range(3):
            with torch.no_grad():
                for p in trained.values():
                    p.add_(0.01 * (step + 1))
            policy.update()
            expected = {n: 0.75 * e + 0.25 * trained[n].detach().float() for n, e in expected.items()}
        for name, e in expected.items():
            assert policy.copies[name].dtype == torch.float32
            assert torch.allclose(policy.copies[name], e, rtol=1e-6, atol=1e-7), name
        with policy.weights():
            assert all(torch.equal(p, policy.copies[n].to(p)) for n, p in trained.items())


def test_weights_come_back_after_an_error() -> None:
    model = tiny_student()
    policy = TeacherWeights(model, "frozen")
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="while scoring"), policy.weights():
        raise RuntimeError("while scoring")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers


def test_adapter_stays_in_the_language_model(tmp_path: Path) -> None:
    def adapted(**options: Any) -> set[str]:
        model = build_lora(tiny_student(), config(tmp_path, **options))
        return {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}

    names = adapted()
    assert len(names) == 2 * 7, "two layers of seven projections"
    assert all(".language_model.layers." in n for n in names)
    towered = adapted(train_vision=True)
    assert names < towered
    assert any(".visual." in n for n in towered - names)
    assert adapted(lora_target_modules=["all-linear"]) == names
    assert len(adapted(lora_target_modules=["q_proj"])) == 2


def test_adapter_on_the_head_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must not name the language-model head 'lm_head': with the adapter off"):
        trainer(tiny_student(), config(tmp_path, lora_target_modules=["q_proj", "lm_head"]), rows(1))
    with pytest.raises(ValueError, match=r"linear layers of the language model, got 'q_porj'; it has .*q_proj"):
        trainer(tiny_student(), config(tmp_path, lora_target_modules=["q_porj"]), rows(1))


def test_adapters_that_cannot_be_switched_off_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for options, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ):
        model = get_peft_model(tiny_student(), LoraConfig(target_modules=["q_proj"], **options))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            trainer(model, config(tmp_path), rows(1))
    head = get_peft_model(tiny_student(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="head"):
        trainer(head, config(tmp_path), rows(1))


def test_adapters_without_a_merged_copy_are_refused_at_the_start(tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for adapter, name in ((dora, "DoRA"), (ia3, "IA3")):
        with pytest.raises(ValueError, match=rf"save_merged must be false for adapter 'default'.*got {name}"):
            trainer(get_peft_model(tiny_student(), adapter), config(tmp_path, save_merged=True), rows(1))
    engine = trainer(get_peft_model(tiny_student(), ia3), config(tmp_path, clip_mode="none"), rows(2), texts=TEXTS[:2])
    engine.train()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_own_adapter_is_trained(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(target_modules=["v_proj"], r=2))
    engine = trainer(model, config(tmp_path, clip_mode="none"), rows(2), texts=TEXTS[:2])
    start = parameters(engine)
    engine.train()
    assert {n.split(".")[-4] for n in start} == {"v_proj"}
    assert any(not torch.equal(p, start[n]) for n, p in parameters(engine).items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_copy_is_the_adapted_model(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    from transformers import AutoModelForImageTextToText

    args = config(tmp_path, max_steps=1, clip_mode="none", save_merged=True)
    engine = trainer(tiny_student(dtype, tied=tied), args, rows(2), texts=TEXTS[:2])
    move(engine)
    engine.train()
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    merged = merged_copy(engine.model)
    assert all(torch.equal(p, before[n]) for n, p in engine.model.named_parameters())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=dtype)
    state = dict(loaded.named_parameters())
    assert (
        state.keys()
        == dict(merged.named_parameters()).keys()
        == dict(tiny_student(tied=tied).named_parameters()).keys()
    )
    assert all(torch.equal(p, state[n]) for n, p in merged.named_parameters())
    name = "model.language_model.layers.1.mlp.up_proj"
    layer = engine.model.get_base_model().get_submodule(name)
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    exact = layer.base_layer.weight.float() + 2.0 * delta  # lora_alpha / lora_r
    assert torch.equal(state[f"{name}.weight"], exact.to(dtype))
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        a, b = (m.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (engine.model, loaded))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # the merged weight is rounded once more
    assert (a - b).abs().max() <= tolerance * a.abs().max()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_changes_the_base_is_refused(start: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    with pytest.raises(ValueError, match=f"adapter 'default' must not be initialised by '{start}'"):
        trainer(model, config(tmp_path), rows(1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens, a Embedding"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=["embedding", "bias", "tokens"],
)
def test_adapter_that_cannot_be_merged_is_refused_before_the_first_step(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_student(), LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match=f"save_merged must be false for .*{named}"):
        trainer(model, config(tmp_path, save_merged=True), rows(1))
