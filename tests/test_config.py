"""Options: defaults, presets, mistakes, and that each of them is read and explained."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import vigos
from vigos.method.objective import PRESETS, choices_of
from vigos.train.config import ViGOSConfig

OWN = [f for f in fields(ViGOSConfig) if f.name in ViGOSConfig.__annotations__]


def make(tmp_path: Path, **options: object) -> ViGOSConfig:
    return ViGOSConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    config = make(tmp_path)
    assert (config.lambda_perception, config.lambda_reasoning, config.lambda_reference) == (1, 1, 2)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 128, 0.05)
    assert (config.learning_rate, config.max_grad_norm, config.lr_scheduler_type) == (5e-6, 0.1, "linear")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens) == (1.1, 0.95, 20, 4096)
    assert (config.clip_mode, config.token_clip, config.teacher) == ("token", 0.05, "frozen")
    assert (config.reasoning_prefix, config.span_style, config.normalize) == ("student", "paper", "tokens")


def test_preset_fills_what_was_left_unset(tmp_path: Path) -> None:
    config = make(tmp_path, preset="released")
    assert (config.reasoning_prefix, config.span_style, config.normalize) == ("think", "released", "active")
    assert (config.description_end_clip, config.reasoning_start_clip) == (0.05, 0.05)
    kept = make(tmp_path, preset="released", normalize="tokens", description_end_clip=0.5)
    assert (kept.normalize, kept.description_end_clip, kept.span_style) == ("tokens", 0.5, "released")


def test_presets_name_the_same_fields() -> None:
    assert PRESETS["paper"].keys() == PRESETS["released"].keys()
    for f in OWN:
        if f.name in PRESETS["paper"]:
            assert f.default is None, f"{f.name} is filled by presets, so its default must say 'unset'"


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    [
        ("reasoning_prefix", "studnet", "student"),
        ("method", "vigo", "vigos"),
        ("normalize", "token", "tokens"),
        ("clip_mode", "entries", "entry"),
        ("preset", "release", "released"),
    ],
)
def test_misspelt_word_is_an_error_with_a_suggestion(tmp_path: Path, name: str, wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be one of .*got '{wrong}'; did you mean '{meant}'\?"):
        make(tmp_path, **{name: wrong})


@pytest.mark.parametrize(
    "options",
    [
        {"lambda_perception": -1.0},
        {"lambda_reference": float("nan")},
        {"token_clip": 0.0},
        {"entry_clip": -0.1},
        {"description_end_clip": -1.0},
        {"divergence_temperature": 0.0},
        {"jsd_beta": 1.0},
        {"ema_decay": 1.0},
        {"lora_dropout": 1.0},
        {"lora_r": 0},
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"num_generations": 0},
        {"rollout_batch_size": -2},
        {"rollout_batch_size": 0},
        {"max_prompt_length": -1},
        {"max_prompt_length": None},
        {"vllm_gpu_memory_utilization": 0.0},
        {"lora_target_modules": []},
        {"completion_steps": -1},
        {"token_budget": 0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_number_out_of_range_is_named(tmp_path: Path, options: dict[str, object]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"^{name} must .*got {'none' if value == [] else re.escape(str(value))}"):
        make(tmp_path, **options)


def test_combinations_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one of lambda"):
        make(tmp_path, lambda_perception=0.0, lambda_reasoning=0.0, lambda_reference=0.0)
    with pytest.raises(ValueError, match="remove_unused_columns"):
        make(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"train_head .* lora=False"):
        make(tmp_path, train_head=True)


def test_opsd_has_one_term_of_weight_one(tmp_path: Path) -> None:
    assert make(tmp_path, method="opsd", lambda_reference=5.0).objective.lambdas == (0.0, 0.0, 1.0)
    assert make(tmp_path).objective.lambdas == (1.0, 1.0, 2.0)


def test_every_option_is_explained_and_is_a_flag(tmp_path: Path) -> None:
    parser = HfArgumentParser([ViGOSConfig])  # type: ignore[list-item]
    flags = {option for action in parser._actions for option in action.option_strings}
    for f in OWN:
        text = f.metadata["help"]
        assert len(text) > 15, f.name
        assert "%" not in text, f"argparse reads a per cent sign in the help of {f.name}"
        assert f"--{f.name}" in flags
    assert parser.format_help()
    flags_given = ["--output_dir", str(tmp_path), "--use_cpu", "--preset", "released", "--normalize", "sequence"]
    flags_given += ["--lora_target_modules", "q_proj", "v_proj", "--lora", "false", "--top-k", "7"]
    (config,) = parser.parse_args_into_dataclasses(flags_given)
    assert (config.preset, config.normalize, config.lora, config.top_k) == ("released", "sequence", False, 7)
    assert config.lora_target_modules == ["q_proj", "v_proj"]


def test_every_option_is_read() -> None:
    folder = Path(vigos.__file__).parent
    source = "\n".join(p.read_text(encoding="utf-8") for p in folder.rglob("*.py"))
    inherited = {"learning_rate", "max_grad_norm", "num_train_epochs", "gradient_accumulation_steps", "logging_steps"}
    for f in OWN:
        if f.name not in inherited | {"dataloader_pin_memory"}:  # transformers reads these
            assert re.search(rf"(?:args|config|self|objective)\.{f.name}\b", source), f"nothing reads {f.name}"


def test_choices_hold_our_own_fields_alone() -> None:
    choices = choices_of(ViGOSConfig)
    assert choices["teacher"] == ("frozen", "ema", "live")
    assert "output_dir" not in choices
    assert set(choices) <= {f.name for f in OWN}
