"""Weigh the pairs of a micro-batch: by its teachers, by the user's function, by importance."""

from __future__ import annotations

import torch
from torch import Tensor

from vigos.divergence.api import DivergenceOutput, linear_divergence
from vigos.divergence.head import Head
from vigos.method.composed import RowWeights, control_pairs, row_losses
from vigos.method.objective import Objective
from vigos.method.supervise import SupervisedBatch, importance_ratio
from vigos.method.weights import Pairs
from vigos.train.config import ViGOSConfig


def weighted_losses(
    batch: SupervisedBatch, out: DivergenceOutput, hidden: Tensor, head: Head, args: ViGOSConfig, *,
    objective: Objective, row_weights: RowWeights | None,
) -> Tensor | None:  # fmt: skip
    """Return each pair's part of the loss, (R,); None where nothing but the supervision weighs pairs.

    Args:
        out: divergence of the student from its teachers.
        hidden, head: the teachers' hidden states (M, D) and head.
        row_weights: the user's function, see `ViGOSTrainer`.
    """
    if row_weights is None and not objective.composed and not args.importance_clip:
        return None
    losses = row_losses(
        batch, out.divergence, _pairs(batch, out, hidden, head, args.impl, objective), objective.roster, row_weights
    )
    if args.importance_clip and out.student_logprob is not None:
        losses = losses * importance_ratio(out.student_logprob, batch.sampled_logprob, args.importance_clip).to(losses)
    return losses


def _pairs(
    batch: SupervisedBatch, out: DivergenceOutput, hidden: Tensor, head: Head, impl: str, objective: Objective
) -> Pairs:
    """Return what weights of pairs are computed from; controls take two more products, without a gradient."""
    assert out.teacher_logprob is not None
    teacher = control = out.teacher_logprob
    rows = control_pairs(batch)
    if rows is not None and batch.n_pairs:
        with torch.no_grad():
            plain = linear_divergence(
                hidden, head, hidden, head, supervision=rows, labels=batch.labels, impl=impl,
                temperature=objective.divergence_temperature,
            )  # fmt: skip
        assert plain.teacher_logprob is not None
        assert plain.student_logprob is not None
        teacher, control = plain.teacher_logprob, plain.student_logprob
    token = batch.token.to(out.divergence.device)
    return Pairs(out.divergence.detach(), teacher, control, out.teacher_entropy, token)
