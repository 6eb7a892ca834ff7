"""The registered operators `torch.ops.vigos.*`: fake implementations, autograd, and the way to the engine.

The gradient of a row depends on that row alone. It is computed with the loss, chunk by chunk, before the chunk's logits
are dropped, and scaled by the row's upstream gradient later; a row that needs a gradient after all (a clipped row whose
`divergence` is differentiated) is computed again in backward. The head's gradient mixes rows: it is computed with the
weights of the supervision and scaled by the upstream of `loss`, or computed again when `divergence` has an upstream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines import choose
from vigos.divergence.engines.precision import ieee_products
from vigos.divergence.engines.problem import (
    STATE,
    LinearProblem,
    LogitsProblem,
    LogitTransform,
    Rows,
    Statistics,
    live_rows,
)
from vigos.divergence.supervision import REVERSE_KL

# Values are checked, and rows counted, on the host: no operator can be captured in a CUDA graph.
NOT_CAPTURED = (torch.Tag.cudagraph_unsafe,)


def operator(name: str) -> Callable[[Callable[..., object]], Any]:
    """Register a function that changes none of its arguments as an operator.

    torch.library.custom_op does the same, but its first call imports torch._dynamo: two seconds.
    """

    def register(function: Callable[..., object]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *NOT_CAPTURED))
        torch.library.impl(name, "default", function)
        namespace, operator = name.split("::")
        return getattr(getattr(torch.ops, namespace), operator).default

    return register


def _check_rows(
    student_row: Tensor, teacher_row: Tensor, kind: Tensor, clip: Tensor, labels: Tensor | None, n: int, m: int, v: int
) -> None:
    """Check that values are in range. On a GPU this is the call's one wait for the device."""
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


def check_targets(kind: Tensor, target: Sequence[Tensor], m: int) -> None:
    """Check the values of control_row, contrast and plausibility; on a GPU another wait for the device."""
    control_row, contrast, plausibility = target
    if control_row.shape[0] == 0:
        return
    low, high = (int(x) for x in control_row.aminmax())
    if low < 0 or high >= m:
        raise ValueError(
            f"supervision.control_row must hold rows of the teacher's {m}, got values from {low} to {high}"
        )
    for name, x, most, wanted in (
        ("contrast", contrast, math.inf, "finite and at least 0"), ("plausibility", plausibility, 1.0, "in [0, 1]"),
    ):  # fmt: skip
        if not bool(((x >= 0) & (x <= most) & x.isfinite()).all()):  # False for NaN
            raise ValueError(f"supervision.{name} must be {wanted}, got values from {x.min():g} to {x.max():g}")
    if bool(((kind == REVERSE_KL).to(plausibility.device) & (plausibility > 0)).any()):
        raise ValueError(
            "supervision.plausibility must be 0 for pairs of reverse KL, got a positive value: a target that is cut "
            "has probability 0 where the student has not, and the divergence is infinite; take forward KL or JSD"
        )


def _shard(v: int, group_name: str, device: torch.device) -> tuple[dist.ProcessGroup | None, int, int]:
    """Return (group, first id of this rank's shard, size of the full vocabulary)."""
    if not group_name:
        return None, 0, v
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=device)
    sizes[group.rank()] = v
    dist.all_reduce(sizes, group=group)
    return group, int(sizes[: group.rank()].sum()), int(sizes.sum())


def _given(x: float) -> float | None:
    return None if x == math.inf else x


@dataclass(frozen=True)
class Call:
    """Options of a call besides its tensors, and how they travel through an operator's schema.

    Attributes:
        student, teacher: each side's transform from raw logits to z.
        beta: of rows of kind JSD. entry_clip: clip of each vocabulary entry's term, or None.
        vocab_size: logical size of the whole vocabulary; -1: every entry that the heads hold.
        group_name: of the process group that the vocabulary is sharded over, or "".
        impl: "auto" or the name of an engine.
    """

    student: LogitTransform
    teacher: LogitTransform
    beta: float = 0.5
    entry_clip: float | None = None
    vocab_size: int = -1
    group_name: str = ""
    impl: str = "auto"

    def packed(self) -> tuple[list[float], int, str, str]:
        """Return the operators' arguments scalars, vocab_size, group_name, impl; in `scalars` inf stands for None."""
        numbers: list[float | None] = []
        for side in (self.student, self.teacher):
            numbers += [side.scale, side.softcap, side.temperature]
        numbers += [self.beta, self.entry_clip]
        scalars = [math.inf if x is None else float(x) for x in numbers]
        return scalars, self.vocab_size, self.group_name, self.impl

    @classmethod
    def unpacked(cls, scalars: Sequence[float], vocab_size: int, group_name: str, impl: str) -> Call:
        """Return the call that `packed` gave these arguments."""
        scale_s, cap_s, temperature_s, scale_t, cap_t, temperature_t, beta, entry_clip = scalars
        return cls(
            LogitTransform(scale_s, _given(cap_s), temperature_s),
            LogitTransform(scale_t, _given(cap_t), temperature_t),
            beta, _given(entry_clip), vocab_size, group_name, impl,
        )  # fmt: skip


def _rows(
    call: Call, supervision: Sequence[Tensor], labels: Tensor | None, sizes: tuple[int, int, int],
    device: torch.device, checked: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of `Rows` on the device; `sizes`: student rows, teacher rows, vocabulary here.

    checked: their values were checked before; on a GPU that is a wait for the device.
    """
    n, m, v = sizes
    group, start, total = _shard(v, call.group_name, device)
    if call.vocab_size > total:
        raise ValueError(f"vocab_size must be at most the heads' {total} vocabulary entries, got {call.vocab_size}")
    vocab_size = total if call.vocab_size < 0 else call.vocab_size
    names = ("student_row", "teacher_row", "kind", "weight", "clip", "control_row", "contrast", "plausibility")
    student_row, teacher_row, kind, _, clip, *target = supervision
    if not checked:
        _check_rows(student_row, teacher_row, kind, clip, labels, n, m, vocab_size)
        if target:
            check_targets(kind, target, m)
    if target and not bool((target[1] != 0).any() | (target[2] != 0).any()):
        supervision = supervision[:5]  # every target is its teacher row
    return {
        **{name: x.to(device) for name, x in zip(names, supervision, strict=False)},
        "labels": None if labels is None else labels.to(device), "student_transform": call.student,
        "teacher_transform": call.teacher, "beta": call.beta, "entry_clip": call.entry_clip, "vocab_size": vocab_size,
        "vocab_start": start, "group": group,
    }  # fmt: skip


def _loss(rows: Rows, divergence: Tensor) -> Tensor:
    """Sum in float64, so that the order of a million rows does not show."""
    value = torch.where(divergence > rows.clip, rows.clip.to(divergence.dtype), divergence)
    weighted = torch.where(rows.weight != 0, value * rows.weight.to(value.dtype), 0.0)
    return weighted.sum(dtype=torch.float64).to(divergence.dtype)


def _flat(statistics: Statistics) -> list[Tensor]:
    """Return the statistics as tensors only, as operators must: log-probabilities not asked for are empty."""
    empty = statistics.divergence.new_empty(0)
    return [
        statistics.divergence, statistics.student_entropy, statistics.teacher_entropy, statistics.student_lse,
        statistics.teacher_lse,
        empty if statistics.student_logprob is None else statistics.student_logprob,
        empty.clone() if statistics.teacher_logprob is None else statistics.teacher_logprob,
    ]  # fmt: skip


def _upstream(rows: Rows, divergence: Tensor, grad_loss: Tensor | None, grad_divergence: Tensor | None) -> Tensor:
    """Return the loss's derivative with respect to each row's divergence, (R,)."""
    g = torch.zeros_like(divergence)
    if grad_loss is not None:
        g = torch.where(live_rows(rows, divergence), rows.weight.to(g.dtype) * grad_loss.to(g.dtype), g)
    return g if grad_divergence is None else g + grad_divergence.to(g.dtype)


@contextmanager
def _engine_runs_on(device: torch.device) -> Iterator[None]:
    """Set the stage of an engine: no autocast, no gradients, its device current, float32 products in float32.

    Engines choose their own precision: an autocast around the call must not reach their matrix products, nor must the
    TF32 switches. Triton and CUDA launch on the current device, wherever the tensors lie.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), torch.no_grad(), guard, ieee_products():
        yield


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_statistics(like: Tensor, r: int, labels: Tensor | None) -> list[Tensor]:
    dtype, sizes = _compute_dtype(like), [r] * 5 + [0 if labels is None else r] * 2
    return [like.new_empty((), dtype=dtype), *(like.new_empty((size,), dtype=dtype) for size in sizes)]


def _no_gradient(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """Return None for a list argument in the structure that autograd wants: a list only if all of it are tensors."""
    return None if any(x is None for x in tensors) else [None] * len(tensors)


def _once(*_: Any) -> Any:
    raise RuntimeError(
        "vigos' divergences are differentiable once: their gradient is computed with the loss and has no derivative of "
        "its own. For second derivatives use the plain PyTorch of vigos.reference."
    )


# --- from hidden states ----------------------------------------------------------------------------------------------
#
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
        **_rows(call, supervision, labels, sizes, hidden.device, checked),
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
    with _engine_runs_on(problem.device):
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


@torch.library.register_fake("vigos::linear_divergence")
def _linear_fake(  # type: ignore[no-untyped-def]
    student_hidden, student_weight, student_bias, teacher, supervision, labels, scalars, vocab_size, group_name, impl,
    need,
):  # fmt: skip
    r, (v, d), dtype = supervision[0].shape[0], student_weight.shape, _compute_dtype(student_hidden)
    return (
        *_fake_statistics(student_hidden, r, labels),
        student_hidden.new_empty((r if need[0] else 0,), dtype=torch.bool),
        student_hidden.new_empty((r if need[0] else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need[1] else 0, d), dtype=dtype),
        student_hidden.new_empty((v if need[2] else 0,), dtype=dtype),
    )


@operator("vigos::linear_divergence_backward")
def _linear_backward_op(
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
    with _engine_runs_on(problem.device):
        g = _upstream(problem, divergence, grad_loss, grad_divergence)
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
        computed = _linear_backward_op([grad_loss, grad_divergence], saved, student, teacher, supervision, *ctx.rest)
        gradients = tuple(x if needed else None for x, needed in zip(computed, need, strict=True))
    return (*gradients, _no_gradient(teacher), _no_gradient(supervision), *(None,) * 6)


torch.library.register_autograd("vigos::linear_divergence", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("vigos::linear_divergence_backward", _once)


# --- from logits -----------------------------------------------------------------------------------------------------


def _logits_problem(
    call: Call, student_logits: Tensor, teacher_logits: Tensor, supervision: Sequence[Tensor], labels: Tensor | None,
    *, inplace: bool = False, checked: bool = False,
) -> LogitsProblem:  # fmt: skip
    sizes = (student_logits.shape[0], teacher_logits.shape[0], student_logits.shape[1])
    rows = _rows(call, supervision, labels, sizes, student_logits.device, checked)
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
    with _engine_runs_on(problem.device):
        result = choose(impl, problem).logits_forward(problem)
        loss = _loss(problem, result.statistics.divergence)
        return (loss, *_flat(result.statistics), result.state)  # type: ignore[return-value]


@torch.library.register_fake("vigos::logits_divergence")
def _logits_fake(  # type: ignore[no-untyped-def]
    student_logits, teacher_logits, supervision, labels, scalars, vocab_size, group_name, impl, inplace
):
    r = supervision[0].shape[0]
    state = student_logits.new_empty((r, STATE), dtype=_compute_dtype(student_logits))
    return (*_fake_statistics(student_logits, r, labels), state)


def _logits_gradient(
    upstream: list[Tensor | None], saved: list[Tensor], student_logits: Tensor, teacher_logits: Tensor,
    supervision: list[Tensor], call: Call, inplace: bool,
) -> Tensor:  # fmt: skip
    problem = _logits_problem(call, student_logits, teacher_logits, supervision, None, checked=True)
    divergence, state = saved
    with _engine_runs_on(problem.device):
        g = _upstream(problem, divergence, *upstream)
        out = problem.student_logits if inplace else None
        return choose(call.impl, problem).logits_backward(problem, state, g, out=out)


@operator("vigos::logits_divergence_backward")
def _logits_backward_op(
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
def _logits_backward_inplace_op(
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
                _once()
            with torch.no_grad():
                _logits_backward_inplace_op(*arguments, *ctx.rest)
            gradient = student_logits.detach()
        else:
            gradient = _logits_backward_op(*arguments, *ctx.rest)
    return (gradient, None, _no_gradient(supervision), *(None,) * 6)


torch.library.register_autograd("vigos::logits_divergence", _logits_backward, setup_context=_logits_setup)
torch.library.register_autograd("vigos::logits_divergence_backward", _once)
