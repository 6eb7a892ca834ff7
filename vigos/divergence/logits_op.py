"""The operator `vigos::logits_divergence`, from logits: fake implementation, autograd, the way to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.call import Call, rows_of
from vigos.divergence.engines import ONE_VISIT, choose
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
    *, inplace: bool = False, checked: bool = False, dlogits: Tensor | None = None, dlogits_row: Tensor | None = None,
) -> LogitsProblem:  # fmt: skip
    sizes = (student_logits.shape[0], teacher_logits.shape[0], student_logits.shape[1])
    rows = rows_of(call, supervision, labels, sizes, student_logits.device, checked)
    if inplace and rows["student_row"].unique().shape[0] != rows["student_row"].shape[0]:
        raise ValueError("inplace=True needs every student row to be supervised at most once, got repeated rows")
    return LogitsProblem(
        **rows, student_logits=student_logits.detach(), teacher_logits=teacher_logits.detach(), dlogits=dlogits,
        dlogits_row=dlogits_row,
    )  # fmt: skip


def writes_in_forward(call: Call, student_row: Tensor, n: int) -> bool:
    """Return whether the gradient of `n` student rows is written with the loss.

    Not where pairs share a student row: their gradients add up. Nor where it is mostly zeros, as in calls that divide
    one tensor's rows among them: all those gradients would be held until backward.
    """
    r = student_row.shape[0]
    values = type(student_row) is Tensor and student_row.device.type != "meta"  # not of a trace
    if torch.compiler.is_compiling() or not values or call.impl not in ONE_VISIT:
        return False
    return n <= 2 * r <= 2 * n and student_row.unique().shape[0] == r


def logits(
    student_logits: Tensor, teacher_logits: Tensor, supervision: Sequence[Tensor], labels: Tensor | None, call: Call,
    inplace: bool, dlogits_row: Tensor | None = None, dlogits_rows: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Call the operator `vigos::logits_divergence`: logits (N, V) and (M, V), the rest and the results as in `linear`.

    inplace: backward writes the gradient over `student_logits`. dlogits_row: (R,), where forward writes the gradient of
    each pair, in a matrix of `dlogits_rows` rows; None: where its student row is, if it writes one.
    """
    n, student_row = student_logits.shape[0], supervision[0]
    need = student_logits.requires_grad and torch.is_grad_enabled() and not inplace
    if need and writes_in_forward(call, student_row, n):
        dlogits_row, dlogits_rows = student_row, n
    arguments = (labels, *call.packed(), inplace, dlogits_row, dlogits_rows)
    return logits_op(student_logits, teacher_logits, list(supervision), *arguments)


@operator("vigos::logits_divergence")
def logits_op(
    student_logits: Tensor, teacher_logits: Tensor, supervision: list[Tensor], labels: Tensor | None,
    scalars: list[float], vocab_size: int, group_name: str, impl: str, inplace: bool, dlogits_row: Tensor | None,
    dlogits_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, divergence, both entropies, lse, log-probabilities, then the engine's state and the gradient."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    dlogits = student_logits.new_empty(dlogits_rows, student_logits.shape[1])
    row = None if dlogits_row is None else dlogits_row.to(student_logits.device)
    problem = _logits_problem(
        call, student_logits, teacher_logits, supervision, labels, inplace=inplace,
        dlogits=None if row is None else dlogits, dlogits_row=row,
    )  # fmt: skip
    with engine_runs_on(problem.device):
        result = choose(impl, problem).logits_forward(problem)
        if row is not None and row.shape[0] < dlogits_rows:
            quiet = torch.ones(dlogits_rows, dtype=torch.bool, device=row.device).index_fill_(0, row, False)
            quiet = torch.nonzero_static(quiet, size=dlogits_rows - row.shape[0])  # without a wait for the device
            dlogits.index_fill_(0, quiet.squeeze(1), 0.0)
        loss = total_loss(problem, result.statistics.divergence)
        return (loss, *flat(result.statistics), result.state, dlogits)  # type: ignore[return-value]


@torch.library.register_fake("vigos::logits_divergence")
def _logits_fake(  # type: ignore[no-untyped-def]
    student_logits, teacher_logits, supervision, labels, scalars, vocab_size, group_name, impl, inplace, dlogits_row,
    dlogits_rows,
):  # fmt: skip
    r = supervision[0].shape[0]
    state = student_logits.new_empty((r, STATE), dtype=compute_dtype(student_logits))
    dlogits = student_logits.new_empty(dlogits_rows, student_logits.shape[1])
    return (*fake_statistics(student_logits, r, labels), state, dlogits)


def _logits_gradient(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], call: Call, out: Tensor | None = None, *, written: bool = False,
) -> Tensor:  # fmt: skip
    problem = _logits_problem(call, student_logits, teacher_logits, supervision, None, checked=True)
    divergence, state = saved
    with engine_runs_on(problem.device):
        g = row_upstream(problem, divergence, *upstream)
        kept = {"kept": row_upstream(problem, divergence, torch.ones_like(divergence[:1]), None)} if written else {}
        return choose(call.impl, problem).logits_backward(problem, state, g, out=out, **kept)


@operator("vigos::logits_divergence_backward")
def logits_backward_op(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], scalars: list[float], vocab_size: int, group_name: str, impl: str,
) -> Tensor:  # fmt: skip
    """Return dlogits (N, V) in the logits' dtype; upstream as above, saved: divergence and state of forward."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    return _logits_gradient(upstream, saved, student_logits, teacher_logits, supervision, call)


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
    _logits_gradient(upstream, saved, student_logits, teacher_logits, supervision, call, student_logits.detach())


@operator("vigos::logits_divergence_correct_", "dlogits")
def logits_correct_op(
    dlogits: Tensor, upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], scalars: list[float], vocab_size: int, group_name: str, impl: str,
) -> None:  # fmt: skip
    """Write to dlogits (N, V), which forward wrote, the rows whose upstream is not their weight."""
    call = Call.unpacked(scalars, vocab_size, group_name, impl)
    _logits_gradient(upstream, saved, student_logits, teacher_logits, supervision, call, dlogits, written=True)


@torch.library.register_fake("vigos::logits_divergence_correct_")
def _logits_correct_fake(*_: Any) -> None:
    return None


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    student_logits, teacher_logits, supervision, _, *ctx.rest, ctx.inplace, dlogits_row, _ = inputs
    ctx.written = dlogits_row is not None
    ctx.save_for_backward(output[1], output[8], output[9], student_logits, teacher_logits, *supervision)


def _logits_backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:
    divergence, state, dlogits, student_logits, teacher_logits, *supervision = ctx.saved_tensors
    gradient = None
    if (grad_loss is not None or grad_divergence is not None) and ctx.needs_input_grad[0]:
        arguments = ([grad_loss, grad_divergence], [divergence, state], student_logits, teacher_logits, supervision)
        if ctx.inplace:
            if torch.is_grad_enabled():  # create_graph=True
                once()
            with torch.no_grad():
                logits_backward_inplace_op(*arguments, *ctx.rest)
            gradient = student_logits.detach()
        elif ctx.written and not torch.is_grad_enabled():
            ctx.written = False  # given away: whoever has it may write to it
            gradient = dlogits.data  # autograd need not hear of what is corrected
            logits_correct_op(gradient, *arguments, *ctx.rest)
        else:
            gradient = logits_backward_op(*arguments, *ctx.rest)
    return (gradient, None, no_gradient(supervision), *(None,) * 8)


torch.library.register_autograd("vigos::logits_divergence", _logits_backward, setup_context=_logits_setup)
torch.library.register_autograd("vigos::logits_divergence_backward", once)
