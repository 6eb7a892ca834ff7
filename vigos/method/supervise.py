"""Decide which tokens of a rollout meet which teacher, in which direction, clipped and weighted how.

    term         rollouts   tokens                                  direction
    perception   valid      description                             KL(teacher || student)
    reasoning    valid      reasoning and answer                    KL(teacher || student)
    reference    invalid    every completion token, EOS included    KL(student || teacher)
    method="opsd": one term, called "reference": every token of every rollout, KL(teacher || student)

An example without images has nothing to be perceived, so its description is left unsupervised.

Pure functions of their arguments: nothing here runs a model. The divisors are global (all micro-batches of the
optimizer step, all ranks), so a step takes two passes: `count_terms` on each micro-batch, then `divisors` of their
sum and `supervise`.
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
SEGMENTS = ("description", "reasoning", "answer", "other")  # what `SupervisedBatch.segment` numbers

NO_CLIP = float("inf")


@dataclass(frozen=True)
class Rollout:
    """Hold one completion of an example's student prompt, parsed.

    Attributes:
        images: the example's images (PIL), for records; not read here.
        prompts: of the student and of the teachers that supervise it.
        completion_ids: (C,) int64 on the CPU, EOS included if there was one.
        reference: the text that privileged teachers read; None: the answer.
        correct: True if the boxed answer is the reference answer; None: not graded.
        logprobs: (C,) float32, nats: of the tokens under the weights that sampled them, at temperature 1; NaN where not
            known, None if none is.
        version: optimizer steps behind those weights; None: not known.
    """

    problem_id: str
    problem: str
    answer: str
    images: tuple[Any, ...]
    prompts: Mapping[Role, EncodedPrompt]
    completion_ids: Tensor
    spans: Spans
    reference: str | None = None
    correct: bool | None = None
    logprobs: Tensor | None = None
    version: int | None = None


@dataclass(frozen=True)
class Assignment:
    """Name the tokens of one rollout that one teacher supervises, by index into the completion."""

    term: Term
    tokens: Tensor  # (S,) int64, increasing
    segment: Tensor  # (S,) int8, index into SEGMENTS
    clip: Tensor  # (S,) float32, nats
    kind: int
    start: int  # the teacher reads the completion from this token on


@dataclass(frozen=True)
class TermCounts:
    """Count supervised tokens and the rollouts that hold them, by term in the order of TERMS."""

    tokens: Tensor  # (3,) int64
    rollouts: Tensor  # (3,) int64

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(self.tokens + other.tokens, self.rollouts + other.rollouts)


@dataclass(frozen=True)
class SupervisedBatch:
    """Hold a micro-batch ready to be scored: R pairs of hidden rows and where they come from.

    `student_row` and `teacher_row` of `supervision` count through the scored positions of `student_sequences` and
    `teacher_sequences` in order.

    Attributes:
        term, segment: int8 (R,), indices into TERMS and SEGMENTS.
        owner, token: int64 (R,), the rollout and the token of its completion.
        labels: int64 (R,), that token's id.
        sampled_logprob: float32 (R,), its log-probability when it was sampled; NaN where not known.
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
    sampled_logprob: Tensor
    counts: TermCounts

    @property
    def n_pairs(self) -> int:
        """Return R, the number of pairs."""
        return len(self.term)

    def importance_weighted(self, divergence: Tensor, trained: Tensor | None, clip: float) -> Tensor:
        """Return the loss of the pairs, each multiplied by its token's `importance_ratio`.

        Args:
            divergence: (R,) with a graph.
            trained: (R,) the tokens' log-probabilities under the weights that train.
        """
        assert trained is not None
        ratio = importance_ratio(trained, self.sampled_logprob, clip)
        weight, most = (torch.as_tensor(x).to(ratio) for x in (self.supervision.weight, self.supervision.clip))
        return (weight * ratio * torch.minimum(divergence, most)).sum()


def assign(spans: Spans, objective: Objective, *, has_images: bool = True) -> list[Assignment]:
    """Assign the tokens of a rollout to teachers, one assignment for each term with a weight above 0 and tokens."""
    if spans.reason == "image_token":  # it would be given another image's features: nothing of it can be scored
        return []
    everything = torch.arange(spans.length)
    found: list[Assignment] = []
    if objective.method == "opsd":
        found.append(_assignment("reference", everything, FORWARD_KL, spans, objective))
    elif not spans.valid and objective.invalid_rollouts == "reference":
        kind = REVERSE_KL if objective.reference_kl == "reverse" else FORWARD_KL
        found.append(_assignment("reference", everything, kind, spans, objective))
    else:
        description, reasoning = torch.arange(*spans.description), _reasoning_tokens(spans, everything, objective)
        if has_images:
            found.append(_assignment("perception", description, FORWARD_KL, spans, objective))
        found.append(_assignment("reasoning", reasoning, FORWARD_KL, spans, objective))
    weights = dict(zip(TERMS, objective.lambdas, strict=True))
    return [a for a in found if len(a.tokens) and weights[a.term] > 0]


def teacher_prefill(term: Term, objective: Objective, prompts: Prompts) -> str | None:
    """Return the text that opens the assistant's turn of a term's teacher; None: its role's own prefill."""
    if term != "reasoning":
        return None
    return prompts.think_prefill if objective.reasoning_prefix == "think" else prompts.prefill


def _reasoning_tokens(spans: Spans, everything: Tensor, objective: Objective) -> Tensor:
    """Return the tokens that the reasoning teacher supervises.

    Those of reasoning and answer in a valid rollout; in an invalid one (an ablation) all after the description, or all
    after `<think>` if the teacher starts there.
    """
    if spans.valid:
        return torch.cat([torch.arange(*spans.reasoning), torch.arange(*spans.answer)])
    if objective.reasoning_prefix == "think":
        return everything[spans.think_start :] if spans.think_start is not None else everything[:0]
    return everything[spans.description[1] :]


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
    """Count the supervised tokens and rollouts of a micro-batch, by term."""
    tokens, supervised = torch.zeros(2, len(TERMS), dtype=torch.int64)
    for rollout in rollouts:
        for a in assign(rollout.spans, objective, has_images=bool(rollout.images)):
            tokens[TERMS.index(a.term)] += len(a.tokens)
            supervised[TERMS.index(a.term)] += 1
    return TermCounts(tokens, supervised)


def divisors(objective: Objective, step: TermCounts, micro_batch: TermCounts, micro_batches: int = 1) -> Tensor:
    """Return the divisor of each term's sum in one micro-batch, (3,) float64; infinite for a term without tokens.

    Args:
        step: counts of the whole optimizer step, over micro-batches and ranks.
        micro_batch: counts of this micro-batch, over ranks (normalize="active").
        micro_batches: how many of them the step has.
    """
    if objective.normalize == "tokens":
        count = step.tokens
    elif objective.normalize == "sequence":
        count = step.rollouts
    else:  # every supervised token of the micro-batch counts alike, and the step is the mean of its micro-batches
        count = torch.where(micro_batch.tokens > 0, micro_batch.tokens.sum(), 0) * micro_batches
    return torch.where(count > 0, count.double(), float("inf"))


def supervise(
    rollouts: Sequence[Rollout], objective: Objective, divisor: Tensor | None = None, scale: float = 1.0
) -> SupervisedBatch:
    """Lay a micro-batch out for scoring: its sequences, and the pairs of rows that meet in the divergence.

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
        found = assign(rollout.spans, objective, has_images=bool(rollout.images))
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
                    "sampled_logprob": (ids * torch.nan if rollout.logprobs is None else rollout.logprobs)[a.tokens],
                }
            )
            teacher_rows += R
        student_rows += len(scored)
    table = {name: torch.cat([c[name] for c in columns]) if columns else _EMPTY[name] for name in _EMPTY}
    supervision = Supervision(*(table[name] for name in ("student_row", "teacher_row", "kind", "weight", "clip")))
    return SupervisedBatch(
        rollouts=tuple(rollouts),
        student_sequences=student,
        teacher_sequences=teacher,
        supervision=supervision,
        counts=counts,
        **{name: table[name] for name in ("term", "segment", "owner", "token", "labels", "sampled_logprob")},
    )


def importance_ratio(trained: Tensor, sampled: Tensor, clip: float) -> Tensor:
    """Return min(p_now / p_then, clip) of each sampled token, 1 where its p_then is not known, detached.

    What a loss over old rollouts is multiplied by, token by token, so that tokens which the student would hardly write
    any more count little. It is the truncated ratio of the token alone; that of its whole prefix has no bound.

    Args:
        trained: (R,) log-probabilities of the tokens under the weights that train.
        sampled: (R,) those under the weights that sampled, NaN where not known.

    Raises:
        ValueError: none is known.
    """
    known = ~sampled.isnan()
    if len(sampled) and not known.any():
        raise ValueError("importance_clip needs an engine whose sample() gives log-probabilities, got none")
    sampled = torch.where(known, sampled, 0.0).to(trained.device)
    ratio = (trained.detach().float() - sampled).exp().clamp(max=clip)
    return torch.where(known.to(trained.device), ratio, 1.0)


_EMPTY = {
    name: torch.empty(0, dtype=dtype)
    for names, dtype in (
        (("student_row", "teacher_row", "owner", "token", "labels"), torch.int64),
        (("kind", "term", "segment"), torch.int8),
        (("weight", "clip", "sampled_logprob"), torch.float32),
    )
    for name in names
}


def _prompt(rollout: Rollout, role: Role) -> EncodedPrompt:
    if role not in rollout.prompts:
        raise ValueError(
            f"prompts of example {rollout.problem_id} must hold {role!r}, which it needs, got {sorted(rollout.prompts)}"
        )
    return rollout.prompts[role]
