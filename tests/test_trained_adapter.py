"""Adapters that were trained before, and what a run leaves of any adapter: the teacher, resuming, the saved folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.training import CUT_OFF, PROMPTS, VALID_A, config, processor, rows, tiny_student, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from vigos.models.load import load_adapter
from vigos.scoring.teacher import teacher_mode
from vigos.train.adapters import base_copy, check_mergeable, merged_copy
from vigos.train.compare import SavedCheck, SavedModelError, fixed_sequence
from vigos.train.teacher_weights import TeacherWeights

TEXTS = [VALID_A, CUT_OFF]


def adapted(trained: bool = True, **options: Any) -> Any:
    """A tiny student under LoRA, trained before unless told otherwise."""
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2} | options
    model = get_peft_model(tiny_student(), LoraConfig(**options))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(8, 24)[None]).logits


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_the_frozen_teacher_is_the_model_as_it_came(trained: bool) -> None:
    """With the adapter off it would be the model before the adapter, which never was the student."""
    model = adapted(trained).eval()
    before = logits(model)
    teacher = TeacherWeights(model, "frozen")
    assert teacher.adapter == ("on" if trained else "off")
    assert bool(teacher.copies) == trained
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    student = logits(model)
    with teacher.weights(), teacher_mode(model, adapter=teacher.adapter):
        torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(model), student, rtol=0, atol=0)
    assert (student - before).abs().max() > 0.1


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("given", ["the same", "the checkpoint's", "a fresh one"])
def test_a_resumed_run_keeps_the_teacher_that_it_began_with(tmp_path: Path, given: str) -> None:
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_merged": True}
    options |= {"clip_mode": "none", "lora": True}
    whole = trainer(adapted(), config(tmp_path / "whole", **options), rows(6), texts=TEXTS)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    model = adapted(trained=given == "the same")
    if given == "the checkpoint's":
        model = load_adapter(tiny_student(), checkpoint, trainable=True)
    again = trainer(model, config(tmp_path / "again", **options), rows(6), texts=TEXTS)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    saved = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == load_file(checkpoint / "adapter_model.safetensors").keys()  # and no teacher's


def test_a_fresh_run_resumed_from_its_checkpoints_adapter_has_the_base_as_teacher(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "clip_mode": "none"}
    whole = trainer(adapted(trained=False), config(tmp_path / "whole", **options), rows(6), texts=TEXTS)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    model = load_adapter(tiny_student(), checkpoint, trainable=True)
    again = trainer(model, config(tmp_path / "again", **options), rows(6), texts=TEXTS)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)


def test_an_adapter_loaded_for_inference_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_student(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter must be trainable; load it with is_trainable=True"):
        trainer(model, config(tmp_path), rows(2))


# --- What is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "merged"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"trainable_token_indices": [9, 10]}, False),
        ({"target_modules": ["q_proj", "visual.patch_embed.proj"]}, False),
    ],
    ids=["plain", "rslora", "dora", "lora_bias", "embed_tokens", "token indices", "Conv3d"],
)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, options: dict[str, Any], merged: bool) -> None:
    """Every folder is loaded again and compared; what cannot be merged is refused before the first step."""
    data = rows(2)
    if not merged:
        with pytest.raises(ValueError, match="save_merged must be false"):
            trainer(adapted(**options), config(tmp_path / "no", save_merged=True), data, texts=TEXTS)
    run = trainer(adapted(**options), config(tmp_path, save_merged=merged, train_vision=True), data, texts=TEXTS)
    run.train()
    assert (tmp_path / "adapter").is_dir()
    assert (tmp_path / "merged").is_dir() == merged


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_a_folder_that_is_not_the_trained_model_is_an_error(tmp_path: Path, full: bool) -> None:
    model = tiny_student() if full else adapted()
    run = trainer(model, config(tmp_path, lora=not full), rows(2), texts=TEXTS)
    run.train()
    name = "model" if full else "adapter"
    check = SavedCheck(run.model, fixed_sequence(processor(), PROMPTS))
    check(name, tmp_path / name)
    (file,) = (tmp_path / name).glob("*.safetensors")
    tensors = load_file(file)
    save_file({k: v * 0 if "v_proj" in k else v for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(SavedModelError, match=rf"{name}/ was not written, .* nats away on average, where 0\.001 is"):
        check(name, tmp_path / name)


def test_a_wrong_merged_model_takes_no_place_and_the_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge as if the adapter were forgotten."""
    monkeypatch.setattr("vigos.train.final.merged_copy", base_copy)
    run = trainer(adapted(), config(tmp_path, save_merged=True), rows(2), texts=TEXTS)
    with pytest.raises(SavedModelError, match="merged/ was not written"):
        run.train()
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq"])
def test_adapters_that_change_the_base_are_refused(tmp_path: Path, start: str) -> None:
    model = adapted(trained=False)
    model.peft_config["default"].init_lora_weights = start  # corda and loftq need data, or a quantised base, to begin
    with pytest.raises(ValueError, match=f"adapter 'default' must not be initialised by '{start}'"):
        trainer(model, config(tmp_path), rows(1))


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids=["one", "several"])
def test_adapters_of_experts_are_merged_as_they_were_trained(parameters: list[str]) -> None:
    names = [f"mlp.experts.{name}" for name in parameters]
    lora = LoraConfig(target_modules=[], target_parameters=names, r=2, lora_dropout=0.0)
    model = get_peft_model(tiny_model("qwen3_5_moe"), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    check_mergeable(model)
    ids = torch.arange(8, 24)[None]
    with torch.no_grad():
        wanted, merged = model(input_ids=ids).logits, base_copy(model)(input_ids=ids).logits
        assert (wanted - merged).abs().max() > 0.01
    state = {name: tensor.clone() for name, tensor in merged_copy(model).state_dict().items()}
    plain = tiny_model("qwen3_5_moe").eval()
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "weights"])
def test_16_bits_have_a_bound_of_their_own(tmp_path: Path, how: dict[str, Any]) -> None:
    """Autocast computes what was trained, and not what is loaded again; merging rounds 16-bit weights once more."""
    how = dict(how)
    model = tiny_student(how.pop("dtype", torch.float32))
    trainer(model, config(tmp_path, save_merged=True, **how), rows(2), texts=TEXTS).train()
    assert (tmp_path / "merged").is_dir()
