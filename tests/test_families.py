"""The table of families: each image-text family of transformers has an answer; refusals come before a rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.training import config, rows, trainer
from transformers import CONFIG_MAPPING, Lfm2Config, Lfm2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vigos.cli import main
from vigos.models.families import FAMILIES, describe, family_of, layer_kinds, tree_refusal


def test_rows_name_families_that_there_are() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
    assert set(types) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_every_image_text_family_has_an_answer(model_type: str) -> None:
    """Exact by a test, refused with a reason, or compared before the first update."""
    made: Any = CONFIG_MAPPING[model_type]()
    answer = describe(made)["prefix tree"]
    assert answer.startswith(("exact", "no: ", "compared")), answer
    assert layer_kinds(made)
    if getattr(made, "is_encoder_decoder", False):
        assert tree_refusal(made) == "it is no decoder-only model"


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified", "paligemma", "mllama", "lfm2_vl", "llama4"])
def test_families_that_cannot_share_say_why(model_type: str) -> None:
    assert tree_refusal(CONFIG_MAPPING[model_type]())


def test_attention_that_looks_ahead_is_refused_in_a_family_that_is_not_listed() -> None:
    made = CONFIG_MAPPING["gemma3_text"](use_bidirectional_attention=True)
    assert family_of(made) is None
    assert "looks ahead" in str(tree_refusal(made))


def test_the_trainer_refuses_before_it_samples(tmp_path: Path) -> None:
    text = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM: its short convolutions .*--student-scoring separate"):
        trainer(Lfm2ForCausalLM(text), config(tmp_path), rows(2))


def test_doctor_prints_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--model", "builtin", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["family"], printed["prefix tree"]) == ("Qwen2.5-VL", "exact, by a test")
