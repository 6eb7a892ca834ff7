"""A base model in 4 bits: loaded, adapted, its own frozen teacher, and merged out of place."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.training import VALID_A, config, rows, trainer
from test_model_families import far
from transformers import AutoModelForImageTextToText

from vigos.launch import load_model
from vigos.method.encode import EncodedPrompt, ScoredSequence
from vigos.models import load
from vigos.scoring.hidden_states import hidden_states
from vigos.train.adapters import prepare_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def sequences() -> list[ScoredSequence]:
    prompt = EncodedPrompt(torch.arange(20, 50), None, None)
    return [ScoredSequence(prompt, torch.arange(60 + i, 80), torch.arange(10), (0, "")) for i in range(3)]


def test_the_language_model_alone_is_quantised() -> None:
    model, _ = load_model("builtin", load_in_4bit=True)
    plain, _ = load_model("builtin")
    assert model.is_quantized
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    assert {kind for name, kind in kinds.items() if name.startswith(decoder)} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if not name.startswith(decoder)} == {"Linear"}
    with torch.no_grad():
        tree = hidden_states(model, sequences())
        assert far(tree, hidden_states(model, sequences(), scoring="separate")) < 1e-5
        assert 1e-3 < far(tree, hidden_states(plain, sequences())) < 0.5


def test_two_steps_and_a_merged_copy(tmp_path: Path) -> None:
    """The teacher is the quantised model without the adapter; what is merged and saved is no longer quantised."""
    model, _ = load_model("builtin", load_in_4bit=True)
    with torch.no_grad():
        initial = hidden_states(model, sequences())
    args = config(tmp_path, max_steps=2, save_merged=True, learning_rate=1e-2, lora_target_modules=["auto"])
    engine = trainer(model, args, rows(4), texts=[VALID_A])
    engine.train()
    first, second = (log["loss"] for log in engine.state.log_history if "loss" in log)
    assert first > 0
    assert second != first
    core = engine.model
    packed = {name: p.clone() for name, p in core.named_parameters() if p.dtype == torch.uint8}
    assert packed
    with torch.no_grad():
        trained = hidden_states(core, sequences())
        with core.disable_adapter():
            assert far(hidden_states(core, sequences()), initial) < 1e-6
        assert far(trained, initial) > 1e-3
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert far(hidden_states(saved.eval(), sequences()), trained) < 1e-4
    assert all(torch.equal(dict(core.named_parameters())[name], value) for name, value in packed.items())


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model("builtin", load_in_4bit=True)
    with pytest.raises(ValueError, match="lora must be true for a model in 4 bits"):
        prepare_model(model, config(tmp_path, lora=False))
    from vigos.world import checkpoint_path

    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16 with load_in_4bit"):
        load.load_model(str(checkpoint_path()), dtype="auto", load_in_4bit=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"load_in_4bit needs bitsandbytes: pip install 'vigos\[quantization\]'"):
        load_model("builtin", load_in_4bit=True)
