"""The loss and gradients of a step against straight-line PyTorch in float64, written from the paper's equations."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    TEXTS,
    VALID_A,
    VALID_B,
    GradientRecorder,
    chat,
    completion_ids,
    config,
    full_log_probs,
    move,
    processor,
    rows,
    tiny_student,
    trainer,
)
from torch import Tensor

from vigos.models.parts import lm_head
from vigos.train.compare import SavedModelError
from vigos.train.config import ViGOSConfig

LAMBDAS = {"lambda_perception": 1.3, "lambda_reasoning": 0.7, "lambda_reference": 2.1}


def inside(ids: Tensor, start: int, end: int) -> list[int]:
    """The tokens that lie wholly in characters [start, end) of the completion; its texts are ASCII."""
    found, at = [], 0
    for i, token in enumerate(ids.tolist()):
        length = len(processor().tokenizer.decode([token]))
        if at >= start and at + length <= end:
            found.append(i)
        at += length
    return found


def straight_line(student: Any, teacher: Any, args: ViGOSConfig, data: list[dict[str, Any]]) -> Tensor:
    """The loss of one step over all rows, each teacher and row by itself, written from the paper's equations."""
    per_token: list[dict[str, Any]] = []
    for number, (row, text) in enumerate(zip(data, TEXTS, strict=True)):
        ids = completion_ids(text)
        image, problem, answer = row["images"][0], row["problem"], row["answer"]
        key = row.get("solution", answer) if args.reference_kind == "solution" else answer
        asked, told = f"{problem} Describe, think, answer.", f"{problem} Key: {key}. Explain."
        privileged = f"{problem} Key: {key}. Describe, think, answer."
        q = full_log_probs(student, chat(asked, "<description>"), image, ids)
        close = text.find("</description>")
        valid = text in (VALID_A, VALID_B)
        jobs: list[tuple[str, Tensor, list[int], str]] = []  # term, teacher's log-probabilities (C, V), tokens, kind
        with torch.no_grad():
            everything = list(range(len(ids)))
            if args.method == "opsd":
                p = full_log_probs(teacher, chat(privileged, "<description>"), image, ids)
                jobs.append(("reference", p, everything, "forward"))
            elif valid:
                opened, closed = text.find("<think>") + 7, text.find("</think>")
                box = text.find("\\boxed{") + 7
                end = text.find("}", box)
                p = full_log_probs(teacher, chat(""), image, ids)
                jobs.append(("perception", p, inside(ids, 0, close), "forward"))
                if args.span_style == "paper":
                    tokens = inside(ids, opened, closed) + inside(ids, box, end)
                else:
                    first = inside(ids, opened, len(text))[0]
                    tokens = [i for i in everything if i >= first and i <= max(inside(ids, 0, end + 1))]
                if args.reasoning_prefix == "student":
                    p = full_log_probs(teacher, chat(told, "<description>"), image, ids)
                else:
                    skipped = inside(ids, opened, len(text))[0]
                    p = full_log_probs(teacher, chat(told, "<think>"), image, ids[skipped:])
                    p = torch.cat([torch.full((skipped, p.shape[1]), float("nan"), dtype=p.dtype), p])
                jobs.append(("reasoning", p, tokens, "forward"))
            elif args.invalid_rollouts == "reference":
                p = full_log_probs(teacher, chat(privileged, "<description>"), image, ids)
                jobs.append(("reference", p, everything, "reverse"))
            else:
                p = full_log_probs(teacher, chat(told, "<description>"), image, ids)
                jobs.append(("reasoning", p, everything, "forward"))
        for term, p, tokens, kind in jobs:
            for place, i in enumerate(tokens):
                log_p, log_q = p[i], q[i]
                if args.divergence == "jsd":
                    beta = args.jsd_beta
                    log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
                    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
                elif kind == "forward":
                    terms = log_p.exp() * (log_p - log_q)
                else:
                    terms = log_q.exp() * (log_q - log_p)
                if args.clip_mode == "entry":
                    terms = terms.clamp(max=args.entry_clip)
                value = terms.sum()
                if args.clip_mode == "token":
                    clip = args.token_clip
                    if term == "perception" and place == len(tokens) - 1 and args.description_end_clip is not None:
                        clip = args.description_end_clip
                    if term == "reasoning" and place == 0 and args.reasoning_start_clip is not None:
                        clip = args.reasoning_start_clip
                    value = value.clamp(max=clip)
                per_token.append({"row": number, "term": term, "value": value})
    weights = dict(zip(("perception", "reasoning", "reference"), args.objective.lambdas, strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for term, weight in weights.items():
        mine = [t for t in per_token if t["term"] == term]
        if not mine:
            continue
        if args.normalize == "tokens":
            total = total + weight * torch.stack([t["value"] for t in mine]).mean()
        elif args.normalize == "sequence":
            means = [torch.stack([t["value"] for t in mine if t["row"] == r]).mean() for r in {t["row"] for t in mine}]
            total = total + weight * torch.stack(means).mean()
        else:
            size = args.per_device_train_batch_size
            for k in range(args.gradient_accumulation_steps):
                active = [t for t in per_token if t["row"] // size == k]
                values = [t["value"] for t in active if t["term"] == term]
                if values:
                    total = total + weight * torch.stack(values).sum() / len(active) / args.gradient_accumulation_steps
    return total


CASES: dict[str, dict[str, Any]] = {
    "paper": {"token_clip": 0.3},
    "separate": {"token_clip": 0.3, "teacher_scoring": "separate", "student_scoring": "separate"},
    # Boundary clips below and above what their tokens have, so that a clip on a neighbour shows.
    "boundary": {"token_clip": 0.4, "description_end_clip": 0.011, "reasoning_start_clip": 0.017},
    "released": {"preset": "released", "token_clip": 0.01, "description_end_clip": 9.0, "reasoning_start_clip": 9.0},
    "sequence": {"normalize": "sequence", "clip_mode": "none"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3, "token_clip": 0.1},
    "entry": {"clip_mode": "entry", "entry_clip": 0.02},
    "opsd": {"method": "opsd", "clip_mode": "entry"},
    "others": {"invalid_rollouts": "others", "token_clip": 0.4},
    "solution": {"reference_kind": "solution", "clip_mode": "none"},
    "no_perception": {"lambda_perception": 0.0, "clip_mode": "none"},
    "full": {"lora": False, "token_clip": 0.4},
    "full_head": {"lora": False, "train_head": True, "train_vision": True, "clip_mode": "none"},
    "live": {"teacher": "live", "clip_mode": "none"},
}


@pytest.mark.parametrize("case", CASES)
def test_step_equals_straight_line_float64(case: str, tmp_path: Path) -> None:
    """Two micro-batches of two rows; valid and invalid mixed; loss and every gradient to 1e-6 relative."""
    options = LAMBDAS | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | CASES[case]
    args = config(tmp_path, **options)
    data = rows(4)
    data[1]["solution"] = "it is blue because 2 is"
    recorder = GradientRecorder()
    engine = trainer(tiny_student(torch.float64), args, data, texts=TEXTS, callbacks=[recorder])
    frozen = copy.deepcopy(engine.model)
    torch.manual_seed(1)  # the student has moved away from its teacher
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if args.teacher == "live":
        frozen = copy.deepcopy(engine.model)
    elif args.lora:
        frozen = frozen.get_base_model()  # its lora_B is still zero
    expected = straight_line(engine.model, frozen.eval(), args, data)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    engine.model.zero_grad(set_to_none=True)

    engine.train()

    logged = engine.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-6)
    parts = [
        logged[f"loss/{t}"] * w
        for t, w in zip(("perception", "reasoning", "reference"), args.objective.lambdas, strict=True)
    ]
    assert sum(parts) == pytest.approx(expected.item(), rel=1e-6)
    (recorded,) = recorder.steps
    trained = {n for n, p in engine.model.named_parameters() if p.requires_grad}
    assert recorded.keys() == gradients.keys() == trained
    for name, exact in gradients.items():
        error = (recorded[name] - exact).abs().max().item()
        assert error <= 1e-6 * exact.abs().max().item(), f"{name}: {error:.1e} of {exact.abs().max().item():.1e}"
    assert any(g.abs().max() > 1e-4 for g in gradients.values())
    if args.clip_mode == "token":  # both sides of the clip are exercised
        clipped = [v for k, v in logged.items() if k.startswith("clipped_tokens/")]
        assert any(0 < share < 1 for share in clipped), clipped


@pytest.mark.parametrize("train_head", [False, True], ids=["", "trained"])
def test_head_bias_and_logit_settings_of_the_model_are_used(train_head: bool, tmp_path: Path) -> None:
    """The divergence is that of the model's own logits, whatever stands between head and softmax."""
    model = tiny_student(torch.float64)
    old = lm_head(model)
    model.lm_head = torch.nn.Linear(old.in_features, old.out_features, bias=True, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.copy_(old.weight)
        model.lm_head.bias.normal_()
    own = {"lora": False, "train_head": True} if train_head else {}  # then the teacher keeps weight and bias
    args = config(tmp_path, clip_mode="none", per_device_train_batch_size=4, **own)
    data = rows(4)
    engine = trainer(model, args, data, texts=TEXTS)
    frozen = copy.deepcopy(engine.model).eval()
    frozen = frozen if train_head else frozen.get_base_model()
    move(engine)
    expected = straight_line(engine.model, frozen, args, data)
    with pytest.raises(SavedModelError) if train_head else nullcontext():  # no class of transformers has this bias
        engine.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        recorder = GradientRecorder()
        args = config(tmp_path, clip_mode="none", gradient_checkpointing=on)
        engine = trainer(tiny_student(torch.float64), args, rows(2), texts=TEXTS[:2], callbacks=[recorder])
        move(engine)
        engine.train()
        found.append(recorder.steps[0])
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-9, atol=1e-12), name
