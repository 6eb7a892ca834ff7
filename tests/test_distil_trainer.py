"""examples/distil_trainer.py against the same Trainer with both models' logits in memory."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import TrainingArguments

_spec = importlib.util.spec_from_file_location(
    "distil_trainer", Path(__file__).parents[1] / "examples" / "distil_trainer.py"
)
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
sys.modules["distil_trainer"] = example
_spec.loader.exec_module(example)


class Naive(example.DistilTrainer):
    """The loss as it is written with logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        log_q = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        with torch.no_grad():
            log_p = self.teacher(**inputs).logits[:, :-1].float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100]
        return kl.sum() / num_items_in_batch


def train(cls: type, folder: Path, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Losses and the student's head after four steps of two micro-batches with different numbers of labels."""
    args = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3,
        logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False, use_cpu=True, seed=0, **options,
    )  # fmt: skip
    student, teacher = example.tiny(32, 0), example.tiny(48, 1)
    trainer = cls(student, args, train_dataset=example.sentences(64), teacher=teacher)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, student.lm_head.weight.detach()


def test_it_is_the_loss_on_logits(tmp_path: Path) -> None:
    """Another width, another head: the student's head in the teacher's place would not even fit."""
    ours, exact = (train(cls, tmp_path) for cls in (example.DistilTrainer, Naive))
    assert len(ours[0]) == 4
    assert ours[0] == pytest.approx(exact[0], rel=1e-4)
    assert ours[0][-1] < ours[0][0]
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-3, atol=1e-4)


def test_under_the_trainers_autocast(tmp_path: Path) -> None:
    ours, exact = (train(cls, tmp_path, bf16=True) for cls in (example.DistilTrainer, Naive))
    assert ours[0] == pytest.approx(exact[0], rel=2e-2)
