"""Losses of logits that a codebase already holds, in any layout, without a copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vigos.divergence.api import logits_divergence
from vigos.divergence.supervision import FORWARD_KL, Supervision, kind_and_beta


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "this drop-in of vigos is differentiable once: its gradient is computed without a derivative of its own"
        )


def once(gradient: Tensor, source: Tensor) -> Tensor:
    """Return a gradient in `source` that raises when create_graph=True asks for its derivative, which it drops else."""
    return _Once.apply(gradient, source)


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str] = ("student_logits", "teacher_logits")) -> None:
    """Refuse logits of different shapes, before anything is indexed or reshaped."""
    if teacher.shape != student.shape:
        v, same_tokens = min(teacher.shape[-1], student.shape[-1]), teacher.shape[:-1] == student.shape[:-1]
        hint = f"; if the longer vocabulary is padding, slice both to [..., :{v}]" if same_tokens else ""
        raise ValueError(f"{names[1]} must match {names[0]} {tuple(student.shape)}, got {tuple(teacher.shape)}{hint}")


def check_mask(mask: Tensor, rows: Tensor, name: str) -> None:
    """Refuse a mask or labels that do not hold one value for each row of `rows` (..., V)."""
    tokens = rows.shape[:-1]
    if mask.shape not in (tokens, (tokens.numel(),)):
        raise ValueError(f"{name} must be {tuple(tokens)}, one value for each token, got {tuple(mask.shape)}")


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, kind: int | str = FORWARD_KL,
    beta: float = 0.5, temperature: float = 1.0, entry_clip: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the divergence of each token in nats, differentiable in the student's logits: (..., V) twice -> (...).

    Tokens outside `mask` (...) are not read and are exactly 0, in value and in gradient. Float32 whatever the logits'
    dtype (float64 for float64).
    """
    check_pair(student_logits, teacher_logits)
    shape = student_logits.shape[:-1]
    mask = torch.ones(shape, dtype=torch.bool, device=student_logits.device) if mask is None else mask.bool()
    check_mask(mask, student_logits, "mask")
    supervision = Supervision.from_mask(mask, kind=kind)
    tokens = logits_divergence(
        student_logits, teacher_logits, supervision=supervision, beta=beta, temperature=float(temperature),
        entry_clip=None if entry_clip is None else float(entry_clip),
    ).divergence  # fmt: skip
    rows = supervision.student_row.to(tokens.device)
    return tokens.new_zeros(shape.numel()).index_copy(0, rows, tokens).view(shape)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, labels: Tensor | None, beta: float, temperature: float,
    reduction: str, entry_clip: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the generalized JSD of TRL and OPSD over the tokens whose label is not -100: a scalar in nats.

    `reduction`: "batchmean" divides the sum by the kept tokens (without labels by B), "mean" by tokens times V, "sum"
    by nothing. Without a kept token it is 0.
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(
            f'reduction must be "batchmean", "mean" or "sum", got {reduction!r}: a fused loss has no term of '
            "each vocabulary entry"
        )
    check_pair(student_logits, teacher_logits)
    kind, beta = kind_and_beta(beta)
    if labels is None:
        supervision = Supervision.aligned(student_logits.shape[:-1].numel(), kind=kind, device=student_logits.device)
    else:
        check_mask(labels, student_logits, "labels")
        supervision = Supervision.from_mask(labels != -100, kind=kind)
    total = logits_divergence(
        student_logits, teacher_logits, supervision=supervision, beta=beta, temperature=float(temperature),
        entry_clip=None if entry_clip is None else float(entry_clip),
    ).loss  # fmt: skip
    tokens = max(supervision.student_row.shape[0], 1)
    if reduction == "mean":
        return total / (tokens * student_logits.shape[-1])
    if reduction == "batchmean":
        return total / (max(student_logits.shape[0], 1) if labels is None else tokens)
    return total
