"""TRL's own DistillationTrainer on a tiny text model, with and without the patch, from one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.slow

WORDS = ["the", "a", "red", "green", "blue", "seven", "three", "digit", "is", "what", "colour", "?", "one", "two"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def model(seed: int) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    out = Qwen2ForCausalLM(config)
    with torch.no_grad():  # the initial 0.02 leaves every softmax flat
        out.lm_head.weight.normal_(std=0.4)
    return out


def curve(folder: Path, beta: float, steps: int = 5) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and entropies of each step, and the weights at the end."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    rows = [{"prompt": f"what colour is {digit} ?"} for digit in ("seven", "three", "one", "two")] * 6
    args = DistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps,
        learning_rate=5e-3, max_completion_length=12, beta=beta, logging_steps=1, report_to="none", seed=3,
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=model(0), teacher_model=model(1), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return [x["loss"] for x in logs], [x["entropy"] for x in logs], weights


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_same_curve_with_and_without_the_patch(beta: float, tmp_path: Path) -> None:
    from vigos.integrations import trl as drop_in

    calls = []
    losses, entropies, weights = curve(tmp_path / "before", beta)
    original = drop_in.chunked_divergence_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_in, "chunked_divergence_loss", lambda *a, **k: calls.append(1) or original(*a, **k))
        with drop_in.patched(["distillation"]):
            ours = curve(tmp_path / "after", beta)
    assert len(calls) == 10  # 5 steps of 2 micro-batches went through ours
    assert losses[0] > 0.1
    assert max(abs(a - b) for a, b in zip(losses, ours[0], strict=True)) < 1e-4
    assert max(abs(a - b) for a, b in zip(entropies, ours[1], strict=True)) < 1e-4
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(ours[2][name], weight, rtol=1e-3, atol=1e-4)
