"""Divergences between a student's and its teachers' next-token distributions, without the logits of a batch.

`linear_divergence` starts from hidden states, `logits_divergence` from logits that exist. Both check their arguments
here, travel as one frozen dataclass to the engine that `impl` names (`vigos.engines`), and are registered operators
(`torch.ops.vigos.*`) with fake implementations and autograd.

The gradient of a row depends on that row alone. It is computed with the loss, chunk by chunk, before the chunk's logits
are dropped, and scaled by the row's upstream gradient later; a row that needs a gradient after all (a clipped row whose
`divergence` is differentiated) is computed again in backward. The head's gradient mixes rows: it is computed with the
weights of the supervision and scaled by the upstream of `loss`, or computed again when `divergence` has an upstream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.engines import IMPLS, choose
from vigos.engines.problem import (
    STATE,
    LinearProblem,
    LogitsProblem,
    Rows,
    Statistics,
    live_rows,
)
from vigos.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class DivergenceOutput:
    """R supervised rows. `loss` and `divergence` are differentiable, everything else is detached.

    Statistics are float32 (float64 for float64 inputs), in nats, of the distributions at the temperature asked for.
    """

    loss: Tensor  # scalar: sum of weight * min(divergence, clip)
    divergence: Tensor  # (R,) before the row's clip
    clipped: Tensor  # (R,) bool: divergence > clip
    student_entropy: Tensor  # (R,)
    teacher_entropy: Tensor  # (R,)
    student_lse: Tensor  # (R,) log of the sum of exp(logit)
    teacher_lse: Tensor  # (R,)
    student_logprob: Tensor | None  # (R,) log-probability of the labels; None without labels
    teacher_logprob: Tensor | None


# --- arguments -------------------------------------------------------------------------------------------------------


def _described(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else repr(x)


def _check_matrix(x: object, name: str, of: str) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in FLOATS:
        hint = "; flatten batch and time first" if isinstance(x, Tensor) and x.dim() > 2 else ""
        raise ValueError(f"{name} must be a float tensor {of}, got {_described(x)}{hint}")


def _check_like(x: Tensor, name: str, other: Tensor, other_name: str, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name} must be {other.dtype} like {other_name}, got {x.dtype}")


def _check_head(weight: object, name: str, hidden: Tensor, hidden_name: str) -> None:
    _check_matrix(weight, name, "(V, D)")
    assert isinstance(weight, Tensor)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name} must be (V, {hidden.shape[1]}) to project {hidden_name} {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{name} must have at least one vocabulary row, got {tuple(weight.shape)}")
    _check_like(weight, name, hidden, hidden_name)


def _check_bias(bias: object, name: str, weight: Tensor, weight_name: str) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1] or bias.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be a float tensor ({weight.shape[0]},) like {weight_name}, got {_described(bias)}"
        )
    _check_like(bias, name, weight, weight_name)


def _check_scalars(
    temperature: float, beta: float, entry_clip: float | None, softcap: float | None, scale: float, impl: str
) -> None:
    for name, value, fits, wanted in (
        ("temperature", temperature, lambda x: 0 < x < float("inf"), "a positive number"),
        ("beta", beta, lambda x: 0 < x < 1, "strictly between 0 and 1 (forward and reverse KL are kinds of their own)"),
        ("entry_clip", entry_clip, lambda x: x is None or x > 0, "a positive number or None"),
        ("logit_softcap", softcap, lambda x: x is None or 0 < x < float("inf"), "a positive number or None"),
        ("logit_scale", scale, lambda x: 0 < x < float("inf"), "a positive number"),
    ):
        if isinstance(value, bool | Tensor) or not (value is None or isinstance(value, int | float)) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f'impl must be "auto" or one of {", ".join(map(repr, IMPLS))}, got {impl!r}')


def _check_vocab_size(vocab_size: int | None, v: int, sharded: bool) -> int:
    """-1 stands for "all of it", which a rank that holds a shard cannot know yet."""
    if vocab_size is None:
        return -1
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size must be a positive integer or None, got {vocab_size!r}")
    if not sharded and vocab_size > v:
        raise ValueError(f"vocab_size must be at most the heads' {v} vocabulary entries, got {vocab_size}")
    return vocab_size


def _supervision_tensors(supervision: Supervision | None, n: int, m: int, device: torch.device) -> tuple[Tensor, ...]:
    """The five fields as tensors (R,) of their own dtypes, where the caller left them."""
    if supervision is None:
        if n != m:
            raise ValueError(
                f"supervision=None meets row i with row i and needs as many teacher rows as student rows ({n}), "
                f"got {m}; pass a Supervision that says which rows meet"
            )
        supervision = Supervision.aligned(n, device=device)
    if not isinstance(supervision, Supervision):
        raise ValueError(f"supervision must be a vigos.Supervision or None, got {type(supervision).__name__}")
    rows = supervision.student_row
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"supervision.student_row must be an int64 tensor (R,), got {_described(rows)}")
    r = rows.shape[0]
    fields = []
    for name, dtype, wanted in (
        ("teacher_row", torch.int64, "int64"),
        ("kind", torch.int8, "integers"),
        ("weight", torch.float32, "floats"),
        ("clip", torch.float32, "floats"),
    ):
        value = getattr(supervision, name)
        if not isinstance(value, Tensor):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or (name == "kind" and value not in (FORWARD_KL, REVERSE_KL, JSD)):
                raise ValueError(f"supervision.{name} must be {wanted} (R,) or one number, got {value!r}")
            value = torch.full((r,), value, dtype=dtype, device=rows.device)
        is_float = value.dtype.is_floating_point
        fits = value.dtype == torch.int64 if name == "teacher_row" else is_float == (wanted == "floats")
        if value.shape not in ((r,), ()) or not fits or value.dtype in (torch.bool, torch.complex64):
            raise ValueError(f"supervision.{name} must be {wanted} ({r},) like student_row, got {_described(value)}")
        fields.append(value.detach().to(dtype).expand(r).contiguous())
    for name, value in zip(("student_row", "teacher_row", "kind", "weight", "clip"), (rows, *fields), strict=True):
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"supervision.{name} must be on the CPU or on {device}, got {value.device}")
    return (rows, *fields)


def _check_labels(labels: object, r: int, device: torch.device) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.shape != (r,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be an int64 tensor ({r},), one id for each supervised row, got {_described(labels)}"
        )
    if labels.device.type != "cpu" and labels.device != device:
        raise ValueError(f"labels must be on the CPU or on {device}, got {labels.device}")


def _local(x: Any, name: str, group: dist.ProcessGroup | None) -> tuple[Any, dist.ProcessGroup | None]:
    """A DTensor's shard and the group it is sharded over; anything else unchanged."""
    if x is None or type(x) in (Tensor, torch.nn.Parameter) or not hasattr(x, "to_local"):
        return x, group
    from torch.distributed.tensor import Replicate, Shard

    if all(isinstance(p, Replicate) for p in x.placements):
        return x.to_local(), group
    if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        raise ValueError(f"{name} must be replicated or Shard(0) over a one-dimensional mesh, got {x.placements}")
    own = x.device_mesh.get_group()
    if group is not None and group.group_name != own.group_name:
        raise ValueError(f"{name} is sharded over another process group than process_group or the other head")
    return x.to_local(), own


# --- inside the operators --------------------------------------------------------------------------------------------


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
def _linear_op(
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


@_linear_op.register_fake
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


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
_linear_backward_op.register_autograd(_once)


def linear_divergence(
    student_hidden: Tensor, lm_head_weight: Tensor, teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None, *, supervision: Supervision | None = None,
    temperature: float = 1.0, beta: float = 0.5, entry_clip: float | None = None, student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None, logit_softcap: float | None = None, logit_scale: float = 1.0,
    labels: Tensor | None = None, vocab_size: int | None = None, process_group: dist.ProcessGroup | None = None,
    impl: str = "auto",
) -> DivergenceOutput:  # fmt: skip
    """Token-level divergence between the heads' distributions over the whole vocabulary, and its gradient.

    For forward KL(teacher || student) of row i against row i it replaces

        log_q = (student_hidden @ lm_head_weight.T / temperature).log_softmax(-1)
        log_p = (teacher_hidden @ teacher_lm_head_weight.T / temperature).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum()

    and never holds N x V elements. Rows outside `supervision` are not projected.

    Args:
        student_hidden: (N, D), differentiable.
        lm_head_weight: (V, D), differentiable; nothing is computed for a head that needs no gradient.
        teacher_hidden: (M, D_t). The teacher gets no gradient.
        teacher_lm_head_weight: (V, D_t). None: the student's head (D_t = D), read once for both.
        supervision: which rows meet, how, with which weight and clip. Its tensors may lie on the CPU, where checking
            them costs no wait for the device. None: row i against row i, forward KL, weight 1, no clip.
        temperature: both distributions are softmax(logits / temperature); no temperature squared in the loss.
        beta: of rows of kind JSD, beta * KL(teacher || m) + (1 - beta) * KL(student || m) with
            m = (1 - beta) * student + beta * teacher. Towards 0 it approaches forward KL times beta, towards 1 reverse
            KL times 1 - beta.
        entry_clip: each vocabulary entry's term is clipped to this before the sum (OPSD's clip).
        student_bias: (V,), differentiable. teacher_bias: (V,); with a shared head it defaults to student_bias.
        logit_softcap, logit_scale: logits are softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).
        labels: int64 (R,), ids whose log-probabilities are returned.
        vocab_size: ids from here on are padding: probability 0 on both sides, no gradient.
        process_group: the heads (and biases) passed on each rank are consecutive shards of the vocabulary; everything
            else is the same on every rank, and so is the result. A DTensor head that is Shard(0) says so by itself.
        impl: "auto", or an engine that runs or raises: "reference", "cpu", "triton", "triton_streaming",
            "cuda", "cuda_hopper".

    All of a side's tensors share a dtype: float32, bfloat16, float16 or float64. Logits, statistics and sums are
    float32 (float64 for float64) whatever the operands are. Under autocast the operands are cast as in `F.linear`.

    A logit of -inf on both sides is an impossible token and adds nothing. Where one side has probability 0 and the side
    that weights the logarithm does not, a KL is +inf: clipped by a finite clip, else the loss is +inf. Forward KL still
    has its gradient p_s - p_t then; reverse KL has none (NaN).
    """
    student_hidden, _ = _local(student_hidden, "student_hidden", None)
    teacher_hidden, _ = _local(teacher_hidden, "teacher_hidden", None)
    lm_head_weight, group = _local(lm_head_weight, "lm_head_weight", process_group)
    teacher_lm_head_weight, group = _local(teacher_lm_head_weight, "teacher_lm_head_weight", group)
    student_bias, group = _local(student_bias, "student_bias", group)
    teacher_bias, group = _local(teacher_bias, "teacher_bias", group)
    _check_matrix(student_hidden, "student_hidden", "(N, D)")
    _check_matrix(teacher_hidden, "teacher_hidden", "(M, D_t)")
    device = student_hidden.device
    if torch.is_autocast_enabled(device.type):
        to = torch.get_autocast_dtype(device.type)
        cast = [
            x.to(to) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (
                student_hidden,
                lm_head_weight,
                teacher_hidden,
                teacher_lm_head_weight,
                student_bias,
                teacher_bias,
            )
        ]
        student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight, student_bias, teacher_bias = cast
    _check_head(lm_head_weight, "lm_head_weight", student_hidden, "student_hidden")
    _check_bias(student_bias, "student_bias", lm_head_weight, "lm_head_weight")
    v = lm_head_weight.shape[0]
    _check_like(teacher_hidden, "teacher_hidden", student_hidden, "student_hidden", dtype=False)
    if teacher_lm_head_weight is None:
        if teacher_hidden.shape[1] != student_hidden.shape[1]:
            raise ValueError(
                f"teacher_hidden must be (M, {student_hidden.shape[1]}) for the shared head, got "
                f"{tuple(teacher_hidden.shape)}; pass teacher_lm_head_weight for a teacher of another width"
            )
        _check_like(teacher_hidden, "teacher_hidden", student_hidden, "student_hidden")
        _check_bias(teacher_bias, "teacher_bias", lm_head_weight, "lm_head_weight")
    else:
        _check_head(teacher_lm_head_weight, "teacher_lm_head_weight", teacher_hidden, "teacher_hidden")
        v_t = teacher_lm_head_weight.shape[0]
        if v_t != v:
            both = min(v, v_t)
            longer = "teacher_lm_head_weight" if v_t > v else "lm_head_weight"
            raise ValueError(
                f"teacher_lm_head_weight must have the {v} vocabulary rows of lm_head_weight, got {v_t}; if the extra "
                f"rows are padding, pass {longer}[:{both}] (and its bias[:{both}])"
            )
        _check_bias(teacher_bias, "teacher_bias", teacher_lm_head_weight, "teacher_lm_head_weight")
        if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
            raise ValueError(
                f"teacher_hidden must be float64 exactly when student_hidden is, got {teacher_hidden.dtype} and "
                f"{student_hidden.dtype}"
            )
    _check_scalars(temperature, beta, entry_clip, logit_softcap, logit_scale, impl)
    size = _check_vocab_size(vocab_size, v, group is not None)
    rows = _supervision_tensors(supervision, student_hidden.shape[0], teacher_hidden.shape[0], device)
    _check_labels(labels, rows[0].shape[0], device)
    if teacher_lm_head_weight is None and teacher_bias is student_bias:
        teacher_bias = None  # the operator's spelling of "the same one"
    grad = torch.is_grad_enabled()
    out = _linear_op(
        student_hidden, lm_head_weight, teacher_hidden, teacher_lm_head_weight, student_bias, teacher_bias,
        *rows, labels, float(temperature), float(logit_scale), None if logit_softcap is None else float(logit_softcap),
        float(beta), None if entry_clip is None else float(entry_clip), size,
        "" if group is None else str(group.group_name), impl,
        grad and student_hidden.requires_grad, grad and lm_head_weight.requires_grad,
        grad and student_bias is not None and student_bias.requires_grad,
    )  # fmt: skip
    return _output(out, rows[4], labels)


def _output(out: Sequence[Tensor], clip: Tensor, labels: Tensor | None) -> DivergenceOutput:
    loss, divergence = out[:2]
    details = [x.detach() for x in out[2:8]]
    logprobs = (None, None) if labels is None else (details[4], details[5])
    return DivergenceOutput(loss, divergence, divergence.detach() > clip.to(divergence.device), *details[:4], *logprobs)


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
def _logits_op(
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


@_logits_op.register_fake
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


_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)
_logits_backward_op.register_autograd(_once)


def logits_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, supervision: Supervision | None = None,
    temperature: float = 1.0, beta: float = 0.5, entry_clip: float | None = None, logit_softcap: float | None = None,
    logit_scale: float = 1.0, labels: Tensor | None = None, vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None, inplace: bool = False, impl: str = "auto",
) -> DivergenceOutput:  # fmt: skip
    """The same for logits that exist already. For forward KL of row i against row i it replaces

        log_q, log_p = (student_logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum()

    Args:
        student_logits: (N, V), differentiable. teacher_logits: (M, V), no gradient. Any of the four float dtypes; sums
            are float32 (float64 for float64).
        inplace: backward writes the gradient over `student_logits`, which saves N x V elements. Their values are gone
            then, a second backward raises, and each student row may be supervised once. Not under torch.compile.
        Everything else as in `linear_divergence`; with `process_group` each rank passes consecutive vocabulary columns.
    """
    _check_matrix(student_logits, "student_logits", "(N, V)")
    _check_matrix(teacher_logits, "teacher_logits", "(M, V)")
    if teacher_logits.shape[1] != student_logits.shape[1]:
        both = min(teacher_logits.shape[1], student_logits.shape[1])
        raise ValueError(
            f"teacher_logits must have the {student_logits.shape[1]} vocabulary columns of student_logits, got "
            f"{teacher_logits.shape[1]}; slice padded columns off first, [:, :{both}]"
        )
    if student_logits.shape[1] < 1:
        raise ValueError(f"student_logits must have at least one vocabulary column, got {tuple(student_logits.shape)}")
    _check_like(teacher_logits, "teacher_logits", student_logits, "student_logits", dtype=False)
    if (student_logits.dtype == torch.float64) != (teacher_logits.dtype == torch.float64):
        raise ValueError(
            f"teacher_logits must be float64 exactly when student_logits are, got {teacher_logits.dtype} and "
            f"{student_logits.dtype}"
        )
    if inplace and torch.compiler.is_compiling():
        raise ValueError("inplace must be False under torch.compile, which does not let backward write to its inputs")
    _check_scalars(temperature, beta, entry_clip, logit_softcap, logit_scale, impl)
    size = _check_vocab_size(vocab_size, student_logits.shape[1], process_group is not None)
    device = student_logits.device
    rows = _supervision_tensors(supervision, student_logits.shape[0], teacher_logits.shape[0], device)
    _check_labels(labels, rows[0].shape[0], device)
    out = _logits_op(
        student_logits, teacher_logits, *rows, labels, float(temperature), float(logit_scale),
        None if logit_softcap is None else float(logit_softcap), float(beta),
        None if entry_clip is None else float(entry_clip), size,
        "" if process_group is None else str(process_group.group_name), impl, inplace,
    )  # fmt: skip
    return _output(out, rows[4], labels)
