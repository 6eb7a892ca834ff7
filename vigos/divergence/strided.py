"""Logits whose leading dimensions cannot be merged without a copy: `logits[:, :-1]` of (B, T, V), a batch of slices.

Reading them needs no copy, since engines take any row stride: the tensor is read as a matrix that holds the rows in the
gaps too, with the row indices of the pairs mapped. A gradient like that would fill the gaps, so it is written to one
dense tensor: with the loss where the engine can, else slice by slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.call import Call
from vigos.divergence.logits_op import (
    logits,
    logits_backward_inplace_op,
    logits_backward_op,
    logits_correct_op,
    writes_in_forward,
)
from vigos.divergence.operator import once


def overlaps(x: Tensor) -> bool:
    """Return True if elements of `x` may share memory, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def merged(x: Tensor) -> Tensor | None:
    """Return x (..., V) as (N, V), or None where that takes a copy. torch.compile copies as it needs."""
    if x.dim() == 2 or torch.compiler.is_compiling():
        return x.reshape(-1, x.shape[-1])
    try:
        return x.view(x.shape[:-1].numel(), x.shape[-1])
    except RuntimeError:
        return None


def as_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a view (N', V) of x (..., V), without a gradient, and each row's index in it, int64 (N,) on the CPU."""
    lead = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    step = math.gcd(*(stride for size, stride in lead if size > 1)) or 1
    rows, count = torch.zeros((), dtype=torch.int64), 1
    for size, stride in lead:
        rows = rows[..., None] + torch.arange(size) * (stride // step)
        count += (size - 1) * (stride // step)
    return x.detach().as_strided((count, x.shape[-1]), (step, x.stride(-1))), rows.reshape(-1)


def _slices(x: Tensor) -> Iterator[Tensor]:
    """Yield views (n, V) that cover x (..., V) in order."""
    view = merged(x)
    if view is not None:
        yield view
    else:
        for part in x:
            yield from _slices(part)


class _Strided(torch.autograd.Function):
    """Call the operator of logits on a matrix with gaps, and its backward on the slices without them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, rows: Sequence[Tensor], labels: Tensor | None,
        call: Call, inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        matrix, index = as_matrix(student)
        rows_s, n = index.to(rows[0].device)[rows[0]], student.shape[:-1].numel()
        need = ctx.needs_input_grad[0] and not inplace
        ctx.written = need and writes_in_forward(call, rows[0], n)
        into = (rows[0], n) if ctx.written else (None, 0)
        out = logits(matrix, teacher, (rows_s, *rows[1:]), labels, call, inplace, *into)
        ctx.call, ctx.inplace = call, inplace
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, out[1], out[8], out[9], *rows)
        ctx.mark_non_differentiable(*out[2:8])
        return out[:8]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        student, teacher, divergence, state, dlogits, student_row, *rows = ctx.saved_tensors
        nothing = (None,) * 5
        if grad_loss is None and grad_divergence is None:
            return None, *nothing
        v, start = student.shape[-1], 0
        written = ctx.written and not torch.is_grad_enabled()
        if written:
            ctx.written = False  # given away: whoever has it may write to it
            dlogits = dlogits.data.view(student.shape)
        else:
            dlogits = None if ctx.inplace else torch.empty(student.shape, dtype=student.dtype, device=student.device)
        for part in _slices(student.detach()):
            n = part.shape[0]
            pairs = ((student_row >= start) & (student_row < start + n)).nonzero().squeeze(1)
            there = pairs.to(state.device)
            arguments = (
                [grad_loss, None if grad_divergence is None else grad_divergence[there]],
                [divergence[there], state[there]], part, teacher,
                [student_row[pairs] - start, *(x[pairs] for x in rows)], *ctx.call.packed(),
            )  # fmt: skip
            if dlogits is None:
                if torch.is_grad_enabled():  # create_graph=True
                    once()
                logits_backward_inplace_op(*arguments)
            elif written:
                logits_correct_op(dlogits.view(-1, v)[start : start + n], *arguments)
            else:
                dlogits.view(-1, v)[start : start + n] = logits_backward_op(*arguments)
            start += n
        return student.detach() if dlogits is None else dlogits, *nothing


strided_logits = _Strided.apply
