"""Compare the pairs of a micro-batch, and weigh them: by its teachers, by the user's function, by importance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vigos.divergence.api import linear_divergence
from vigos.divergence.head import Head
from vigos.divergence.output import DivergenceOutput, joined
from vigos.method.composed import RowWeights, control_pairs, row_losses
from vigos.method.objective import Objective
from vigos.method.supervise import SupervisedBatch, importance_ratio
from vigos.method.weights import Pairs
from vigos.train.top_tokens import joined_top

if TYPE_CHECKING:
    from vigos.train.config import ViGOSConfig
    from vigos.train.other_models import Part
    from vigos.train.recorder import Recorder
    from vigos.train.records import TopTokens
    from vigos.train.teacher_weights import TeacherWeights


def compared(
    batch: SupervisedBatch, parts: Sequence[Part], student_hidden: Tensor, head: Head, hidden: Sequence[Tensor], *,
    teacher: TeacherWeights, recorder: Recorder, step: int, args: ViGOSConfig, row_weights: RowWeights | None,
) -> tuple[DivergenceOutput, Tensor | None, TopTokens | None]:  # fmt: skip
    """Return the divergence of every pair, its part of the loss (R,), and the likeliest tokens of step number `step`.

    Losses are None where nothing but the supervision weighs pairs, tokens where they are not recorded.

    Args:
        parts: the batch by the model that teaches; hidden: of the teachers of each.
        student_hidden, head: of the student.
        row_weights: the user's function, see `ViGOSTrainer`.
    """
    objective = args.objective
    weighed = row_weights is not None or objective.composed or bool(args.importance_clip)
    outputs, pairs, tops, places = [], [], [], [part.places for part in parts]
    for part, rows in zip(parts, hidden, strict=True):
        rules = part.batch.supervision
        with part.model.heads(head) if part.model else nullcontext((head, teacher.head(head))) as (student, other):
            teacher_hidden = rows.to(other.weight.dtype)
            out = linear_divergence(
                student_hidden, student, teacher_hidden, other, supervision=rules, labels=part.batch.labels,
                impl=args.impl, **objective.divergence_options,
            )  # fmt: skip
            outputs.append(out)
            if weighed:
                pairs.append(_pairs(part.batch, out, teacher_hidden, other, args.impl, objective))
            tops.append(recorder.likeliest(step, (student_hidden, student), (teacher_hidden, other), rules))
            recorder.teacher_knows(part.batch, teacher_hidden, other, rules)
    out, losses = joined(outputs, places), None
    if weighed:
        losses = row_losses(batch, out.divergence, Pairs.joined(pairs, places), objective.roster, row_weights)
        if args.importance_clip and out.student_logprob is not None:
            ratio = importance_ratio(out.student_logprob, batch.sampled_logprob, args.importance_clip)
            losses = losses * ratio.to(losses)
    return out, losses, joined_top(tops, places)


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
    student = out.student_logprob
    assert student is not None
    return Pairs(out.divergence.detach(), teacher, control, out.teacher_entropy, token, student.detach())
