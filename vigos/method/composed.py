"""The loss of pairs composed on their divergence, where a teacher or the user weighs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vigos.divergence.supervision import Supervision
from vigos.method.supervise import SupervisedBatch
from vigos.method.teachers import Teacher
from vigos.method.weights import WEIGHTS, Pairs

RowWeights = Callable[[SupervisedBatch, Pairs], Tensor]  # weights (R,) of a batch's pairs


def row_losses(
    batch: SupervisedBatch, divergence: Tensor, pairs: Pairs, teachers: Sequence[Teacher],
    row_weights: RowWeights | None = None,
) -> Tensor:  # fmt: skip
    """Return each pair's part of the loss, (R,), differentiable in `divergence` (R,)."""
    rows, term = batch.supervision, batch.term.to(divergence.device).long()
    assert isinstance(rows.clip, Tensor)
    assert isinstance(rows.weight, Tensor)
    clip = rows.clip.to(divergence)
    value = torch.where(divergence > clip, clip, divergence)
    weight = rows.weight.to(divergence)
    for i, teacher in enumerate(teachers):
        mine = term == i
        if teacher.soft_clip is not None:
            value = torch.where(mine, teacher.soft_clip * torch.tanh(divergence / teacher.soft_clip), value)
        for name, given in teacher.weigh.items():
            weight = torch.where(mine, weight * WEIGHTS[name](pairs, given), weight)
    if row_weights is not None:
        extra = row_weights(batch, pairs)
        if not isinstance(extra, Tensor) or extra.shape != weight.shape:
            got = tuple(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
            raise ValueError(f"row_weights must return one weight a pair, {tuple(weight.shape)}, got {got}")
        weight = weight * extra.detach().to(weight)
    return torch.where(weight != 0, value * weight, 0.0)


def control_pairs(batch: SupervisedBatch) -> Supervision | None:
    """Return the pairs of controls, in the student's place, and their teachers; None without a control."""
    if batch.control_row is None:
        return None
    assert isinstance(batch.supervision.teacher_row, Tensor)
    return Supervision(batch.control_row, batch.supervision.teacher_row)
