"""The registered operators `torch.ops.vigos.*`: fake implementations, autograd, and the way to the engine.

The gradient of a row depends on that row alone. It is computed with the loss, chunk by chunk, before the chunk's logits
are dropped, and scaled by the row's upstream gradient later; a row that needs a gradient after all (a clipped row whose
`divergence` is differentiated) is computed again in backward. The head's gradient mixes rows: it is computed with the
weights of the supervision and scaled by the upstream of `loss`, or computed again when `divergence` has an upstream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines import choose
from vigos.divergence.engines.problem import STATE, LinearProblem, LogitsProblem, Rows, Statistics, live_rows


def _check_rows(
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, clip: Tensor, labels: Tensor | None, n: int, m: int, v: int
) -> None:
    """Values in range. Checked where the tensors lie: on a GPU this is the call's one wait for the device."""
    if student_row.shape[0] == 0:
        return
    ranges = [
        ("supervision.student_row", student_row, 0, n - 1, f"rows of the student's {n}"),
        ("supervision.teacher_row", teacher_row, 0, m - 1, f"rows of the teacher's {m}"),
        ("supervision.kind", kind, 0, 2, "vigos.FORWARD_KL, REVERSE_KL or JSD"),
    ]
    if labels is not None:
        ranges.append(("labels", labels, 0, v - 1, f"ids below the vocabulary size {v}"))
    ends = [end.to(torch.int64) for _, x, *_ in ranges for end in x.aminmax()]
    ends.append((clip >= 0).all().to(torch.int64))  # False for NaN
    together = {end.device for end in ends}
    values = torch.stack(ends).tolist() if len(together) == 1 else [int(end) for end in ends]
    for i, (name, _, low, high, wanted) in enumerate(ranges):
        if values[2 * i] < low or values[2 * i + 1] > high:
            raise ValueError(f"{name} must hold {wanted}, got values from {values[2 * i]} to {values[2 * i + 1]}")
    if not values[-1]:
        raise ValueError("supervision.clip must be at least 0 nats (inf: no clip), got a negative or NaN value")


def _shard(v: int, group_name: str, device: torch.device) -> tuple[dist.ProcessGroup | None, int, int]:
    """(group, first global id held here, size of the whole vocabulary)."""
    if not group_name:
        return None, 0, v
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    sizes[group.rank()] = v
    dist.all_reduce(sizes, group=group)
    return group, int(sizes[: group.rank()].sum()), int(sizes.sum())


def _rows(
    supervision: Sequence[Tensor], labels: Tensor | None, scalars: Sequence[Any], n: int, m: int, v: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The fields of `Rows` from the operator's arguments, checked and on the device."""
    temperature, scale, softcap, beta, entry_clip, vocab_size, group_name = scalars
    group, start, total = _shard(v, group_name, device)
    if vocab_size > total:
        raise ValueError(f"vocab_size must be at most the heads' {total} vocabulary entries, got {vocab_size}")
    vocab_size = total if vocab_size < 0 else vocab_size
    student_row, teacher_row, kind, weight, clip = supervision
    _check_rows(student_row, teacher_row, kind, clip, labels, n, m, vocab_size)
    return {
        "student_row": student_row.to(device), "teacher_row": teacher_row.to(device), "kind": kind.to(device),
        "weight": weight.to(device), "clip": clip.to(device), "labels": None if labels is None else labels.to(device),
        "temperature": temperature, "scale": scale, "softcap": softcap, "beta": beta, "entry_clip": entry_clip,
        "vocab_size": vocab_size, "vocab_start": start, "group": group,
    }  # fmt: skip


def _loss(rows: Rows, divergence: Tensor) -> Tensor:
    """Summed in float64, so that the order of a million rows does not show."""
    value = torch.where(divergence > rows.clip, rows.clip.to(divergence.dtype), divergence)
    weighted = torch.where(rows.weight != 0, value * rows.weight.to(value.dtype), 0.0)
    return weighted.sum(dtype=torch.float64).to(divergence.dtype)


def _flat(statistics: Statistics) -> list[Tensor]:
    """Operators return tensors only: log-probabilities that were not asked for are empty."""
    empty = statistics.divergence.new_empty(0)
    return [
        statistics.divergence, statistics.student_entropy, statistics.teacher_entropy, statistics.student_lse,
        statistics.teacher_lse,
        empty if statistics.student_logprob is None else statistics.student_logprob,
        empty.clone() if statistics.teacher_logprob is None else statistics.teacher_logprob,
    ]  # fmt: skip


def _upstream(rows: Rows, divergence: Tensor, grad_loss: Tensor | None, grad_divergence: Tensor | None) -> Tensor:
    """(R,): the loss's derivative with respect to each row's divergence."""
    g = torch.zeros_like(divergence)
    if grad_loss is not None:
        g = torch.where(live_rows(rows, divergence), rows.weight.to(g.dtype) * grad_loss.to(g.dtype), g)
    return g if grad_divergence is None else g + grad_divergence.to(g.dtype)


def _no_autocast(device: torch.device) -> torch.autocast:
    """Engines choose their own precision: an autocast around the call must not reach their matrix products."""
    return torch.autocast(device.type, enabled=False)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_statistics(like: Tensor, student_row: Tensor, labels: Tensor | None) -> list[Tensor]:
    r, dtype = student_row.shape[0], _compute_dtype(like)
    sizes = [r] * 5 + [0 if labels is None else r] * 2
    return [like.new_empty((), dtype=dtype), *(like.new_empty((size,), dtype=dtype) for size in sizes)]


def _once(*_: Any) -> Any:
    raise RuntimeError(
        "vigos' divergences are differentiable once: their gradient is computed with the loss and has no derivative of "
        "its own. For second derivatives use the plain PyTorch of vigos.reference."
    )


# --- from hidden states ----------------------------------------------------------------------------------------------


def _linear_problem(
    tensors: Sequence[Tensor | None], supervision: Sequence[Tensor], labels: Tensor | None, scalars: Sequence[Any],
    need: tuple[bool, bool, bool],
) -> LinearProblem:  # fmt: skip
    hidden, weight, teacher_hidden, teacher_weight, student_bias, teacher_bias = (
        None if x is None else x.detach() for x in tensors
    )
    assert hidden is not None
    assert weight is not None
    assert teacher_hidden is not None
    if teacher_weight is None and teacher_bias is None:
        teacher_bias = student_bias
    n, m, v = hidden.shape[0], teacher_hidden.shape[0], weight.shape[0]
    return LinearProblem(
        **_rows(supervision, labels, scalars, n, m, v, hidden.device),
        student_hidden=hidden, student_weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias,
        need_dhidden=need[0], need_dweight=need[1], need_dbias=need[2],
    )  # fmt: skip


@torch.library.custom_op("vigos::linear_divergence", mutates_args=())
def linear_op(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    student_bias: Tensor | None, teacher_bias: Tensor | None,
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, weight: Tensor, clip: Tensor, labels: Tensor | None,
    temperature: float, scale: float, softcap: float | None, beta: float, entry_clip: float | None, vocab_size: int,
    group_name: str, impl: str, need_dhidden: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """loss, divergence, both entropies, both lse, both log-probabilities, computed, drow, dweight, dbias."""
    problem = _linear_problem(
        (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias),
        (student_row, teacher_row, kind, weight, clip), labels,
        (temperature, scale, softcap, beta, entry_clip, vocab_size, group_name),
        (need_dhidden, need_dweight, need_dbias),
    )  # fmt: skip
    with _no_autocast(problem.device), torch.no_grad():
        result = choose(impl, problem).forward(problem)
        like = result.statistics.divergence
        d = student_weight.shape[1]
        return (
            _loss(problem, like), *_flat(result.statistics),
            like.new_empty(0, dtype=torch.bool) if result.computed is None else result.computed,
            like.new_empty(0, d) if result.drow is None else result.drow,
            like.new_empty(0, d) if result.dweight is None else result.dweight,
            like.new_empty(0) if result.dbias is None else result.dbias,
        )  # type: ignore[return-value] # fmt: skip


@linear_op.register_fake
def _linear_fake(  # type: ignore[no-untyped-def]
    student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
    student_row, teacher_row, kind, weight, clip, labels, temperature, scale, softcap, beta, entry_clip, vocab_size,
    group_name, impl, need_dhidden, need_dweight, need_dbias,
):  # fmt: skip
    r, (v, d), dtype = student_row.shape[0], student_weight.shape, _compute_dtype(student_hidden)
    return (
        *_fake_statistics(student_hidden, student_row, labels),
        student_hidden.new_empty((r if need_dhidden else 0,), dtype=torch.bool),
        student_hidden.new_empty((r if need_dhidden else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need_dweight else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need_dbias else 0,), dtype=dtype),
    )


@torch.library.custom_op("vigos::linear_divergence_backward", mutates_args=())
def _linear_backward_op(
    grad_loss: Tensor | None, grad_divergence: Tensor | None, divergence: Tensor, computed: Tensor, drow: Tensor,
    dweight: Tensor, dbias: Tensor,
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
    student_bias: Tensor | None, teacher_bias: Tensor | None,
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, weight: Tensor, clip: Tensor,
    temperature: float, scale: float, softcap: float | None, beta: float, entry_clip: float | None, vocab_size: int,
    group_name: str, impl: str, need_dhidden: bool, need_dweight: bool, need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dhidden (N, D), dweight (V, D), dbias (V,) in their inputs' dtypes; empty where not needed."""
    problem = _linear_problem(
        (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias),
        (student_row, teacher_row, kind, weight, clip), None,
        (temperature, scale, softcap, beta, entry_clip, vocab_size, group_name),
        (need_dhidden, need_dweight, need_dbias),
    )  # fmt: skip
    with _no_autocast(problem.device), torch.no_grad():
        g = _upstream(problem, divergence, grad_loss, grad_divergence)
        head = need_dweight or need_dbias
        if grad_divergence is not None:
            # Rows that forward left out, and the head's gradient under these upstreams, are computed now.
            again = g != 0 if head else (g != 0) & ~computed
            index = again.nonzero().squeeze(1)
            if index.shape[0] > 0 or head:
                missing = bool(again.any()) and need_dhidden and not bool(computed[index].all())
                selected = replace(
                    problem, student_row=problem.student_row[index], teacher_row=problem.teacher_row[index],
                    kind=problem.kind[index], weight=g[index], clip=torch.full_like(g[index], float("inf")),
                    need_dhidden=missing,
                )  # fmt: skip
                result = choose(impl, problem).forward(selected)
                if missing:
                    assert result.drow is not None
                    drow = drow.index_copy(0, index, result.drow)
                dweight = dweight if result.dweight is None else result.dweight
                dbias = dbias if result.dbias is None else result.dbias
        elif head:
            factor = torch.zeros_like(divergence[:1]) if grad_loss is None else grad_loss.to(dweight.dtype)
            dweight, dbias = dweight * factor, dbias * factor
        dhidden = student_hidden.new_zeros((student_hidden.shape if need_dhidden else (0, 0)), dtype=drow.dtype)
        if need_dhidden:
            # A row without upstream adds nothing, whatever was computed for it.
            scaled = torch.where((g != 0)[:, None], drow * g[:, None], 0.0)
            dhidden.index_add_(0, problem.student_row, scaled)
        bias_dtype = dbias.dtype if student_bias is None else student_bias.dtype
        outputs = (dhidden.to(student_hidden.dtype), dweight.to(student_weight.dtype), dbias.to(bias_dtype))
        given = (dweight, dbias)  # an operator must not hand back its own arguments
        return tuple(x.clone() if any(x is y for y in given) else x for x in outputs)  # type: ignore[return-value]


@_linear_backward_op.register_fake
def _linear_backward_fake(  # type: ignore[no-untyped-def]
    grad_loss, grad_divergence, divergence, computed, drow, dweight, dbias, student_hidden, student_weight,
    teacher_hidden, teacher_weight, student_bias, teacher_bias, student_row, teacher_row, kind, weight, clip,
    temperature, scale, softcap, beta, entry_clip, vocab_size, group_name, impl, need_dhidden, need_dweight, need_dbias,
):  # fmt: skip
    v, d = student_weight.shape
    bias_dtype = dbias.dtype if student_bias is None else student_bias.dtype
    return (
        student_hidden.new_empty(student_hidden.shape if need_dhidden else (0, 0)),
        student_weight.new_empty((v if need_dweight else 0, d)),
        student_weight.new_empty((v if need_dbias else 0,), dtype=bias_dtype),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.scalars, ctx.need = inputs[:11], inputs[12:20], inputs[20:23]
    ctx.save_for_backward(output[1], *output[8:12], *tensors)


def _linear_backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing: tuple[Any, ...] = (None,) * 23
    if (grad_loss is None and grad_divergence is None) or not any(ctx.need):
        return nothing
    dhidden, dweight, dbias = _linear_backward_op(
        grad_loss, grad_divergence, *ctx.saved_tensors, *ctx.scalars, *ctx.need
    )
    need_dhidden, need_dweight, need_dbias = ctx.need
    return (
        dhidden if need_dhidden else None, dweight if need_dweight else None, None, None,
        dbias if need_dbias else None, *nothing[5:],
    )  # fmt: skip


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
_linear_backward_op.register_autograd(_once)


# --- from logits -----------------------------------------------------------------------------------------------------


def _logits_problem(
    student_logits: Tensor, teacher_logits: Tensor, supervision: Sequence[Tensor], labels: Tensor | None,
    scalars: Sequence[Any], inplace: bool,
) -> LogitsProblem:  # fmt: skip
    n, m, v = student_logits.shape[0], teacher_logits.shape[0], student_logits.shape[1]
    rows = _rows(supervision, labels, scalars, n, m, v, student_logits.device)
    if inplace and rows["student_row"].unique().shape[0] != rows["student_row"].shape[0]:
        raise ValueError("inplace=True needs every student row to be supervised at most once, got repeated rows")
    return LogitsProblem(**rows, student_logits=student_logits.detach(), teacher_logits=teacher_logits.detach())


@torch.library.custom_op("vigos::logits_divergence", mutates_args=())
def logits_op(
    student_logits: Tensor, teacher_logits: Tensor,
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, weight: Tensor, clip: Tensor, labels: Tensor | None,
    temperature: float, scale: float, softcap: float | None, beta: float, entry_clip: float | None, vocab_size: int,
    group_name: str, impl: str, inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, divergence, both entropies, both lse, both log-probabilities, state."""
    problem = _logits_problem(
        student_logits, teacher_logits, (student_row, teacher_row, kind, weight, clip), labels,
        (temperature, scale, softcap, beta, entry_clip, vocab_size, group_name), inplace,
    )  # fmt: skip
    with _no_autocast(problem.device), torch.no_grad():
        result = choose(impl, problem).logits_forward(problem)
        loss = _loss(problem, result.statistics.divergence)
        return (loss, *_flat(result.statistics), result.state)  # type: ignore[return-value]


@logits_op.register_fake
def _logits_fake(  # type: ignore[no-untyped-def]
    student_logits, teacher_logits, student_row, teacher_row, kind, weight, clip, labels, temperature, scale, softcap,
    beta, entry_clip, vocab_size, group_name, impl, inplace,
):  # fmt: skip
    state = student_logits.new_empty((student_row.shape[0], STATE), dtype=_compute_dtype(student_logits))
    return (*_fake_statistics(student_logits, student_row, labels), state)


@torch.library.custom_op("vigos::logits_divergence_backward", mutates_args=())
def _logits_backward_op(
    grad_loss: Tensor | None, grad_divergence: Tensor | None, divergence: Tensor, state: Tensor,
    student_logits: Tensor, teacher_logits: Tensor,
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, weight: Tensor, clip: Tensor,
    temperature: float, scale: float, softcap: float | None, beta: float, entry_clip: float | None, vocab_size: int,
    group_name: str, impl: str,
) -> Tensor:  # fmt: skip
    """dlogits (N, V) in the logits' dtype."""
    problem = _logits_problem(
        student_logits, teacher_logits, (student_row, teacher_row, kind, weight, clip), None,
        (temperature, scale, softcap, beta, entry_clip, vocab_size, group_name), False,
    )  # fmt: skip
    with _no_autocast(problem.device), torch.no_grad():
        g = _upstream(problem, divergence, grad_loss, grad_divergence)
        return choose(impl, problem).logits_backward(problem, state, g, out=None)


@_logits_backward_op.register_fake
def _logits_backward_fake(  # type: ignore[no-untyped-def]
    grad_loss, grad_divergence, divergence, state, student_logits, teacher_logits, student_row, teacher_row, kind,
    weight, clip, temperature, scale, softcap, beta, entry_clip, vocab_size, group_name, impl,
):  # fmt: skip
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("vigos::logits_divergence_backward_", mutates_args=("student_logits",))
def _logits_backward_inplace_op(
    grad_loss: Tensor | None, grad_divergence: Tensor | None, divergence: Tensor, state: Tensor,
    student_logits: Tensor, teacher_logits: Tensor,
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, weight: Tensor, clip: Tensor,
    temperature: float, scale: float, softcap: float | None, beta: float, entry_clip: float | None, vocab_size: int,
    group_name: str, impl: str,
) -> None:  # fmt: skip
    """The same, written over the student's logits."""
    problem = _logits_problem(
        student_logits, teacher_logits, (student_row, teacher_row, kind, weight, clip), None,
        (temperature, scale, softcap, beta, entry_clip, vocab_size, group_name), False,
    )  # fmt: skip
    with _no_autocast(problem.device), torch.no_grad():
        g = _upstream(problem, divergence, grad_loss, grad_divergence)
        choose(impl, problem).logits_backward(problem, state, g, out=problem.student_logits)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.scalars, ctx.inplace = inputs[8:16], inputs[16]
    ctx.save_for_backward(output[1], output[8], *inputs[:7])


def _logits_backward(ctx: Any, grad_loss: Tensor | None, grad_divergence: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing: tuple[Any, ...] = (None,) * 17
    if (grad_loss is None and grad_divergence is None) or not ctx.needs_input_grad[0]:
        return nothing
    saved = ctx.saved_tensors
    if ctx.inplace:
        with torch.no_grad():
            _logits_backward_inplace_op(grad_loss, grad_divergence, *saved, *ctx.scalars)
        return (saved[2].detach(), *nothing[1:])
    return (_logits_backward_op(grad_loss, grad_divergence, *saved, *ctx.scalars), *nothing[1:])


logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)
_logits_backward_op.register_autograd(_once)
