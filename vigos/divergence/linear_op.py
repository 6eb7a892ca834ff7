"""The operator `vigos::linear_divergence`, from hidden states: fake implementation, autograd, the way to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.call import Call, rows_of
from vigos.divergence.engines import choose
from vigos.divergence.engines.problem import LinearProblem
from vigos.divergence.operator import (
    compute_dtype,
    engine_runs_on,
    fake_statistics,
    flat,
    no_gradient,
    once,
    operator,
    row_upstream,
    total_loss,
)

# student is (student_hidden, student_weight, student_bias), teacher likewise; supervision is (student_row, teacher_row,
# kind, weight, clip); need says which gradients forward prepares: of hidden states, head, bias.


def _linear_problem(
    call: Call, student: Sequence[Tensor | None], teacher: Sequence[Tensor | None], supervision: Sequence[Tensor],
    labels: Tensor | None, need: Sequence[bool], *, checked: bool = False,
) -> LinearProblem:  # fmt: skip
    tensors = [None if x is None else x.detach() for x in (*student, *teacher)]
    hidden, weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = tensors
    assert hidden is not None
    assert weight is not None
    assert teacher_hidden is not None
    if teacher_weight is None and teacher_bias is None:
        teacher_bias = student_bias
    sizes = (hidden.shape[0], teacher_hidden.shape[0], weight.shape[0])
    return LinearProblem(
        **rows_of(call, supervision, labels, sizes, hidden.device, checked),
        student_hidden=hidden, student_weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias,
        need_dhidden=need[0], need_dweight=need[1], need_dbias=need[2],
    )  # fmt: skip


def linear(
    student: tuple[Tensor, Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None, Tensor | None],
    supervision: Sequence[Tensor], labels: Tensor | None, call: Call,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the operator `vigos::linear_divergence`; autograd goes through it.

    Args:
        student: hidden states (N, D), head (V, D), bias (V,) or None.
        teacher: hidden states (M, D_t), head (V, D_t) or None for the student's, bias (V,) or None. Without a head and
            a bias of its own the teacher has the student's bias.
        supervision: student_row, teacher_row int64, kind int8, weight, clip float32, each (R,); and where targets are
            not their teacher rows, control_row int64, contrast, plausibility float32.
        labels: (R,) int64 or None.

    Returns:
        loss (), then (R,) each: divergence, student_entropy, teacher_entropy, student_lse, teacher_lse and the labels'
        log-probabilities of student and teacher, (0,) without labels; then what backward reads.
    """
    grad = torch.is_grad_enabled()
    need = [grad and x is not None and x.requires_grad for x in student]
    return linear_op(*student, list(teacher), list(supervision), labels, *call.packed(), need)


@operator("vigos::linear_divergence")
def linear_op(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, teacher: list[Tensor | None],
    supervision: list[Tensor], labels: Tensor | None, scalars: list[float], vocab_size: int, group_name: str, impl: str,
    need: list[bool],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Return loss, divergence, both entropies, lse, log-probabilities, then computed, drow, dweight, dbias."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    student = (student_hidden, student_weight, student_bias)
    problem = _linear_problem(call, student, teacher, supervision, labels, need)
    with engine_runs_on(problem.device):
        result = choose(impl, problem).forward(problem)
        like = result.statistics.divergence
        d = student_weight.shape[1]
        return (
            total_loss(problem, like), *flat(result.statistics),
            like.new_empty(0, dtype=torch.bool) if result.computed is None else result.computed,
            like.new_empty(0, d) if result.drow is None else result.drow,
            like.new_empty(0, d) if result.dweight is None else result.dweight,
            like.new_empty(0) if result.dbias is None else result.dbias,
        )  # type: ignore[return-value] # fmt: skip


@torch.library.register_fake("vigos::linear_divergence")
def _linear_fake(  # type: ignore[no-untyped-def]
    student_hidden, student_weight, student_bias, teacher, supervision, labels, scalars, vocab_size, group_name, impl,
    need,
):  # fmt: skip
    r, (v, d), dtype = supervision[0].shape[0], student_weight.shape, compute_dtype(student_hidden)
    return (
        *fake_statistics(student_hidden, r, labels),
        student_hidden.new_empty((r if need[0] else 0,), dtype=torch.bool),
        student_hidden.new_empty((r if need[0] else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need[1] else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need[2] else 0,), dtype=dtype),
    )


@operator("vigos::linear_divergence_backward")
def linear_backward_op(
    upstream: list[Tensor | None], saved: list[Tensor], student: list[Tensor | None], teacher: list[Tensor | None],
    supervision: list[Tensor], scalars: list[float], vocab_size: int, group_name: str, impl: str, need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dhidden (N, D), dweight (V, D), dbias (V,) in their inputs' dtypes; empty where not needed.

    upstream: gradients of loss and divergence, or None; saved: divergence, computed, drow, dweight, dbias of forward.
    """
    problem = _linear_problem(
        Call.unpacked(scalars, vocab_size, group_name, impl), student, teacher, supervision, None, need, checked=True
    )
    (grad_loss, grad_divergence), (divergence, computed, drow, dweight, dbias) = upstream, saved
    hidden, bias = problem.student_hidden, problem.student_bias
    with engine_runs_on(problem.device):
        g = row_upstream(problem, divergence, grad_loss, grad_divergence)
        head = problem.need_dweight or problem.need_dbias
        if grad_divergence is not None:
            # Rows that forward left out, and the head's gradient under these upstreams, are computed now.
            again = g != 0 if head else (g != 0) & ~computed
            index = again.nonzero().squeeze(1)
            if index.shape[0] > 0 or head:
                missing = bool(again.any()) and problem.need_dhidden and not bool(computed[index].all())
                no_clip = torch.full_like(g[index], float("inf"))
                selected = problem.pairs(index, weight=g[index], clip=no_clip, need_dhidden=missing)
                result = choose(impl, problem).forward(selected)
                if missing:
                    assert result.drow is not None
                    drow = drow.index_copy(0, index, result.drow)
                dweight = dweight if result.dweight is None else result.dweight
                dbias = dbias if result.dbias is None else result.dbias
        elif head:
            factor = torch.zeros_like(divergence[:1]) if grad_loss is None else grad_loss.to(dweight.dtype)
            dweight, dbias = dweight * factor, dbias * factor
        dhidden = hidden.new_zeros((hidden.shape if problem.need_dhidden else (0, 0)), dtype=drow.dtype)
        if problem.need_dhidden:
            # A row without upstream adds nothing, whatever was computed for it.
            scaled = torch.where((g != 0)[:, None], drow * g[:, None], 0.0)
            dhidden.index_add_(0, problem.student_row, scaled)
        bias_dtype = dbias.dtype if bias is None else bias.dtype
        outputs = (dhidden.to(hidden.dtype), dweight.to(problem.student_weight.dtype), dbias.to(bias_dtype))
        given = (dweight, dbias)  # an operator must not hand back its own arguments
        return tuple(x.clone() if any(x is y for y in given) else x for x in outputs)  # type: ignore[return-value]


@torch.library.register_fake("vigos::linear_divergence_backward")
def _linear_backward_fake(  # type: ignore[no-untyped-def]
    upstream, saved, student, teacher, supervision, scalars, vocab_size, group_name, impl, need
):
    hidden, weight, bias = student
    v, d = weight.shape
    return (
        hidden.new_empty(hidden.shape if need[0] else (0, 0)),
        weight.new_empty((v if need[1] else 0, d)),
        weight.new_empty((v if need[2] else 0,), dtype=saved[4].dtype if bias is None else bias.dtype),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    student, (teacher, supervision, _), ctx.rest = inputs[:3], inputs[3:6], inputs[6:]
    ctx.save_for_backward(output[1], *output[8:12], *student, *teacher, *supervision)


def _linear_backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:
    tensors, need = list(ctx.saved_tensors), ctx.rest[-1]
    saved, student, teacher, supervision = tensors[:5], tensors[5:8], tensors[8:11], tensors[11:]
    gradients: tuple[Tensor | None, ...] = (None,) * 3
    if (grad_loss is not None or grad_divergence is not None) and any(need):
        computed = linear_backward_op([grad_loss, grad_divergence], saved, student, teacher, supervision, *ctx.rest)
        gradients = tuple(x if needed else None for x, needed in zip(computed, need, strict=True))
    return (*gradients, no_gradient(teacher), no_gradient(supervision), *(None,) * 6)


torch.library.register_autograd("vigos::linear_divergence", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("vigos::linear_divergence_backward", once)
