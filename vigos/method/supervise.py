"""From rollouts and their spans to what is computed: whose tokens meet which teacher, which way, clipped and weighted.

    term         rollouts   tokens                                  direction
    perception   valid      description                             KL(teacher || student)
    reasoning    valid      reasoning and answer                    KL(teacher || student)
    reference    invalid    every completion token, EOS included    KL(student || teacher)
    method="opsd": one term, called "reference": every token of every rollout, KL(teacher || student)

A row without images has nothing to be perceived, so its description is left unsupervised.

Pure functions of their arguments: nothing here runs a model. The divisors are global (all micro-batches of the
optimizer step, all ranks), so a step is routed in two passes: `count_terms` on each micro-batch, then `divisors` of
their sum and `route`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision
from vigos.method.encode import EncodedPrompt, ScoredSequence
from vigos.method.objective import Objective
from vigos.method.prompts import Prompts, Role
from vigos.method.spans import Spans

Term = Literal["perception", "reasoning", "reference"]
TERMS: tuple[Term, ...] = ("perception", "reasoning", "reference")
SEGMENTS = ("description", "reasoning", "answer", "other")  # what `RoutedBatch.segment` numbers

NO_CLIP = float("inf")


@dataclass(frozen=True)
class Rollout:
    """One completion of a row's student prompt, parsed. `prompts` needs the roles that supervise it and the student's.

    Attributes:
        images: the row's images as they came (PIL), for records; not read here.
        completion_ids: (C,) int64 on the CPU, EOS included if there was one.
        reference: what the privileged teachers read; None: the answer.
    """

    problem_id: str
    problem: str
    answer: str
    images: tuple[Any, ...]
    prompts: Mapping[Role, EncodedPrompt]
    completion_ids: Tensor
    spans: Spans
    reference: str | None = None


@dataclass(frozen=True)
class Assignment:
    """The tokens of one rollout that one teacher supervises, by index into the completion."""

    term: Term
    tokens: Tensor  # (S,) int64, increasing
    segment: Tensor  # (S,) int8, index into SEGMENTS
    clip: Tensor  # (S,) float32, nats
    kind: int
    start: int  # the teacher reads the completion from this token on


@dataclass(frozen=True)
class TermCounts:
    """Supervised tokens and the rollouts that hold them, by term in the order of TERMS."""

    tokens: Tensor  # (3,) int64
    rows: Tensor  # (3,) int64

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(self.tokens + other.tokens, self.rows + other.rows)


@dataclass(frozen=True)
class RoutedBatch:
    """A micro-batch ready to be computed. R supervised rows; `student_row` and `teacher_row` of `supervision` count
    through the scored positions of `student_sequences` and `teacher_sequences` in order.

    Attributes:
        term, segment: int8 (R,), indices into TERMS and SEGMENTS.
        owner, token: int64 (R,), the rollout and the token of its completion.
        labels: int64 (R,), that token's id.
        counts: of this micro-batch.
    """

    rollouts: tuple[Rollout, ...]
    student_sequences: list[ScoredSequence]
    teacher_sequences: list[ScoredSequence]
    supervision: Supervision
    term: Tensor
    segment: Tensor
    owner: Tensor
    token: Tensor
    labels: Tensor
    counts: TermCounts

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.term)


def assignments(spans: Spans, objective: Objective, *, has_images: bool = True) -> list[Assignment]:
    """Which tokens of a rollout each teacher supervises; terms of weight 0 and terms without tokens are left out."""
    if spans.reason == "image_token":  # its features would be somebody else's: nothing of it can be scored
        return []
    whole = torch.arange(spans.length)
    found: list[Assignment] = []
    if objective.method == "opsd":
        found.append(_assignment("reference", whole, FORWARD_KL, spans, objective))
    elif not spans.valid and objective.invalid_rollouts == "reference":
        kind = REVERSE_KL if objective.reference_kl == "reverse" else FORWARD_KL
        found.append(_assignment("reference", whole, kind, spans, objective))
    else:
        description, reasoning = torch.arange(*spans.description), _reasoning_tokens(spans, whole, objective)
        if has_images:
            found.append(_assignment("perception", description, FORWARD_KL, spans, objective))
        found.append(_assignment("reasoning", reasoning, FORWARD_KL, spans, objective))
    weights = dict(zip(TERMS, objective.lambdas, strict=True))
    return [a for a in found if len(a.tokens) and weights[a.term] > 0]


def teacher_prefill(term: Term, objective: Objective, prompts: Prompts) -> str | None:
    """What opens the assistant's turn of a term's teacher; None: what its role always has."""
    if term != "reasoning":
        return None
    return prompts.think_prefill if objective.reasoning_prefix == "think" else prompts.prefill


def _reasoning_tokens(spans: Spans, whole: Tensor, objective: Objective) -> Tensor:
    """Valid: reasoning and answer. Invalid (an ablation): all that follows the description, or `<think>` if the teacher
    starts there."""
    if spans.valid:
        return torch.cat([torch.arange(*spans.reasoning), torch.arange(*spans.answer)])
    if objective.reasoning_prefix == "think":
        return whole[spans.think_start :] if spans.think_start is not None else whole[:0]
    return whole[spans.description[1] :]


def _segments(tokens: Tensor, spans: Spans) -> Tensor:
    segment = torch.full(tokens.shape, SEGMENTS.index("other"), dtype=torch.int8)
    for i, (start, end) in enumerate((spans.description, spans.reasoning, spans.answer)):
        segment[(tokens >= start) & (tokens < end)] = i
    return segment


def _assignment(term: Term, tokens: Tensor, kind: int, spans: Spans, objective: Objective) -> Assignment:
    if objective.divergence == "jsd":
        kind = JSD
    clip = torch.full(tokens.shape, objective.token_clip if objective.clip_mode == "token" else NO_CLIP)
    if objective.clip_mode == "token" and len(tokens):
        if term == "perception" and objective.description_end_clip is not None:
            clip[-1] = objective.description_end_clip
        if term == "reasoning" and objective.reasoning_start_clip is not None:
            clip[0] = objective.reasoning_start_clip
    start = 0
    if term == "reasoning" and objective.reasoning_prefix == "think":
        start = spans.think_start or 0
    return Assignment(term, tokens, _segments(tokens, spans), clip, kind, start)


def count_terms(rollouts: Sequence[Rollout], objective: Objective) -> TermCounts:
    """Supervised tokens and rollouts of a micro-batch, by term."""
    tokens, rows = torch.zeros(2, len(TERMS), dtype=torch.int64)
    for rollout in rollouts:
        for a in assignments(rollout.spans, objective, has_images=bool(rollout.images)):
            tokens[TERMS.index(a.term)] += len(a.tokens)
            rows[TERMS.index(a.term)] += 1
    return TermCounts(tokens, rows)


def divisors(objective: Objective, step: TermCounts, micro_batch: TermCounts, micro_batches: int = 1) -> Tensor:
    """What each term's sum is divided by in one micro-batch, (3,) float64; infinite for a term that is empty.

    Args:
        step: counts of the whole optimizer step, over micro-batches and ranks.
        micro_batch: counts of this micro-batch, over ranks (normalize="active").
        micro_batches: how many of them the step has.
    """
    if objective.normalize == "tokens":
        count = step.tokens
    elif objective.normalize == "sequence":
        count = step.rows
    else:  # every supervised token of the micro-batch counts alike, and the step is the mean of its micro-batches
        count = torch.where(micro_batch.tokens > 0, micro_batch.tokens.sum(), 0) * micro_batches
    return torch.where(count > 0, count.double(), float("inf"))


def route(
    rollouts: Sequence[Rollout], objective: Objective, divisor: Tensor | None = None, scale: float = 1.0
) -> RoutedBatch:
    """Lays a micro-batch out for scoring.

    Args:
        divisor: (3,) from `divisors`; None: this micro-batch is the whole step.
        scale: factor of every weight, such as the number of ranks whose gradients will be averaged.
    """
    counts = count_terms(rollouts, objective)
    if divisor is None:
        divisor = divisors(objective, counts, counts)
    student: list[ScoredSequence] = []
    teacher: list[ScoredSequence] = []
    columns: list[dict[str, Tensor]] = []
    student_rows = teacher_rows = 0
    for i, rollout in enumerate(rollouts):
        found = assignments(rollout.spans, objective, has_images=bool(rollout.images))
        if not found:
            continue
        ids = rollout.completion_ids
        scored = torch.unique(torch.cat([a.tokens for a in found]))  # sorted
        student.append(ScoredSequence(_prompt(rollout, "student"), ids[: scored[-1] + 1], scored, (i, "student")))
        for a in found:
            t = TERMS.index(a.term)
            weight = objective.lambdas[t] * scale / float(divisor[t])
            if objective.normalize == "sequence":
                weight /= len(a.tokens)
            R = len(a.tokens)
            teacher.append(
                ScoredSequence(
                    _prompt(rollout, a.term), ids[a.start : a.tokens[-1] + 1], a.tokens - a.start, (i, a.term)
                )
            )
            columns.append(
                {
                    "student_row": student_rows + torch.searchsorted(scored, a.tokens),
                    "teacher_row": teacher_rows + torch.arange(R),
                    "kind": torch.full((R,), a.kind, dtype=torch.int8),
                    "weight": torch.full((R,), weight, dtype=torch.float32),
                    "clip": a.clip,
                    "term": torch.full((R,), t, dtype=torch.int8),
                    "segment": a.segment,
                    "owner": torch.full((R,), i),
                    "token": a.tokens,
                    "labels": ids[a.tokens],
                }
            )
            teacher_rows += R
        student_rows += len(scored)
    table = {name: torch.cat([c[name] for c in columns]) if columns else _EMPTY[name] for name in _EMPTY}
    supervision = Supervision(*(table[name] for name in ("student_row", "teacher_row", "kind", "weight", "clip")))
    return RoutedBatch(
        rollouts=tuple(rollouts),
        student_sequences=student,
        teacher_sequences=teacher,
        supervision=supervision,
        counts=counts,
        **{name: table[name] for name in ("term", "segment", "owner", "token", "labels")},
    )


_EMPTY = {
    name: torch.empty(0, dtype=dtype)
    for names, dtype in (
        (("student_row", "teacher_row", "owner", "token", "labels"), torch.int64),
        (("kind", "term", "segment"), torch.int8),
        (("weight", "clip"), torch.float32),
    )
    for name in names
}


def _prompt(rollout: Rollout, role: Role) -> EncodedPrompt:
    if role not in rollout.prompts:
        raise ValueError(
            f"prompts of row {rollout.problem_id} must hold {role!r}, which it needs, got {sorted(rollout.prompts)}"
        )
    return rollout.prompts[role]
