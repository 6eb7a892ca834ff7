"""Refuse models and adapters of others that bring code, are something else, or fit only in part."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import tiny_student
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vigos.launch import EvalSource, load_model, load_served
from vigos.models.load import load_adapter
from vigos.world import checkpoint_path, write_world

LAYERS = r".*language_model.*(q|v)_proj"


def adapter(folder: Path, config: Any = None, **changes: Any) -> Path:
    """A real adapter, its configuration changed afterwards."""
    config = config or LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
    get_peft_model(tiny_student(), config).save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_code(folder: Path, mark: Path, **config: Any) -> Path:
    """A model folder that brings a configuration, a model and a processor class of its own."""
    shutil.copytree(checkpoint_path(), folder)
    loaded = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(loaded | config))
    (folder / "theirs.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig\nclass Theirs(PretrainedConfig):\n    model_type = 'theirs'\n"
    )
    return folder


FOREIGN = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}


def test_code_in_a_model_folder_is_neither_asked_for_nor_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder, mark = with_code(tmp_path / "model", tmp_path / "mark", **FOREIGN), tmp_path / "mark"
    for load in (
        lambda: load_model(str(folder)),
        lambda: load_served(str(folder), "http://127.0.0.1:9/v1", "m", concurrency=1),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    assert not mark.exists()


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_nor_is_that_of_processors(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = with_code(tmp_path / "model", tmp_path / "mark")
    loaded = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    names = ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoFeatureExtractor")
    theirs = {name: "theirs.Theirs" if name != "AutoTokenizer" else ["theirs.Theirs", None] for name in names}
    loaded |= {"auto_map": theirs}
    (folder / file).write_text(json.dumps(loaded))
    try:  # transformers may do without it
        load_served(str(folder), "http://127.0.0.1:9/v1", "m", concurrency=1)
    except ValueError as refused:
        assert "trust_remote_code" in str(refused)  # noqa: PT017
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_eval_on_a_server_does_not_ask_in_a_real_process(tmp_path: Path) -> None:
    folder, mark = with_code(tmp_path / "model", tmp_path / "mark", **FOREIGN), tmp_path / "mark"
    data = write_world(tmp_path / "world", "test", n=1)
    options = ["--model", str(folder), "--data", str(data), "--output-dir", str(tmp_path / "out")]
    options += ["--server-url", "http://127.0.0.1:9/v1", "--server-model", "m"]
    done = subprocess.run(
        [sys.executable, "-m", "vigos", "eval", *options], input="y\ny\n", capture_output=True, text=True, check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "trust_remote_code" in done.stderr
    assert not mark.exists()


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_path(), folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=LAYERS), LoHaConfig(target_modules=LAYERS),
    LoKrConfig(target_modules=LAYERS), IA3Config(target_modules=LAYERS, feedforward_modules="none"),
    LoraConfig(r=2, target_modules=LAYERS, use_dora=True), LoraConfig(r=2, target_modules=LAYERS, bias="lora_only")],
    ids=lambda c: f"{c.peft_type.value}-{getattr(c, 'use_dora', '')}{getattr(c, 'bias', '')}")  # fmt: skip
@pytest.mark.parametrize("trainable", [False, True])
def test_kinds_of_adapters_that_are_read(config: Any, trainable: bool, tmp_path: Path) -> None:
    loaded = load_adapter(tiny_student(), adapter(tmp_path, config), trainable=trainable)
    assert any(p.requires_grad for n, p in loaded.named_parameters() if "bias" not in n) == trainable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "makes peft import 'megatron.evil'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "makes peft import 'evil'"),
        ({"peft_type": "XLORA", "adapters": {"a": "../other"}}, "peft_type must be one of LORA, .* got 'XLORA'"),
        ({"peft_type": "PROMPT_TUNING"}, "got 'PROMPT_TUNING'"),
        ({"peft_type": None}, "got None"),
        ({"peft_type": ["LORA"]}, r"got \['LORA'\]"),
        ({"r": "2"}, "does not fit"),
        ({"r": 4}, "does not fit Qwen2_5_VL.*size mismatch"),
        ({"r": -1}, "does not fit"),
        ({"target_modules": r".*language_model.*q_proj"}, "4 tensors of this model's adapter, got 8: 0 missing, 4"),
        ({"target_modules": r".*language_model.*(q|k|v)_proj"}, "4 missing, 0 unexpected"),
        ({"target_modules": "none_of_them"}, "does not fit"),
        ({"target_modules": 7}, "does not fit"),
        ({"lora_alpha": "much"}, "does not fit"),
        ({"use_dora": True}, r"\d missing, 0 unexpected"),
        ({"layers_pattern": 3, "layers_to_transform": "x"}, "does not fit"),
    ],
)
def test_adapters_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_student(), adapter(tmp_path / "adapter", **changes))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", None, "must be a folder with adapter_config.json"),
        ("adapter_config.json", b"{", "must hold a JSON object: "),
        ("adapter_config.json", b"[" * 100_000, "must hold a JSON object: "),
        ("adapter_config.json", b"[]", "must hold a JSON object, got list"),
        ("adapter_config.json", b"{" + b" " * 2**20 + b"}", "must be a folder with adapter_config.json"),
        ("adapter_model.safetensors", None, "must hold adapter_model.safetensors"),
        ("adapter_model.safetensors", b"", "adapter"),
        ("adapter_model.safetensors", b"\xff" * 100, "adapter"),
    ],
)
def test_damaged_adapters_are_refused(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_student(), folder)


def test_an_adapter_of_another_model_is_not_evaluated(tmp_path: Path) -> None:
    """No tensor fits: before, the base's numbers stood under the adapter's name."""
    tensors = load_file(adapter(tmp_path) / "adapter_model.safetensors")
    save_file({n.replace("layers", "blocks"): t for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"8 missing, 8 unexpected, such as base_model.*another model"):
        load_adapter(tiny_student(), tmp_path)
    lora = LoraConfig(r=2, target_modules=r".*(q|v)_proj")
    source = EvalSource(model="builtin", adapter=str(adapter(tmp_path / "other", lora)))
    with pytest.raises(ValueError, match=r"adapter .* does not fit|missing"):
        source.student()


def test_a_model_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and put the adapter on it."""
    for folder in (adapter(tmp_path / "alone"), adapter(shutil.copytree(checkpoint_path(), tmp_path / "whole"))):
        with pytest.raises(ValueError, match=r"model must be whole, but .* holds an adapter"):
            load_model(str(folder))


def test_models_and_adapters_are_loaded_in_one_place() -> None:
    root = Path(__file__).parents[1] / "vigos"
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"\b(Auto\w+|PeftModel|PeftConfig)\.from_pretrained", path.read_text())
    }
    assert found == {"models/load.py", "world/__init__.py"}, "the world's own model is the one exception"
