"""PALR: how much of the supervision is bought by the privileged answer rather than by the image.

A rollout is held fixed. For each supervised token y, with p the student and q the teacher that supervises it:

    s    = |log q(y) - log p(y)|                                        how far the teacher moves the student
    c_A  = [log q(y) - log mean_k q(y | wrong answer k)]+               what knowing the answer buys
    c_I  = [log q(y) - log q(y | image of another example)]+           what seeing the image buys
    PALR = sum s c_A / sum s (c_A + c_I)

c_A is exactly 0 for a teacher that reads no answer. Only the log-probability of the token that was written is needed,
so the fused engines do the work and no logits are held: of one rollout's S supervised tokens (K + 3) S rows of hidden
states exist, D wide. The swapped contexts are branches of the prefix tree: wrong answers share the image's forward.

Source: arXiv 2606.19120. There, 3B: reasoning tokens 17.3 % under plain OPSD and 6.3 % under ViGOS, all tokens 5.6 %
and 3.1 %. How many wrong answers and which other image it took is a choice of ours: compare figures of one program.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vigos.divergence.api import linear_divergence
from vigos.divergence.head import Head
from vigos.divergence.supervision import Supervision
from vigos.method.encode import EncodedPrompt, ScoredSequence, encode_prompt
from vigos.method.supervise import (
    SEGMENTS,
    TERMS,
    Rollout,
    SupervisedBatch,
    assign,
    supervise,
    teacher_prefill,
)  # fmt: skip
from vigos.method.teachers import Teacher
from vigos.models.parts import lm_head
from vigos.models.sharding import gathered_head, reshard
from vigos.scoring.teacher import teacher_mode
from vigos.train.other_models import OtherModels

if TYPE_CHECKING:
    from vigos.method.objective import Objective
    from vigos.method.prompts import Prompts
    from vigos.scoring.teacher import TeacherScorer
    from vigos.train.config import ViGOSConfig
    from vigos.train.teacher_weights import TeacherWeights

# --- What was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PALR:
    """Hold the log-probabilities of the supervised tokens of some rollouts, on the CPU.

    Attributes:
        student, teacher: (R,) float64, nats: log p(y), log q(y).
        wrong: (R,) log of the teacher's mean probability under the wrong answers; `teacher` itself where it reads none.
        other_image: (R,) log q(y) with another example's image.
        term, segment: (R,) int8, indices into `terms` and `supervise.SEGMENTS`.
        owner, token: (R,) int64, the rollout (by its place in `measure_palr`'s argument) and the completion's token.
        rollouts: how many were measured.
        terms: names of the teachers.
        left_out: how many were not, by reason: "no_image", "no_other_image", "no_wrong_answer", "unsupervised".
    """

    student: Tensor
    teacher: Tensor
    wrong: Tensor
    other_image: Tensor
    term: Tensor
    segment: Tensor
    owner: Tensor
    token: Tensor
    rollouts: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    terms: tuple[str, ...] = TERMS

    @classmethod
    def joined(cls, parts: Sequence[PALR]) -> PALR:
        """Join several measurements into one; `owner` counts on from part to part."""
        columns = ("student", "teacher", "wrong", "other_image", "term", "segment", "token")
        sizes = [p.rollouts + sum(p.left_out.values()) for p in parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        left_out = sum((Counter(p.left_out) for p in parts), Counter[str]())
        return cls(
            **{name: torch.cat([getattr(p, name) for p in parts]) for name in columns},
            owner=torch.cat([p.owner + start for p, start in zip(parts, starts, strict=True)]),
            rollouts=sum(p.rollouts for p in parts),
            left_out=dict(left_out),
            terms=parts[0].terms,
        )

    @property
    def by_answer(self) -> Tensor:
        """(R,) s c_A."""
        return (self.teacher - self.student).abs() * (self.teacher - self.wrong).clamp_min(0.0)

    @property
    def by_image(self) -> Tensor:
        """(R,) s c_I."""
        return (self.teacher - self.student).abs() * (self.teacher - self.other_image).clamp_min(0.0)

    def ratio(self, rows: Tensor | None = None) -> float:
        """Return PALR over the rows of a mask (R,); NaN where neither answer nor image buys anything."""
        answer, image = self.by_answer, self.by_image
        if rows is not None:
            answer, image = answer[rows], image[rows]
        total = float((answer + image).sum())
        return float(answer.sum()) / total if total > 0 else math.nan

    def groups(self) -> dict[str, Tensor]:
        """Return masks (R,): "all", each segment, and each teacher as "teacher/<term>", as far as they have tokens."""
        masks = {"all": torch.ones(len(self.term), dtype=torch.bool)}
        masks |= {name: self.segment == i for i, name in enumerate(SEGMENTS)}
        masks |= {f"teacher/{name}": self.term == i for i, name in enumerate(self.terms)}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def sums(self) -> dict[str, tuple[float, float]]:
        """Return for each group the sums of s c_A and of s c_I, which add up over ranks and steps."""
        answer, image = self.by_answer, self.by_image
        return {name: (float(answer[mask].sum()), float(image[mask].sum())) for name, mask in self.groups().items()}

    def summary(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return for each group PALR (None: nothing is bought), a 95 % bootstrap interval over rollouts, and tokens."""
        found: dict[str, Any] = {"rollouts": self.rollouts, "left_out": dict(self.left_out), "groups": {}}
        places = {owner: i for i, owner in enumerate(sorted(set(self.owner.tolist())))}
        owner = torch.tensor([places[o] for o in self.owner.tolist()], dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(max(len(places), 1), (resamples, len(places)), generator=generator)
        for name, mask in self.groups().items():
            # (2, rollouts): sums of s c_A and of s c_I
            sums = torch.stack(
                [
                    torch.zeros(len(places), dtype=torch.float64).index_add_(0, owner[mask], column[mask])
                    for column in (self.by_answer, self.by_image)
                ]
            )
            answer, image = sums[:, drawn].sum(-1)  # (resamples,) each
            known = answer + image > 0
            ratios = answer[known] / (answer + image)[known]
            ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
            interval = ratios.quantile(ends).tolist() if len(ratios) else [0.0, 1.0]
            ratio = self.ratio(mask)
            found["groups"][name] = {
                "palr": None if math.isnan(ratio) else ratio, "palr_interval": interval, "tokens": int(mask.sum()),
                "by_answer": float(self.by_answer[mask].sum()), "by_image": float(self.by_image[mask].sum()),
            }  # fmt: skip
        return found


def mixture_logprob(logprobs: Tensor, counts: Tensor) -> Tensor:
    """Log of the mean probability (R,) over the first `counts` (R,) of each row of log-probabilities (R, K)."""
    absent = torch.arange(logprobs.shape[1]) >= counts[:, None]
    return logprobs.masked_fill(absent, -math.inf).logsumexp(-1) - counts.log()


# --- What is swapped in -----------------------------------------------------------------------------------------------


def draw_wrong_answers(answers: Sequence[str], k: int, *, seed: int = 0) -> list[list[str]]:
    """Draw up to `k` different answers of other examples for each example, none of which grades as right.

    Answers of the same kind (a number, one letter, words) come first: a colour in place of a number is no rival.
    """
    from vigos.eval.grading import grade

    if k < 1:
        raise ValueError(f"k must be at least 1 wrong answer, got {k}")
    kinds = [_kind(a) for a in answers]
    distinct = {_same(a): (a, kind) for a, kind in zip(answers, kinds, strict=True)}
    found = []
    for i, (answer, kind) in enumerate(zip(answers, kinds, strict=True)):
        others = sorted((a, other_kind == kind) for key, (a, other_kind) in distinct.items() if key != _same(answer))
        rng = random.Random(f"{seed}/{i}/{answer}")
        rng.shuffle(others)
        others.sort(key=lambda other: not other[1])
        wrong = (a for a, _ in others if not (grade(a, answer) or grade(answer, a)))
        found.append(list(islice(wrong, k)))
    return found


def _same(answer: str) -> str:
    """Return a key that is equal for answers that mean the same at a glance."""
    text = " ".join(answer.split()).casefold()
    try:
        return repr(float(text))
    except ValueError:
        return text


def _kind(answer: str) -> str:
    text = answer.strip()
    try:
        float(text)
    except ValueError:
        return "letter" if len(text) == 1 and text.isalpha() else "words"
    return "number"


def draw_other_images(
    rollouts: Sequence[Rollout], *, seed: int = 0, views: Sequence[Collection[str]] | None = None
) -> list[int | None]:
    """Choose for each rollout another one with as many images and other pixels; None where there is none.

    Args:
        views: for each rollout the teachers whose views of the other one's images have to be known.
    """
    keys = [_pixels(r) for r in rollouts]
    found: list[int | None] = []
    for i, rollout in enumerate(rollouts):
        fits = [
            j
            for j, other in enumerate(rollouts)
            if keys[j] not in (None, keys[i])
            and len(other.images) == len(rollout.images)
            and (views is None or set(views[i]) <= other.views.keys())
        ]
        found.append(random.Random(f"{seed}/{i}").choice(fits) if fits else None)
    return found


def _pixels(rollout: Rollout) -> object:
    """Return what is equal for equal images of the example; None without any."""
    if "student" in rollout.views:  # its prompt shows others
        return tuple((image.size, image.tobytes()) for image in rollout.images) or None
    images = rollout.prompts["student"].images
    return images.key if images else None


# --- Measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_palr(
    rollouts: Sequence[Rollout],
    config: ViGOSConfig,
    *,
    student: nn.Module,
    scorer: TeacherScorer,
    processor: Any,
    prompts: Prompts,
    teacher: TeacherWeights | None = None,
    wrong_answers: int = 4,
    wrong: Sequence[Sequence[str]] | None = None,
    dummy: ScoredSequence | None = None,
    seed: int = 0,
    other_models: OtherModels | None = None,
) -> PALR:
    """Score rollouts with their teachers, with wrong answers in the privileged prompts, and with other images.

    The forwards are those of training, in evaluation mode: supervised as `config` says. With a wrapped model every rank
    has to call this together.

    Args:
        rollouts: with the prompts of the student and of the teachers that supervise them, as the trainer makes them.
            Wrong answers and other images are taken from each other, so give it several examples at once.
        scorer: the teacher; its model may be the student, whose adapter is switched off.
        teacher: whose weights teach where they are not the scorer's own (moving average, full fine-tuning).
        wrong_answers: K, at most, for each rollout.
        wrong: the wrong answers of each rollout; None draws them from the other rollouts' answers.
        dummy: as in `hidden_states`, for ranks without a rollout that can be measured.
        other_models: those that teach beside the scorer's.

    A teacher with a view is shown that view of the other image, and its template keeps the example's own columns.
    """
    if wrong is not None and len(wrong) != len(rollouts):
        raise ValueError(f"wrong must hold the wrong answers of {len(rollouts)} rollouts, got {len(wrong)}")
    drawn = draw_wrong_answers([_reference(r) for r in rollouts], wrong_answers, seed=seed) if wrong is None else wrong
    objective = config.objective.without_controls()
    seen = [
        {a.term for a in assign(r.spans, objective, has_images=bool(r.images)) if objective.teacher(a.term).view}
        for r in rollouts
    ]
    donors = draw_other_images(rollouts, seed=seed, views=seen)
    usable, left_out = _usable(rollouts, drawn, donors)
    batch = supervise([rollouts[i] for i in usable], objective)
    left_out["unsupervised"] = len(usable) - len(set(batch.owner.tolist()))
    others = other_models or OtherModels(objective.roster)
    swaps_of = [(drawn[i], donors[i]) for i in usable]
    swapped = _swapped(batch, swaps_of, rollouts, objective, others, processor, prompts)
    student_rows, teacher_rows, found = _logprobs(batch, swapped, student, scorer, teacher, config, dummy, others)

    R, K = batch.n_pairs, max((len(s.wrong) for s in swapped), default=0)
    other_image, wrong_rows = torch.zeros(R, dtype=torch.float64), torch.zeros(R, K, dtype=torch.float64)
    counts = torch.zeros(R, dtype=torch.float64)
    row = 0
    for columns in found:  # (1 + wrong, S) of each teacher sequence
        K_own, S = columns.shape[0] - 1, columns.shape[1]
        other_image[row : row + S] = columns[0]
        wrong_rows[row : row + S, :K_own] = columns[1:].T
        counts[row : row + S] = K_own
        row += S
    mixture = mixture_logprob(wrong_rows, counts) if K else teacher_rows
    return PALR(
        student=student_rows,
        teacher=teacher_rows,
        wrong=torch.where(counts > 0, mixture, teacher_rows),
        other_image=other_image,
        term=batch.term,
        terms=batch.terms,
        segment=batch.segment,
        owner=torch.tensor(usable, dtype=torch.int64)[batch.owner],
        token=batch.token,
        rollouts=len(set(batch.owner.tolist())),
        left_out={reason: n for reason, n in sorted(left_out.items()) if n},
    )


@dataclass(frozen=True)
class _Swapped:
    """Hold one teacher sequence in its other contexts."""

    other_image: ScoredSequence
    wrong: list[ScoredSequence]


def _reference(rollout: Rollout) -> str:
    return rollout.answer if rollout.reference is None else rollout.reference


def _usable(
    rollouts: Sequence[Rollout], wrong: Sequence[Sequence[str]], donors: Sequence[int | None]
) -> tuple[list[int], Counter[str]]:
    """Return the rollouts that can be swapped both ways, and how many cannot, by reason."""
    usable, left_out = [], Counter[str]()
    for i, rollout in enumerate(rollouts):
        if not rollout.images:
            left_out["no_image"] += 1
        elif donors[i] is None:
            left_out["no_other_image"] += 1
        elif not wrong[i]:
            left_out["no_wrong_answer"] += 1
        else:
            usable.append(i)
    return usable, left_out


def _swapped(
    batch: SupervisedBatch, swaps: Sequence[tuple[Sequence[str], int | None]], rollouts: Sequence[Rollout],
    objective: Objective, others: OtherModels, processor: Any, prompts: Prompts,
) -> list[_Swapped]:  # fmt: skip
    """Return the other contexts of every teacher sequence of `batch`."""
    known: dict[tuple[Any, ...], EncodedPrompt] = {}  # the rollouts of an example share them
    found = []
    for base in batch.teacher_sequences:
        i, term = base.owner
        teacher = objective.teacher(term)
        rollout, (answers, donor) = batch.rollouts[i], swaps[i]
        assert donor is not None
        prefill = teacher_prefill(term, objective, prompts)

        def encode(
            answer: str, source: Rollout, teacher: Teacher = teacher, rollout: Rollout = rollout, prefill: str = prefill
        ) -> EncodedPrompt:
            name, model = teacher.name, others.model_of(teacher)
            shown = source.views[name] if teacher.view else source.images
            plain = teacher.view is None and model is None and "student" not in source.views
            key = (name, id(rollout.prompts), answer, id(source.prompts))
            if key not in known:
                known[key] = encode_prompt(
                    model.processor if model else processor, prompts, teacher.reads, rollout.problem, answer, shown,
                    prefill, source.prompts["student"] if plain else source.prompts.get(name), rollout.texts,
                )  # fmt: skip
            return known[key]

        found.append(
            _Swapped(
                replace(base, prompt=encode(_reference(rollout), rollouts[donor])),
                [replace(base, prompt=encode(a, rollout)) for a in answers] if teacher.privileged else [],
            )
        )
    return found


def _logprobs(
    batch: SupervisedBatch, swapped: Sequence[_Swapped], student: nn.Module, scorer: TeacherScorer,
    teacher: TeacherWeights | None, config: ViGOSConfig, dummy: ScoredSequence | None, others: OtherModels,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return log p (R,), log q (R,), and for each teacher sequence those of its swapped contexts, (1 + wrong, S).

    All are float64 on the CPU.
    """
    parts = others.parts(batch)
    members = [
        [i for i, s in enumerate(batch.teacher_sequences) if others.model_of(_teacher(s, config)) is part.model]
        for part in parts
    ]
    hidden = []
    for part, mine in zip(parts, members, strict=True):
        extra = [sequence for i in mine for sequence in (swapped[i].other_image, *swapped[i].wrong)]
        step = replace(part.batch, teacher_sequences=[*part.batch.teacher_sequences, *extra])
        if part.model is not None:
            hidden.append(part.model.score(step, scorer.token_budget))
            continue
        with teacher.weights() if teacher else nullcontext():
            hidden.append(scorer.score(step, dummy=dummy)[0])  # (R + swapped, D)
    with teacher_mode(student, adapter="on"):
        student_hidden = scorer.score_student(
            student, batch.student_sequences, scoring=config.student_scoring, dummy=dummy
        )
    settings = {"temperature": config.divergence_temperature, "impl": config.impl}
    shared = lm_head(student) is lm_head(scorer.model)
    columns = torch.zeros(2, batch.n_pairs, dtype=torch.float64)
    found: dict[int, Tensor] = {}
    with gathered_head(student) as head, gathered_head(scorer.model) as teacher_head:
        if teacher and shared:  # a head that trains keeps a copy
            teacher_head = teacher.head(teacher_head)
        for part, mine, rows in zip(parts, members, hidden, strict=True):
            with part.model.heads(head) if part.model else nullcontext((head, teacher_head)) as sides:
                states = (student_hidden.to(sides[0].weight.dtype), rows.to(sides[1].weight.dtype))
                *of_pairs, of_swaps = _of_labels(part.batch, [swapped[i] for i in mine], *states, sides, settings)
            columns[:, part.places] = torch.stack(of_pairs)
            sizes = [(1 + len(swapped[i].wrong), len(batch.teacher_sequences[i].scored)) for i in mine]
            split = of_swaps.split([k * n for k, n in sizes])
            found |= {i: x.view(size) for i, x, size in zip(mine, split, sizes, strict=True)}
    reshard(student)
    return columns[0], columns[1], [found[i] for i in range(len(swapped))]


def _teacher(sequence: ScoredSequence, config: ViGOSConfig) -> Teacher:
    return config.objective.teacher(sequence.owner[1])


def _of_labels(
    batch: SupervisedBatch, swapped: Sequence[_Swapped], student_hidden: Tensor, hidden: Tensor,
    heads: tuple[Head, Head], settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return log p (R,), log q (R,) and those of the swapped sequences, end to end, from hidden states and heads."""
    R = batch.n_pairs
    if R == 0:
        return (torch.zeros(0, dtype=torch.float64),) * 3
    head, teacher_head = heads
    rules = Supervision(batch.supervision.student_row, batch.supervision.teacher_row)  # type: ignore[arg-type]
    out = linear_divergence(
        student_hidden, head, hidden[:R], teacher_head, supervision=rules, labels=batch.labels, **settings
    )
    lengths = [len(base.scored) for base in batch.teacher_sequences]
    first, second = _pairs(lengths, [1 + len(swaps.wrong) for swaps in swapped])
    labels = torch.cat([s.completion_ids[s.scored] for swaps in swapped for s in (swaps.other_image, *swaps.wrong)])
    rest = linear_divergence(
        hidden[R:], teacher_head, hidden[R:], supervision=Supervision(first, second), labels=labels[first], **settings
    )
    swapped_logprob = torch.empty(len(labels), dtype=torch.float64)
    swapped_logprob[first], swapped_logprob[second] = _cpu(rest.student_logprob), _cpu(rest.teacher_logprob)
    return _cpu(out.student_logprob), _cpu(out.teacher_logprob), swapped_logprob


def _pairs(lengths: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pair rows that share a label: a pair gives one label's log-probability under two hidden states.

    Args:
        lengths, counts: of each teacher sequence, its scored tokens and its swapped contexts, which stand end to end.
    """
    first, second, offset = [], [], 0
    for length, count in zip(lengths, counts, strict=True):
        rows = offset + torch.arange(count * length).view(count, length)
        first.append(rows[::2].flatten())
        second.append(rows[[min(i + 1, count - 1) for i in range(0, count, 2)]].flatten())
        offset += count * length
    return torch.cat(first), torch.cat(second)


def _cpu(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.detach().double().cpu()
