"""Routing: which tokens meet which teacher, with which direction, clip and weight, and where their hidden rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL
from vigos.method.encode import EncodedPrompt
from vigos.method.objective import Objective
from vigos.method.spans import Spans
from vigos.method.supervise import (
    SEGMENTS,
    TERMS,
    Rollout,
    SupervisedBatch,
    TermCounts,
    assign,
    count_terms,
    divisors,
    supervise,
)

VALID = Spans(True, "", (0, 4), (6, 11), (13, 14), length=16, finished=True, think_start=6, answer_text="3")
RELEASED = Spans(True, "", (0, 4), (6, 15), (0, 0), length=16, finished=True, think_start=6, answer_text="3")
INVALID = Spans(False, "no_think_close", (0, 3), length=7, finished=False, think_start=5)
TAGLESS = Spans(False, "tagless", length=2, finished=True)
SWALLOWED = Spans(True, "", (0, 4), (6, 11), (0, 0), length=16, finished=True, think_start=6, answer_text="3")
STOLEN = Spans(False, "image_token", length=9)
ROLES = ("student", "perception", "reasoning", "reference")


def prompt(name: str) -> EncodedPrompt:
    """A prompt that says whose it is: its length."""
    return EncodedPrompt(torch.arange(5 + ROLES.index(name)), None, None)


def rollout(spans: Spans, number: int = 0, images: int = 1, extra: int = 0) -> Rollout:
    ids = 100 * (number + 1) + torch.arange(spans.length + extra)
    prompts: dict[Any, EncodedPrompt] = {role: prompt(role) for role in ROLES}
    return Rollout(f"row-{number}", "?", "3", (object(),) * images, prompts, ids, spans)


def table(batch: SupervisedBatch) -> list[tuple[Any, ...]]:
    """One tuple a supervised row: owner, term, segment, token, kind, clip and weight."""
    s = batch.supervision
    columns: list[list[Any]] = [
        batch.owner.tolist(),
        [TERMS[t] for t in batch.term.tolist()],
        [SEGMENTS[i] for i in batch.segment.tolist()],
        batch.token.tolist(),
        s.kind.tolist(),  # type: ignore[union-attr]
        [round(c, 6) for c in s.clip.tolist()],  # type: ignore[union-attr]
        [round(w, 6) for w in s.weight.tolist()],  # type: ignore[union-attr]
    ]
    return list(zip(*columns, strict=True))


def check_rows(batch: SupervisedBatch) -> None:
    """Every supervised row points at hidden rows of its own rollout that predict its own token, on both sides."""

    def places(sequences: list[Any]) -> list[tuple[Any, int, int]]:
        return [
            (s.owner, int(s.completion_ids[i]), len(s.prompt.ids) + int(i) - 1)
            for s in sequences
            for i in s.scored.tolist()
        ]

    student, teacher = places(batch.student_sequences), places(batch.teacher_sequences)
    supervision = batch.supervision
    for r in range(batch.n_pairs):
        owner, term, label = int(batch.owner[r]), TERMS[int(batch.term[r])], int(batch.labels[r])
        s, t = student[int(supervision.student_row[r])], teacher[int(supervision.teacher_row[r])]
        assert s[:2] == ((owner, "student"), label)
        assert t[:2] == ((owner, term), label)
        assert label == int(batch.rollouts[owner].completion_ids[batch.token[r]])
    for sequences in (batch.student_sequences, batch.teacher_sequences):
        for sequence in sequences:
            assert int(sequence.scored[-1]) == len(sequence.completion_ids) - 1, (
                "nothing is fed past the last scored token"
            )
    assert sorted(supervision.teacher_row.tolist()) == list(range(len(teacher)))
    assert set(supervision.student_row.tolist()) == set(range(len(student)))


def test_valid_rollout() -> None:
    batch = supervise([rollout(VALID)], Objective())
    clip, inverse = 0.05, {"perception": 1 / 4, "reasoning": 1 / 6}
    expected = [
        (0, "perception", "description", i, FORWARD_KL, clip, round(inverse["perception"], 6)) for i in range(4)
    ]
    for segment, tokens in (("reasoning", range(6, 11)), ("answer", range(13, 14))):
        expected += [(0, "reasoning", segment, i, FORWARD_KL, clip, round(inverse["reasoning"], 6)) for i in tokens]
    assert table(batch) == expected
    check_rows(batch)
    assert batch.counts.tokens.tolist() == [4, 6, 0]
    assert batch.counts.rollouts.tolist() == [1, 1, 0]
    perception, reasoning = batch.teacher_sequences
    assert perception.prompt is batch.rollouts[0].prompts["perception"]
    assert len(perception.completion_ids) == 4, "the perception teacher reads no further than the description"
    assert reasoning.scored.tolist() == [6, 7, 8, 9, 10, 13]
    assert len(reasoning.completion_ids) == 14, "the reasoning teacher reads the student's description before it"


def test_invalid_rollout_meets_the_reference_teacher_alone() -> None:
    batch = supervise([rollout(INVALID, extra=3)], Objective())
    segments = ["description"] * 3 + ["other"] * 4
    assert table(batch) == [(0, "reference", s, i, REVERSE_KL, 0.05, round(2 / 7, 6)) for i, s in enumerate(segments)]
    check_rows(batch)
    finished = supervise([rollout(TAGLESS)], Objective())
    assert finished.token.tolist() == [0, 1], "EOS is supervised"


def test_released_prefix_starts_after_the_tag() -> None:
    batch = supervise([rollout(RELEASED)], Objective.preset("released"))
    check_rows(batch)
    _, reasoning = batch.teacher_sequences
    assert reasoning.scored.tolist() == list(range(9))
    assert reasoning.completion_ids.tolist() == [100 + i for i in range(6, 15)]
    assert batch.token[batch.term == 1].tolist() == list(range(6, 15))


def test_boundary_clips() -> None:
    args = Objective(token_clip=0.25, description_end_clip=0.5, reasoning_start_clip=0.125)
    clip = supervise([rollout(VALID), rollout(INVALID, 1)], args).supervision.clip
    assert clip.tolist() == [0.25] * 3 + [0.5, 0.125] + [0.25] * 5 + [0.25] * 7  # type: ignore[union-attr]
    for mode in ("entry", "none"):
        clip = supervise([rollout(VALID)], Objective(clip_mode=mode, description_end_clip=0.5)).supervision.clip
        assert torch.isinf(clip).all(), f"clip_mode={mode} clips no tokens"  # type: ignore[arg-type]


def test_opsd_supervises_every_token_of_every_rollout() -> None:
    batch = supervise([rollout(VALID), rollout(TAGLESS, 1)], Objective(method="opsd"))
    check_rows(batch)
    assert batch.token.tolist() == [*range(16), 0, 1]
    assert {t for _, t, *_ in table(batch)} == {"reference"}
    assert set(batch.supervision.kind.tolist()) == {FORWARD_KL}  # type: ignore[union-attr]
    assert batch.supervision.weight.tolist() == pytest.approx([1 / 18] * 18)  # type: ignore[union-attr]
    assert [SEGMENTS[s] for s in batch.segment.tolist()][:16] == (
        ["description"] * 4 + ["other"] * 2 + ["reasoning"] * 5 + ["other"] * 2 + ["answer"] + ["other"] * 2
    )


def test_weight_zero_leaves_a_term_out() -> None:
    batch = supervise([rollout(VALID), rollout(TAGLESS, 1)], Objective(lambda_perception=0.0, lambda_reference=0.0))
    assert {t for _, t, *_ in table(batch)} == {"reasoning"}
    assert [s.owner for s in batch.student_sequences] == [(0, "student")], "an unsupervised rollout is not run at all"
    check_rows(batch)


def test_invalid_rollouts_by_the_others() -> None:
    args = Objective(invalid_rollouts="others")
    batch = supervise([rollout(INVALID), rollout(TAGLESS, 1)], args)
    assert [(o, t, i) for o, t, _, i, *_ in table(batch)] == [
        *((0, "perception", i) for i in range(3)),
        *((0, "reasoning", i) for i in range(3, 7)),
        *((1, "reasoning", i) for i in range(2)),
    ]
    check_rows(batch)
    think = Objective(invalid_rollouts="others", reasoning_prefix="think")
    batch = supervise([rollout(INVALID), rollout(TAGLESS, 1)], think)
    assert [(o, t, i) for o, t, _, i, *_ in table(batch)] == [
        *((0, "perception", i) for i in range(3)),
        *((0, "reasoning", i) for i in range(5, 7)),
    ]
    check_rows(batch)


def test_jsd_replaces_every_direction() -> None:
    batch = supervise([rollout(VALID), rollout(TAGLESS, 1)], Objective(divergence="jsd"))
    assert set(batch.supervision.kind.tolist()) == {JSD}  # type: ignore[union-attr]


def test_answer_swallowed_by_its_box() -> None:
    batch = supervise([rollout(SWALLOWED)], Objective())
    assert batch.counts.tokens.tolist() == [4, 5, 0]
    check_rows(batch)


def test_without_images_nothing_is_perceived() -> None:
    batch = supervise([rollout(VALID, images=0)], Objective())
    assert {t for _, t, *_ in table(batch)} == {"reasoning"}
    assert assign(VALID, Objective(), has_images=False)[0].term == "reasoning"


def test_image_token_in_a_rollout_leaves_it_out() -> None:
    batch = supervise([rollout(STOLEN), rollout(TAGLESS, 1)], Objective())
    assert set(batch.owner.tolist()) == {1}
    check_rows(batch)


def test_nothing_to_supervise() -> None:
    for rollouts in ([], [rollout(STOLEN)]):
        batch = supervise(rollouts, Objective())
        assert batch.n_pairs == 0
        assert batch.student_sequences == batch.teacher_sequences == []
        assert batch.counts.tokens.tolist() == [0, 0, 0]
        fields = (batch.supervision.student_row, batch.supervision.kind, batch.supervision.weight, batch.labels)
        assert [f.dtype for f in fields] == [torch.int64, torch.int8, torch.float32, torch.int64]  # type: ignore[union-attr]


def test_missing_prompt_names_row_and_role() -> None:
    one = rollout(VALID, 3)
    del one.prompts["perception"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"prompts of example row-3 must hold 'perception'"):
        supervise([one], Objective())


# --- Normalisation ---------------------------------------------------------------------------------------------------


def weighted(groups: list[list[Rollout]], args: Any, value: Any) -> dict[str, float]:
    """The step's term losses if token t of rollout o has divergence value(o, t), summed over its micro-batches."""
    counts = [count_terms(g, args) for g in groups]
    step = sum(counts[1:], counts[0])
    total = dict.fromkeys(TERMS, 0.0)
    for group, count in zip(groups, counts, strict=True):
        batch = supervise(group, args, divisors(args, step, count, len(groups)))
        for r, (owner, term, _, token, *_) in enumerate(table(batch)):
            weight = float(batch.supervision.weight[r])  # type: ignore[index]
            total[term] += weight * value(group[owner].problem_id, token)
    return total


def value(row: str, token: int) -> float:
    return 1.0 + 0.1 * token + int(row.removeprefix("row-"))


@pytest.mark.parametrize("normalize", ["tokens", "sequence"])
def test_cutting_a_step_into_micro_batches_changes_nothing(normalize: str) -> None:
    args = Objective(normalize=normalize)
    rollouts = [rollout(s, i) for i, s in enumerate((VALID, INVALID, SWALLOWED, TAGLESS, VALID, STOLEN))]
    whole = weighted([rollouts], args, value)
    for cuts in ([1, 2, 3], [3, 3], [5, 1], [1] * 6):
        groups, at = [], 0
        for n in cuts:
            groups.append(rollouts[at : at + n])
            at += n
        assert weighted(groups, args, value) == pytest.approx(whole, rel=1e-6)


def test_tokens_and_sequence_means() -> None:
    rollouts = [rollout(VALID, 0), rollout(SWALLOWED, 1), rollout(INVALID, 2), rollout(TAGLESS, 3)]
    description = [[value(f"row-{r}", t) for t in range(4)] for r in (0, 1)]
    reference = [[value(f"row-{r}", t) for t in range(n)] for r, n in ((2, 7), (3, 2))]
    got = weighted([rollouts], Objective(normalize="tokens"), value)
    assert got["perception"] == pytest.approx(sum(map(sum, description)) / 8, rel=1e-6)
    assert got["reference"] == pytest.approx(2 * sum(map(sum, reference)) / 9, rel=1e-6)
    got = weighted([rollouts], Objective(normalize="sequence"), value)
    assert got["perception"] == pytest.approx(sum(sum(d) / len(d) for d in description) / 2, rel=1e-6)
    assert got["reference"] == pytest.approx(2 * sum(sum(d) / len(d) for d in reference) / 2, rel=1e-6)


def test_active_is_a_mean_over_each_micro_batch() -> None:
    args = Objective(normalize="active")
    groups = [[rollout(VALID, 0), rollout(TAGLESS, 1)], [rollout(INVALID, 2)]]
    got = weighted(groups, args, value)
    first = 4 + 6 + 2  # supervised tokens of the first micro-batch, over all terms
    assert got["perception"] == pytest.approx(sum(value("row-0", t) for t in range(4)) / first / 2, rel=1e-6)
    tagless, invalid = (sum(value(r, t) for t in range(n)) for r, n in (("row-1", 2), ("row-2", 7)))
    assert got["reference"] == pytest.approx(2 * (tagless / first + invalid / 7) / 2, rel=1e-6)


def test_ranks_scale_weights() -> None:
    one = supervise([rollout(VALID)], Objective()).supervision.weight
    four = supervise([rollout(VALID)], Objective(), scale=4.0).supervision.weight
    assert isinstance(one, Tensor)
    assert torch.equal(four, 4 * one)  # type: ignore[arg-type]


def test_counts_add_up() -> None:
    args = Objective()
    a, b = [rollout(VALID), rollout(STOLEN, 1)], [rollout(TAGLESS, 2), rollout(SWALLOWED, 3)]
    total = count_terms(a, args) + count_terms(b, args)
    assert total.tokens.tolist() == count_terms(a + b, args).tokens.tolist() == [8, 11, 2]
    assert total.rollouts.tolist() == [2, 2, 1]
    assert isinstance(total, TermCounts)
