"""`DivergenceOutput`: what the divergences return, and the results of several calls put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class DivergenceOutput:
    """Hold the results for R pairs. `loss` and `divergence` are differentiable, everything else is detached.

    Statistics are float32 (float64 for float64 inputs), in nats, of the distributions at the temperature asked for.
    """

    loss: Tensor  # scalar: sum or mean of weight * min(divergence, clip); (R,) with reduction="none"
    divergence: Tensor  # (R,) before the row's clip
    clipped: Tensor  # (R,) bool: divergence > clip
    student_entropy: Tensor  # (R,)
    teacher_entropy: Tensor  # (R,); with a contrast or a cut, this and the next are the target's
    student_lse: Tensor  # (R,) log of the sum of exp(logit)
    teacher_lse: Tensor  # (R,)
    student_logprob: Tensor | None  # (R,) log-probability of the labels; None without labels
    teacher_logprob: Tensor | None


def reduced(loss: Tensor, divergence: Tensor, weight: Tensor, clip: Tensor, reduction: str) -> Tensor:
    """Return the sum `loss` over pairs as it is, as their mean or pair by pair; `reduction` as in the divergences."""
    if reduction == "mean":
        return loss / (weight != 0).sum().clamp(min=1)
    if reduction == "none":
        value = torch.where(divergence.detach() > clip, clip.to(divergence.dtype), divergence)
        return torch.where(weight != 0, value * weight.to(value.dtype), 0.0)
    return loss


def joined(outputs: Sequence[DivergenceOutput], places: Sequence[Tensor]) -> DivergenceOutput:
    """Return the results of calls for some of R pairs each, with reduction "sum", as one for all R.

    Args:
        places: int64 (R',) for each call, where its pairs stand among the R; together each place once.
    """
    if len(outputs) == 1:
        return outputs[0]
    columns = {f.name: [getattr(out, f.name) for out in outputs] for f in fields(DivergenceOutput)}
    loss = torch.stack(columns.pop("loss")).sum()
    return DivergenceOutput(loss, **{name: in_order(x, places) for name, x in columns.items()})  # type: ignore[arg-type]


def in_order(parts: Sequence[Tensor | None], places: Sequence[Tensor]) -> Tensor | None:
    """Return columns (R', …) end to end, in the order of their places; None for columns that are not there."""
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    order = torch.cat(list(places)).argsort().to(parts[0].device)
    return torch.cat(list(parts))[order]  # type: ignore[arg-type]
