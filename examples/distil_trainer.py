"""Distillation of one causal language model into another with `transformers.Trainer`, without a logit in memory.

    python examples/distil_trainer.py --steps 20

A Trainer of your own changes in `compute_loss` alone: where logits of two models met in a KL, what went into the two
heads meets in `vigos.linear_divergence`. Both heads are passed, each with its bias, scale and softcap; the labels leave
out padding and prompt; the sum is divided by the Trainer's count of labels, so that accumulation and data parallelism
change nothing; and autocast is the Trainer's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import vigos
from vigos.models.parts import head_rows
from vigos.models.sharding import gathered_head


class DistilTrainer(Trainer):
    """Train `model` towards `teacher`, which reads the same ids: KL(teacher || student) of the tokens with a label."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # have `num_items_in_batch` counted over the whole step
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss in nats a label; of the whole step, where the Trainer counts its labels."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        supervised = torch.zeros_like(labels, dtype=torch.bool)
        supervised[:, :-1] = labels[:, 1:] != -100  # position t predicts token t + 1
        rows = supervised.flatten().nonzero().squeeze(1)
        # Through the model's wrapper (DDP, FSDP2), whose hooks run; no logits are computed.
        hidden = head_rows(model, inputs, rows)  # (R, D)
        with torch.no_grad():
            teacher_hidden = head_rows(self.teacher, inputs, rows)  # (R, D_t)
        with gathered_head(model) as head, gathered_head(self.teacher) as teacher_head:
            out = vigos.linear_divergence(hidden, head, teacher_hidden, teacher_head)
        if num_items_in_batch is None:
            loss = out.loss / max(rows.shape[0], 1)
        else:
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = out.loss * ranks / num_items_in_batch  # gradients are averaged over the ranks
        return (loss, {"divergence": out.divergence.detach()}) if return_outputs else loss


def tiny(hidden: int, seed: int, vocab: int = 500) -> LlamaForCausalLM:
    """Build a small random model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        )
    )  # fmt: skip


def sentences(n: int, seed: int = 0, vocab: int = 500) -> list[dict[str, Tensor]]:
    """Draw sequences of random ids whose first five are a prompt, without labels."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(vocab, (24,), generator=draw)
        labels = ids.clone()
        labels[:5] = -100
        labels[int(torch.randint(12, 24, (1,), generator=draw)) :] = -100  # as padding has
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def main() -> None:
    """Train a narrow student towards a random teacher and print the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/distil")
    options = parser.parse_args()
    args = TrainingArguments(
        options.output_dir, max_steps=options.steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistilTrainer(tiny(32, 0), args, train_dataset=sentences(64), teacher=tiny(48, 1))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"KL of a label, in nats: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last")


if __name__ == "__main__":
    main()
