"""The table of families: each image-text family of transformers has an answer; refusals come before a rollout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.small_families import SMALL, small_model
from helpers.tiny_models import LAYERS, tiny_model, words
from helpers.training import config
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vigos.cli import main
from vigos.method.encode import EncodedPrompt, ScoredSequence
from vigos.models.compat import is_stateful
from vigos.models.families import FAMILIES, describe, family_of, layer_kinds, tree_refusal
from vigos.scoring.check import TreeCheck
from vigos.scoring.forwards import check_tree
from vigos.scoring.hidden_states import hidden_states
from vigos.train.adapters import prepare_model


def test_rows_name_families_that_there_are() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(types) == len(set(types))
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        pytest.skip("families of the table came to transformers until 5.23")
    assert set(types) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_every_image_text_family_has_an_answer(model_type: str) -> None:
    """Exact by a test, refused with a reason, or compared before the first update."""
    try:
        made: Any = CONFIG_MAPPING[model_type]()
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__} has no default configuration of it: {error}")
    answer = describe(made)["prefix tree"]
    assert answer.startswith(("exact", "no: ", "compared")), answer
    assert layer_kinds(made)
    if getattr(made, "is_encoder_decoder", False):
        assert tree_refusal(made) == "it is no decoder-only model"


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified", "paligemma", "mllama", "llama4"])
def test_families_that_cannot_share_say_why(model_type: str) -> None:
    assert tree_refusal(CONFIG_MAPPING[model_type]())


def test_attention_that_looks_ahead_is_refused_in_a_family_that_is_not_listed() -> None:
    made = CONFIG_MAPPING["gemma3_text"](use_bidirectional_attention=True)
    assert family_of(made) is None
    assert "looks ahead" in str(tree_refusal(made))


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_next", "internvl"])
def test_a_default_adapter_covers_how_every_block_mixes_tokens(family: str, tmp_path: Path) -> None:
    """With the default dropout, and nothing but adapters is trained: experts and routers are frozen."""
    model = prepare_model(tiny_model(family), config(tmp_path, lora_dropout=0.05))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name and "experts." not in name and "visual" not in name for name in trained)
    for block in range(LAYERS):
        assert any(f"layers.{block}." in name and "attn" in name for name in trained), block


def test_doctor_prints_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--model", "builtin", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["family"], printed["prefix tree"]) == ("Qwen2.5-VL", "exact, by a test")


# ---- every family that is easily made small, scored ------------------------------------------------------------------

QUICK = ("aria", "gemma4", "idefics3", "kosmos-2.5", "mistral3", "paligemma")


@pytest.mark.parametrize(
    "model_type",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL],
)
def test_no_family_is_scored_wrongly_in_silence(model_type: str) -> None:
    """The tree's states are those of separate forwards, or it is refused, or left with a warning."""
    model = small_model(model_type)
    first, second = words(20, 1), words(12, 2)
    prompts = [EncodedPrompt(ids, None, None) for ids in (first, first, torch.cat([first[:12], second]))]
    sequences = [
        ScoredSequence(prompt, words(8 + i, 3 + i // 2), torch.arange(2, 8 + i), (0, ""))
        for i, prompt in enumerate(prompts)
    ]
    check = TreeCheck()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if tree_refusal(model.config) or (family_of(model.config) is None and is_stateful(model)):
            with pytest.raises(ValueError, match="use scoring='separate'"):
                check_tree(model)
            return
        states = check.hidden_states(model, sequences, "student")
        exact = hidden_states(model, sequences, scoring="separate", token_budget=1)
    assert ((states - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 1e-4
    assert check._seen["student"] > 0, "it was compared"
    assert check.failed == any("go on with scoring='separate'" in str(w.message) for w in caught)
