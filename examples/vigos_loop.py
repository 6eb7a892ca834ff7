"""ViGOS (arXiv 2606.19120) in one loop of plain PyTorch: what `vigos.ViGOSTrainer` does, without what it adds.

    python examples/vigos_loop.py                    # ten steps on the built-in world, a minute on one core
    python examples/vigos_loop.py --steps 100 --data data/train.jsonl

Student and teachers are one model. Each step: the student describes the image, thinks and answers; the perception
teacher, who sees the image alone, corrects the description; the reasoning teacher, who has read the answer, corrects
the reasoning; a rollout that broke the format is corrected by the reference teacher, token by token. A teacher is the
model with its adapter off. `tests/test_examples.py` runs this loop against the trainer: same losses to 1e-6.

Left out, and in the trainer: gradient accumulation, several GPUs, checkpoints, rollout servers, full fine-tuning,
moving-average teachers, presets of the released code, metrics and records, recovery from lost memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vigos import Head, Prompts, load_rows
from vigos.data.examples import Example
from vigos.divergence.api import linear_divergence
from vigos.method.encode import EncodedPrompt, encode_prompt
from vigos.method.objective import Objective
from vigos.method.prompts import Role
from vigos.method.spans import parse_rollout
from vigos.method.supervise import Rollout, SupervisedBatch, assign, supervise, teacher_prefill
from vigos.models.vision_cache import VisionCache
from vigos.rollout.engine import Sampling, stream_seed
from vigos.rollout.generate import TransformersEngine
from vigos.scoring.hidden_states import hidden_states
from vigos.scoring.teacher import TeacherScorer
from vigos.world import load_base, world_prompts, write_world


def read_rollout(
    example: Example, student_prompt: EncodedPrompt, completion_ids: Tensor, processor: Any, prompts: Prompts,
    objective: Objective,
) -> Rollout:  # fmt: skip
    """Find the completion's parts, and write the prompts of the teachers that will supervise them."""
    tokenizer = processor.tokenizer
    spans = parse_rollout(
        completion_ids, tokenizer, style=objective.span_style, validity=objective.validity,
        eos_token_ids=[tokenizer.eos_token_id],
    )  # fmt: skip
    read: dict[Role, EncodedPrompt] = {"student": student_prompt}
    for a in assign(spans, objective):
        read[a.term] = encode_prompt(
            processor, prompts, a.term, example["problem"], example["answer"], example["images"],
            prefill=teacher_prefill(a.term, objective, prompts), like=student_prompt,
        )  # fmt: skip
    return Rollout(
        problem_id=example["problem_id"], problem=example["problem"], answer=example["answer"],
        images=tuple(example["images"]), prompts=read, completion_ids=completion_ids, spans=spans,
    )  # fmt: skip


def divergence_loss(model: Any, scorer: TeacherScorer, batch: SupervisedBatch, objective: Objective) -> Tensor:
    """Return the loss of a batch: the sum over pairs of weight times clipped divergence, over the whole vocabulary."""
    base = model.get_base_model()
    vision = VisionCache.for_model(base)  # the frozen tower's features, computed once for all of an image's contexts
    with torch.no_grad():
        teacher_hidden, pairs = scorer.score(batch, vision=vision)  # (M, D), adapter off, shared prefixes run once
    student_hidden = hidden_states(model, batch.student_sequences, vision=vision)  # (N, D)
    out = linear_divergence(
        student_hidden, Head(base.lm_head.weight), teacher_hidden, supervision=pairs, **objective.divergence_options
    )  # no logits of the batch in memory
    return out.loss


def train(
    model: nn.Module, processor: Any, examples: Sequence[Example], prompts: Prompts, *, objective: Objective,
    sampling: Sampling, steps: int, batch_size: int, learning_rate: float, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Train a peft model's adapter in place, on the examples in order; return the loss of each step."""
    engine = TransformersEngine.for_model(model, processor)
    scorer = TeacherScorer(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        chosen = [examples[(step * batch_size + j) % len(examples)] for j in range(batch_size)]

        # The student writes.
        student_prompts = [
            encode_prompt(processor, prompts, "student", example["problem"], images=example["images"])
            for example in chosen
        ]
        seeds = [stream_seed(seed, step, j) for j in range(batch_size)]
        completions = engine.generate(student_prompts, sampling, seeds)

        # Whose tokens meet which teacher, in which direction, clipped and weighted.
        rollouts = [
            read_rollout(example, prompt, ids, processor, prompts, objective)
            for example, prompt, ids in zip(chosen, student_prompts, completions, strict=True)
        ]
        batch = supervise(rollouts, objective)

        # The student is pulled to its teachers.
        model.train()
        loss = divergence_loss(model, scorer, batch, objective)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss.item())
        valid, tokens = sum(r.spans.valid for r in rollouts), sum(len(ids) for ids in completions)
        print(f"step {step + 1}: loss {losses[-1]:.4f}, {valid} of {batch_size} rollouts valid, {tokens} tokens")
    return losses


def adapted(model: nn.Module, seed: int = 0) -> nn.Module:
    """Put a LoRA adapter on the language model's layers; the vision tower and the head stay frozen."""
    torch.manual_seed(seed)
    layers = r"model\.language_model\.(?:.*\.)?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=layers))  # type: ignore[arg-type]


def main() -> None:
    """Train on the command line's data, or on a world written for the occasion."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--data", help="JSONL, as docs/data.md has it; without it the built-in world is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_world(folder, n=options.steps * options.batch_size)
        model, processor = load_base()
        train(
            adapted(model), processor, load_rows(str(data)), world_prompts(),
            objective=Objective(clip_mode="none"), sampling=Sampling(1.0, 1.0, 0, max_new_tokens=96),
            steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate,
        )  # fmt: skip


if __name__ == "__main__":
    main()
