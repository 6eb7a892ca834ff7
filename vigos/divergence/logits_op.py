"""The operator `vigos::logits_divergence`, from logits: fake implementation, autograd, the way to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.call import Call, rows_of
from vigos.divergence.engines import choose
from vigos.divergence.engines.problem import STATE, LogitsProblem
from vigos.divergence.operator import (
    NOT_CAPTURED,
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


def _logits_problem(
    call: Call, student_logits: Tensor, teacher_logits: Tensor, supervision: Sequence[Tensor], labels: Tensor | None,
    *, inplace: bool = False, checked: bool = False,
) -> LogitsProblem:  # fmt: skip
    sizes = (student_logits.shape[0], teacher_logits.shape[0], student_logits.shape[1])
    rows = rows_of(call, supervision, labels, sizes, student_logits.device, checked)
    if inplace and rows["student_row"].unique().shape[0] != rows["student_row"].shape[0]:
        raise ValueError("inplace=True needs every student row to be supervised at most once, got repeated rows")
    return LogitsProblem(**rows, student_logits=student_logits.detach(), teacher_logits=teacher_logits.detach())


def logits(
    student_logits: Tensor, teacher_logits: Tensor, supervision: Sequence[Tensor], labels: Tensor | None, call: Call,
    inplace: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the operator `vigos::logits_divergence`: logits (N, V) and (M, V), the rest and the results as in `linear`.

    inplace: backward writes the gradient over `student_logits`.
    """
    return logits_op(student_logits, teacher_logits, list(supervision), labels, *call.packed(), inplace)


@operator("vigos::logits_divergence")
def logits_op(
    student_logits: Tensor, teacher_logits: Tensor, supervision: list[Tensor], labels: Tensor | None,
    scalars: list[float], vocab_size: int, group_name: str, impl: str, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, divergence, both entropies, lse, log-probabilities, then the engine's state."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    problem = _logits_problem(call, student_logits, teacher_logits, supervision, labels, inplace=inplace)
    with engine_runs_on(problem.device):
        result = choose(impl, problem).logits_forward(problem)
        loss = total_loss(problem, result.statistics.divergence)
        return (loss, *flat(result.statistics), result.state)  # type: ignore[return-value]


@torch.library.register_fake("vigos::logits_divergence")
def _logits_fake(  # type: ignore[no-untyped-def]
    student_logits, teacher_logits, supervision, labels, scalars, vocab_size, group_name, impl, inplace
):
    r = supervision[0].shape[0]
    state = student_logits.new_empty((r, STATE), dtype=compute_dtype(student_logits))
    return (*fake_statistics(student_logits, r, labels), state)


def _logits_gradient(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], call: Call, inplace: bool,
) -> Tensor:  # fmt: skip
    problem = _logits_problem(call, student_logits, teacher_logits, supervision, None, checked=True)
    divergence, state = saved
    with engine_runs_on(problem.device):
        g = row_upstream(problem, divergence, *upstream)
        out = problem.student_logits if inplace else None
        return choose(call.impl, problem).logits_backward(problem, state, g, out=out)


@operator("vigos::logits_divergence_backward")
def logits_backward_op(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], scalars: list[float], vocab_size: int, group_name: str, impl: str,
) -> Tensor:  # fmt: skip
    """Return dlogits (N, V) in the logits' dtype; upstream as above, saved: divergence and state of forward."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    return _logits_gradient(upstream, saved, student_logits, teacher_logits, supervision, call, inplace=False)


@torch.library.register_fake("vigos::logits_divergence_backward")
def _logits_backward_fake(  # type: ignore[no-untyped-def]
    upstream, saved, student_logits, teacher_logits, supervision, scalars, vocab_size, group_name, impl
):
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("vigos::logits_divergence_backward_", mutates_args=("student_logits",), tags=NOT_CAPTURED)
def logits_backward_inplace_op(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], scalars: list[float], vocab_size: int, group_name: str, impl: str,
) -> None:  # fmt: skip
    """Write the same over the student's logits."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    _logits_gradient(upstream, saved, student_logits, teacher_logits, supervision, call, inplace=True)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    student_logits, teacher_logits, supervision, _, *ctx.rest, ctx.inplace = inputs
    ctx.save_for_backward(output[1], output[8], student_logits, teacher_logits, *supervision)


def _logits_backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:
    divergence, state, student_logits, teacher_logits, *supervision = ctx.saved_tensors
    gradient = None
    if (grad_loss is not None or grad_divergence is not None) and ctx.needs_input_grad[0]:
        arguments = ([grad_loss, grad_divergence], [divergence, state], student_logits, teacher_logits, supervision)
        if ctx.inplace:
            if torch.is_grad_enabled():  # create_graph=True
                once()
            with torch.no_grad():
                logits_backward_inplace_op(*arguments, *ctx.rest)
            gradient = student_logits.detach()
        else:
            gradient = logits_backward_op(*arguments, *ctx.rest)
    return (gradient, None, no_gradient(supervision), *(None,) * 6)


torch.library.register_autograd("vigos::logits_divergence", _logits_backward, setup_context=_logits_setup)
torch.library.register_autograd("vigos::logits_divergence_backward", once)
