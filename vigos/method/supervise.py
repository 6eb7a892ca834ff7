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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vigos.divergence.supervision import JSD, Supervision
from vigos.method.encode import EncodedPrompt, ScoredSequence
from vigos.method.objective import Objective
from vigos.method.prompts import Prompts
from vigos.method.spans import Spans
from vigos.method.teachers import SPANS, Teacher

Term = str  # the name of a teacher
TERMS: tuple[Term, ...] = ("perception", "reasoning", "reference")  # of the built-in ones
SEGMENTS = ("description", "reasoning", "answer", "other")  # what `SupervisedBatch.segment` numbers

NO_CLIP = float("inf")
CONTROL = "/control"  # after a teacher's name: its control


@dataclass(frozen=True)
class Rollout:
    """Hold one completion of an example's student prompt, parsed.

    Attributes:
        images: the example's images (PIL), for records; not read here.
        prompts: of the student and of the teachers that supervise it, by name; "NAME/control" is a teacher's control.
        views: what those saw that saw other images than these, by name; for records.
        completion_ids: (C,) int64 on the CPU, EOS included if there was one.
        reference: the text that privileged teachers read; None: the answer.
        correct: True if the boxed answer is the reference answer; None: not graded.
        logprobs: (C,) float32, nats: of the tokens under the weights that sampled them, at temperature 1; NaN where not
            known, None if none is.
        version: optimizer steps behind those weights; None: not known.
        texts: of the columns that teachers' templates name, by column.
    """

    problem_id: str
    problem: str
    answer: str
    images: tuple[Any, ...]
    prompts: Mapping[str, EncodedPrompt]
    completion_ids: Tensor
    spans: Spans
    reference: str | None = None
    correct: bool | None = None
    logprobs: Tensor | None = None
    version: int | None = None
    views: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


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
    """Count supervised tokens and the rollouts that hold them, by term in the order of the objective's."""

    tokens: Tensor  # (terms,) int64
    rollouts: Tensor  # (terms,) int64

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(self.tokens + other.tokens, self.rollouts + other.rollouts)


@dataclass(frozen=True)
class SupervisedBatch:
    """Hold a micro-batch ready to be scored: R pairs of hidden rows and where they come from.

    `student_row` and `teacher_row` of `supervision` count through the scored positions of `student_sequences` and
    `teacher_sequences` in order.

    Attributes:
        term, segment: int8 (R,), indices into `terms` and SEGMENTS.
        owner, token: int64 (R,), the rollout and the token of its completion.
        labels: int64 (R,), that token's id.
        sampled_logprob: float32 (R,), its log-probability when it was sampled; NaN where not known.
        counts: of this micro-batch.
        terms: names of the teachers.
        control_row: int64 (R,), the teacher row of each pair's control, its own where it has none; None without any.
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
    terms: tuple[str, ...] = TERMS
    control_row: Tensor | None = None

    @property
    def n_pairs(self) -> int:
        """Return R, the number of pairs."""
        return len(self.term)

    def part(self, terms: Collection[int]) -> tuple[Tensor, SupervisedBatch]:
        """Return the pairs of some teachers, (R',) int64, and the batch of these with their teachers' sequences alone.

        Student sequences and counts stay; rows of teachers and controls are counted anew.
        """
        names = {self.terms[t] for t in terms}
        mine = [s.owner[1].removesuffix(CONTROL) in names for s in self.teacher_sequences]
        lengths = torch.tensor([len(s.scored) for s in self.teacher_sequences], dtype=torch.int64)
        number = torch.tensor(mine, dtype=torch.int64).repeat_interleave(lengths).cumsum(0) - 1
        index = torch.isin(self.term, torch.tensor(sorted(terms), dtype=torch.int8)).nonzero().squeeze(1)

        def chosen(table: Any) -> dict[str, Any]:
            columns = {f.name: getattr(table, f.name) for f in fields(table)}
            kept = {name: x[index] for name, x in columns.items() if isinstance(x, Tensor)}
            return kept | {name: number[kept[name]] for name in ("teacher_row", "control_row") if name in kept}

        sequences = [s for s, stays in zip(self.teacher_sequences, mine, strict=True) if stays]
        supervision = replace(self.supervision, **chosen(self.supervision))
        return index, replace(self, teacher_sequences=sequences, supervision=supervision, **chosen(self))


def assign(spans: Spans, objective: Objective, *, has_images: bool = True) -> list[Assignment]:
    """Assign the tokens of a rollout to teachers, one assignment for each teacher with a weight above 0 and tokens."""
    if spans.reason == "image_token":  # it would be given another image's features: nothing of it can be scored
        return []
    found = []
    for teacher in objective.roster:
        if teacher.weight == 0 or teacher.rollouts not in ("all", "valid" if spans.valid else "invalid"):
            continue
        if teacher.reads in ("perception", "") and not has_images:
            continue  # there is nothing to be perceived
        tokens = _tokens(spans, teacher)
        if len(tokens):
            found.append(_assignment(teacher, tokens, spans, objective))
    return found


def teacher_prefill(term: Term, objective: Objective, prompts: Prompts) -> str:
    """Return the text that opens the assistant's turn of a term's teacher."""
    teacher = objective.teacher(term)
    if teacher.prefill is not None:
        return teacher.prefill
    return prompts.think_prefill if teacher.prefix == "think" else prompts.prefill


def _tokens(spans: Spans, teacher: Teacher) -> Tensor:
    """Return the tokens of a rollout that a teacher supervises.

    Of an invalid rollout, whose reasoning and answer have no ends, these are all after the description, or all after
    `<think>` if the teacher starts there.
    """
    everything, start = torch.arange(spans.length), 0
    if teacher.prefix == "think":
        start = spans.length if spans.think_start is None else spans.think_start
    if "all" in teacher.spans:
        return everything[start:]
    parts = [torch.arange(*getattr(spans, name)) for name in SPANS[:3] if name in teacher.spans]
    if not spans.valid and {"reasoning", "answer"} & set(teacher.spans):
        described = torch.arange(*spans.description) if "description" in teacher.spans else everything[:0]
        parts = [described, everything[max(start, spans.description[1]) if teacher.prefix == "student" else start :]]
    tokens = torch.cat(parts)
    return tokens[tokens >= start] if start else tokens


def _segments(tokens: Tensor, spans: Spans) -> Tensor:
    segment = torch.full(tokens.shape, SEGMENTS.index("other"), dtype=torch.int8)
    for i, (start, end) in enumerate((spans.description, spans.reasoning, spans.answer)):
        segment[(tokens >= start) & (tokens < end)] = i
    return segment


def _assignment(teacher: Teacher, tokens: Tensor, spans: Spans, objective: Objective) -> Assignment:
    clip = torch.full(tokens.shape, objective.token_clip if objective.clip_mode == "token" else NO_CLIP)
    if objective.clip_mode == "token" and objective.teachers is None:
        if teacher.name == "perception" and objective.description_end_clip is not None:
            clip[-1] = objective.description_end_clip
        if teacher.name == "reasoning" and objective.reasoning_start_clip is not None:
            clip[0] = objective.reasoning_start_clip
    if teacher.token_clip is not None:
        clip[:] = teacher.token_clip
    start = spans.think_start or 0 if teacher.prefix == "think" else 0
    return Assignment(teacher.name, tokens, _segments(tokens, spans), clip, teacher.kind, start)


def count_terms(rollouts: Sequence[Rollout], objective: Objective) -> TermCounts:
    """Count the supervised tokens and rollouts of a micro-batch, by term."""
    terms = objective.terms
    tokens, supervised = torch.zeros(2, len(terms), dtype=torch.int64)
    for rollout in rollouts:
        for a in assign(rollout.spans, objective, has_images=bool(rollout.images)):
            tokens[terms.index(a.term)] += len(a.tokens)
            supervised[terms.index(a.term)] += 1
    return TermCounts(tokens, supervised)


def divisors(objective: Objective, step: TermCounts, micro_batch: TermCounts, micro_batches: int = 1) -> Tensor:
    """Return the divisor of each term's sum in one micro-batch, (terms,) float64; infinite for a term without tokens.

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
        divisor: (terms,) from `divisors`; None: this micro-batch is the whole step.
        scale: factor of every weight, such as the number of ranks whose gradients will be averaged.
    """
    counts = count_terms(rollouts, objective)
    if divisor is None:
        divisor = divisors(objective, counts, counts)
    student: list[ScoredSequence] = []
    teacher: list[ScoredSequence] = []
    columns: list[dict[str, Tensor]] = []
    student_rows = teacher_rows = 0
    terms = objective.terms
    for i, rollout in enumerate(rollouts):
        found = assign(rollout.spans, objective, has_images=bool(rollout.images))
        if not found:
            continue
        ids = rollout.completion_ids
        scored = torch.unique(torch.cat([a.tokens for a in found]))  # sorted
        student.append(ScoredSequence(_prompt(rollout, "student"), ids[: scored[-1] + 1], scored, (i, "student")))
        for a in found:
            t = terms.index(a.term)
            taught = objective.roster[t]
            weight = objective.lambdas[t] * scale / float(divisor[t])
            if objective.normalize == "sequence":
                weight /= len(a.tokens)
            R = len(a.tokens)
            names = [a.term, a.term + CONTROL] if taught.has_control_rows else [a.term]
            teacher += [
                ScoredSequence(_prompt(rollout, name), ids[a.start : a.tokens[-1] + 1], a.tokens - a.start, (i, name))
                for name in names
            ]
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
                    "control_row": teacher_rows + torch.arange(R) + (R if taught.has_control_rows else 0),
                    "contrast": torch.full((R,), float(taught.contrast)),
                    "plausibility": torch.full((R,), float(taught.plausibility)),
                    "beta": torch.full((R,), taught.beta or objective.jsd_beta, dtype=torch.float64),
                }
            )
            teacher_rows += len(names) * R
        student_rows += len(scored)
    table = {name: torch.cat([c[name] for c in columns]) if columns else _EMPTY[name] for name in _EMPTY}
    targets = any(teacher.contrast > 0 or teacher.plausibility > 0 for teacher in objective.roster)
    supervision = Supervision(*(table[name] for name in ("student_row", "teacher_row", "kind", "weight", "clip")))
    if targets:
        supervision = replace(
            supervision, control_row=table["control_row"], contrast=table["contrast"],
            plausibility=table["plausibility"],
        )  # fmt: skip
    if any(teacher.beta is not None or teacher.kind > JSD for teacher in objective.roster):
        supervision = replace(supervision, beta=table["beta"])
    return SupervisedBatch(
        rollouts=tuple(rollouts),
        student_sequences=student,
        teacher_sequences=teacher,
        supervision=supervision,
        counts=counts,
        terms=terms,
        control_row=table["control_row"] if any(t.has_control_rows for t in objective.roster) else None,
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
        (("student_row", "teacher_row", "owner", "token", "labels", "control_row"), torch.int64),
        (("kind", "term", "segment"), torch.int8),
        (("weight", "clip", "contrast", "plausibility", "sampled_logprob"), torch.float32),
        (("beta",), torch.float64),
    )
    for name in names
}


def _prompt(rollout: Rollout, role: str) -> EncodedPrompt:
    if role not in rollout.prompts:
        raise ValueError(
            f"prompts of example {rollout.problem_id} must hold {role!r}, which it needs, got {sorted(rollout.prompts)}"
        )
    return rollout.prompts[role]
