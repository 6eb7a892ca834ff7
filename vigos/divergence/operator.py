"""Register the operators `torch.ops.vigos.*`, run them on an engine, differentiate them once.

The gradient of a row depends on that row alone. It is computed with the loss, chunk by chunk, before the chunk's logits
are dropped, and scaled by the row's upstream gradient later; a row that needs a gradient after all (a clipped row whose
`divergence` is differentiated) is computed again in backward. The head's gradient mixes rows: it is computed with the
weights of the supervision and scaled by the upstream of `loss`, or computed again when `divergence` has an upstream.

The gradient of logits is as large as they are: engines that read a row once for both write it with the loss, at the
weights of the supervision. Rows to which backward says otherwise are computed again, never scaled: a 16-bit gradient
would be rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.engines.precision import ieee_products
from vigos.divergence.engines.problem import Rows, Statistics, live_rows

# Values are checked, and rows counted, on the host: no operator can be captured in a CUDA graph.
NOT_CAPTURED = (torch.Tag.cudagraph_unsafe,)


def operator(name: str, *mutates: str) -> Callable[[Callable[..., object]], Any]:
    """Register a function as an operator that changes the arguments named, and no others.

    torch.library.custom_op does the same, but its first call imports torch._dynamo: two seconds.
    """

    def register(function: Callable[..., object]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *NOT_CAPTURED))
        torch.library.impl(name, "default", function)
        namespace, operator = name.split("::")
        return getattr(getattr(torch.ops, namespace), operator).default

    return register


def total_loss(rows: Rows, divergence: Tensor) -> Tensor:
    """Sum in float64, so that the order of a million rows does not show."""
    value = torch.where(divergence > rows.clip, rows.clip.to(divergence.dtype), divergence)
    weighted = torch.where(rows.weight != 0, value * rows.weight.to(value.dtype), 0.0)
    return weighted.sum(dtype=torch.float64).to(divergence.dtype)


def flat(statistics: Statistics) -> list[Tensor]:
    """Return the statistics as tensors only, as operators must: log-probabilities not asked for are empty."""
    empty = statistics.divergence.new_empty(0)
    return [
        statistics.divergence, statistics.student_entropy, statistics.teacher_entropy, statistics.student_lse,
        statistics.teacher_lse,
        empty if statistics.student_logprob is None else statistics.student_logprob,
        empty.clone() if statistics.teacher_logprob is None else statistics.teacher_logprob,
    ]  # fmt: skip


def row_upstream(rows: Rows, divergence: Tensor, grad_loss: Tensor | None, grad_divergence: Tensor | None) -> Tensor:
    """Return the loss's derivative with respect to each row's divergence, (R,)."""
    g = torch.zeros_like(divergence)
    if grad_loss is not None:
        g = torch.where(live_rows(rows, divergence), rows.weight.to(g.dtype) * grad_loss.to(g.dtype), g)
    return g if grad_divergence is None else g + grad_divergence.to(g.dtype)


@contextmanager
def engine_runs_on(device: torch.device) -> Iterator[None]:
    """Set the stage of an engine: no autocast, no gradients, its device current, float32 products in float32.

    Engines choose their own precision: an autocast around the call must not reach their matrix products, nor must the
    TF32 switches. Triton and CUDA launch on the current device, wherever the tensors lie.
    """
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), torch.no_grad(), guard, ieee_products():
        yield


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_statistics(like: Tensor, r: int, labels: Tensor | None) -> list[Tensor]:
    dtype, sizes = compute_dtype(like), [r] * 5 + [0 if labels is None else r] * 2
    return [like.new_empty((), dtype=dtype), *(like.new_empty((size,), dtype=dtype) for size in sizes)]


def no_gradient(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """Return None for a list argument in the structure that autograd wants: a list only if all of it are tensors."""
    return None if any(x is None for x in tensors) else [None] * len(tensors)


def once(*_: Any) -> Any:
    raise RuntimeError(
        "vigos' divergences are differentiable once: their gradient is computed with the loss and has no derivative of "
        "its own. For second derivatives use the plain PyTorch of vigos.reference."
    )
