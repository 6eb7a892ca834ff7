"""Per-token divergences of logits that a codebase already holds, in any layout, without a copy of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vigos.divergence.api import DivergenceOutput, logits_divergence
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision


def kind_and_beta(beta: float) -> tuple[int, float]:
    """TRL's, Liger's and OPSD's beta: 0 is forward KL(teacher || student), 1 reverse KL, between them JSD(beta)."""
    beta = float(beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {beta}")
    kind = FORWARD_KL if beta == 0 else REVERSE_KL if beta == 1 else JSD
    return kind, beta if kind == JSD else 0.5


def _blocks(student: Tensor, teacher: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The same rows as two-dimensional views: one block if both tensors can be viewed so, else one per batch element.

    Codebases shift by slicing, `logits[:, :-1]`, which cannot be flattened; `reshape` would copy the logits.
    """
    if student.dim() == 2:
        return [(student, teacher, mask)]
    if student.is_contiguous() and teacher.is_contiguous():
        v = student.shape[-1]
        return [(student.view(-1, v), teacher.view(-1, v), None if mask is None else mask.reshape(-1))]
    return [
        block
        for i in range(student.shape[0])
        for block in _blocks(student[i], teacher[i], None if mask is None else mask[i])
    ]


class _TokenDivergence(torch.autograd.Function):
    """Divergence of every token; backward writes one gradient of the logits' size and dtype, block by block."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        kind = options["kind"]
        rest = {name: value for name, value in options.items() if name != "kind"}
        ctx.shape, ctx.dtype = student.shape, student.dtype
        out: list[Tensor] = []
        kept: list[Tensor] = []
        for student_rows, teacher_rows, live in _blocks(student, teacher, mask):
            n = student_rows.shape[0]
            rows = torch.arange(n, device=student.device) if live is None else live.nonzero().squeeze(1)
            leaf = student_rows.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                result: DivergenceOutput = logits_divergence(
                    leaf, teacher_rows.detach(), supervision=Supervision(rows, rows, kind), **rest
                )
            value = result.divergence.detach()
            out.append(value if live is None else value.new_zeros(n).index_copy(0, rows, value))
            if ctx.needs_input_grad[0]:
                kept += (leaf, rows, result.divergence)
        # Saved, with the graph that hangs on `divergence`, so that backward lets go of the logits when it is done.
        ctx.save_for_backward(*kept)
        return torch.cat(out).view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        saved = ctx.saved_tensors
        dlogits: list[Tensor] = []
        whole = None
        if len(saved) > 3:
            whole = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device).view(-1, ctx.shape[-1])
        flat, start = grad.reshape(-1), 0
        for leaf, rows, divergence in zip(saved[::3], saved[1::3], saved[2::3], strict=True):
            upstream = flat[start : start + leaf.shape[0]][rows]
            (block,) = torch.autograd.grad(divergence, leaf, upstream.to(divergence.dtype), retain_graph=True)
            if whole is None:
                dlogits.append(block)
            else:
                whole[start : start + leaf.shape[0]] = block
            start += leaf.shape[0]
        return (dlogits[0] if whole is None else whole).view(ctx.shape), None, None, None


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, kind: int = FORWARD_KL,
    beta: float = 0.5, temperature: float = 1.0, entry_clip: float | None = None,
) -> Tensor:  # fmt: skip
    """Divergence of each token in nats, differentiable in the student's logits: (..., V), (..., V) -> (...).

    Tokens outside `mask` (...) are not read and are exactly 0, in value and in gradient. Float32 whatever the logits'
    dtype (float64 for float64).
    """
    if teacher_logits.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits must match student_logits {tuple(student_logits.shape)} but for the vocabulary, got "
            f"{tuple(teacher_logits.shape)}"
        )
    if mask is not None and mask.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"the mask must be {tuple(student_logits.shape[:-1])} like the logits without the vocabulary, got "
            f"{tuple(mask.shape)}"
        )
    options = {
        "kind": kind, "beta": beta, "temperature": float(temperature),
        "entry_clip": None if entry_clip is None else float(entry_clip),
    }  # fmt: skip
    if student_logits.numel() == 0 or student_logits.dim() == 1:
        return _TokenDivergence.apply(
            student_logits.reshape(-1, student_logits.shape[-1]),
            teacher_logits.reshape(-1, teacher_logits.shape[-1]),
            None if mask is None else mask.reshape(-1),
            options,
        ).view(student_logits.shape[:-1])
    return _TokenDivergence.apply(student_logits, teacher_logits, mask, options)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, labels: Tensor | None, beta: float, temperature: float,
    entry_clip: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What TRL and OPSD compute before their reductions: (sum over tokens in nats, tokens kept or None for all)."""
    kind, beta = kind_and_beta(beta)
    mask = None if labels is None else labels != -100
    tokens = token_divergence(
        student_logits, teacher_logits, mask=mask, kind=kind, beta=beta, temperature=temperature, entry_clip=entry_clip
    )
    return tokens.sum(), None if mask is None else mask.sum()
