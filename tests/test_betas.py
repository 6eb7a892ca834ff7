"""Skew KL against its definition, a beta a pair against a call for each, and teachers with either in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.divergence_cases import case
from helpers.training import CUT_OFF, VALID_A, chat, completion_ids, config, full_log_probs, move, rows, tiny_student
from helpers.training import trainer as trainer_of

import vigos
from vigos import reference
from vigos.divergence.betas import by_beta
from vigos.method.teachers import Teacher

SKEWED = ("skew_forward", "skew_reverse")
DISTANCES = torch.tensor([1e-3, 1e-2, 0.3, 4.0, 15.0])[:, None]  # of the teacher, a row each


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(len(DISTANCES), 24, generator=g)
    return student, student + DISTANCES * torch.randn(len(DISTANCES), 24, generator=g)


@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("beta", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("kind", SKEWED)
def test_skew_kl_is_its_definition(kind: str, beta: float, entry_clip: float | None) -> None:
    """Rows and gradients of float32 logits to 2e-5 of autograd on the definition in float64, near teachers included."""
    student, teacher = logits()
    p, leaf = teacher.double().softmax(-1), student.double().requires_grad_()
    q = leaf.softmax(-1)
    m = (1 - beta) * q + beta * p
    weighting = p if kind == "skew_forward" else q
    terms = weighting * (weighting.clamp_min(1e-300).log() - m.clamp_min(1e-300).log())
    exact = (terms if entry_clip is None else terms.clamp(max=entry_clip)).sum(-1)
    exact.sum().backward()
    ours = student.clone().requires_grad_()
    pairs = vigos.Supervision.aligned(len(student), kind=kind)
    out = vigos.logits_divergence(ours, teacher, supervision=pairs, beta=beta, entry_clip=entry_clip)
    out.divergence.sum().backward()
    for x, y in ((out.divergence.detach()[:, None], exact.detach()[:, None]), (ours.grad, leaf.grad)):
        if entry_clip is None:
            assert ((x.double() - y).norm(dim=-1) / y.norm(dim=-1)).max() < 2e-5
        else:  # terms of both signs cancel, as they do in the textbook's form
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)
    forward = torch.full((len(student),), pairs.kind == "skew_forward")
    kinds = torch.where(forward, vigos.SKEW_FORWARD, vigos.SKEW_REVERSE)
    stated = reference.divergence(student.double(), teacher.double(), kinds, beta, entry_clip)
    torch.testing.assert_close(stated, exact.detach(), rtol=1e-9, atol=1e-12)


def test_an_impossible_token() -> None:
    """A teacher that excludes a token the student allows: both are finite, with the definition's value and gradient."""
    student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]])
    for kind in SKEWED:
        pairs = vigos.Supervision.aligned(1, kind=kind)
        out = vigos.logits_divergence(student, teacher, supervision=pairs, beta=0.25)
        (ours,) = torch.autograd.grad(out.loss, student)
        leaf = student.detach().double().requires_grad_()
        q, p = leaf.softmax(-1), teacher.double().softmax(-1)
        m = 0.75 * q + 0.25 * p
        exact = (p[:, :2] * (p[:, :2] / m[:, :2]).log()).sum() if kind == "skew_forward" else (q * (q / m).log()).sum()
        (wanted,) = torch.autograd.grad(exact, leaf)
        torch.testing.assert_close(out.loss.double(), exact)
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_a_beta_a_pair_is_a_call_for_each(reduction: str) -> None:
    c = case()
    r = len(c.supervision.student_row)
    kind = torch.arange(r, dtype=torch.int8) % 5
    beta = torch.where(torch.arange(r) % 2 == 0, 0.2, 0.75).double()
    fields = (c.supervision.student_row, c.supervision.teacher_row)
    weight, clip = torch.rand(r), torch.full((r,), 0.01)
    weight[3] = 0
    labels = torch.arange(r)
    hidden, head, teacher = (x.float() for x in (c.student, c.head, c.teacher))
    ours, alone = (hidden.clone().requires_grad_() for _ in range(2))
    together = vigos.Supervision(*fields, kind, weight, clip, beta=beta)
    out = vigos.linear_divergence(ours, head, teacher, supervision=together, labels=labels, reduction=reduction)
    out.loss.sum().backward()
    loss, found = [], []
    for i in range(r):
        pair = vigos.Supervision(*(x[i : i + 1] for x in (*fields, kind, weight, clip)))
        each = vigos.linear_divergence(
            alone, head, teacher, supervision=pair, labels=labels[i : i + 1], beta=float(beta[i])
        )
        loss.append(each.loss)
        found.append(torch.stack([each.divergence, each.teacher_logprob, each.student_entropy, each.clipped]))
    wanted = torch.stack(loss)
    wanted = wanted if reduction == "none" else wanted.sum() / (1 if reduction == "sum" else (weight != 0).sum())
    wanted.sum().backward()
    torch.testing.assert_close(out.loss, wanted)
    columns = torch.stack([out.divergence, out.teacher_logprob, out.student_entropy, out.clipped])
    torch.testing.assert_close(columns.detach(), torch.cat(found, 1).detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.grad, alone.grad, rtol=1e-5, atol=1e-7)


def test_only_skew_pairs_leave_the_faster_engine() -> None:
    c = case()
    hidden, head, teacher = (x.float() for x in (c.student, c.head, c.teacher))
    pairs = vigos.Supervision.aligned(len(hidden), kind="skew_forward")
    with pytest.raises(ValueError, match=r"impl='cpu' cannot run this call: it has no kernel for a skew KL"):
        vigos.linear_divergence(hidden, head, teacher, supervision=pairs, impl="cpu")
    kind = torch.arange(len(hidden), dtype=torch.int8) % 5
    asked: list[int] = []

    def divergence(*sides, supervision, **options):
        asked.append(len(supervision.student_row))
        assert len((supervision.kind > vigos.JSD).unique()) == 1
        return vigos.linear_divergence(*sides, supervision=supervision, **options)

    mixed = vigos.Supervision(pairs.student_row, pairs.teacher_row, kind, beta=0.3)
    by_beta(divergence, (hidden, head, teacher), mixed, None, "sum", {})
    assert sum(asked) == len(hidden)
    assert len(asked) == 3  # either KL, JSD, and both skew ones


@pytest.mark.parametrize("beta", [1.0, 0, torch.tensor([0.5, float("nan"), 0.5]), torch.full((2,), 0.5), torch.ones(3)])
def test_no_beta(beta) -> None:
    pairs = vigos.Supervision.aligned(3, kind="jsd")
    pairs = vigos.Supervision(pairs.student_row, pairs.teacher_row, "jsd", beta=beta)
    with pytest.raises(ValueError, match=r"supervision.beta must be floats \(3,\) in \(0, 1\), or one, got"):
        vigos.logits_divergence(torch.randn(3, 5), torch.randn(3, 5), supervision=pairs)


def test_teachers_with_their_own(tmp_path: Path) -> None:
    """One step's loss of two teachers, a JSD and a skew KL with a beta each, from full logits in float64."""
    teachers = [
        {"name": "near", "reads": "student", "kind": "jsd", "beta": 0.2},
        {"name": "told", "reads": "reference", "kind": "skew_forward", "beta": 0.7, "weight": 0.5},
    ]  # fmt: skip
    args = config(tmp_path, teachers=teachers, clip_mode="none")
    made, texts = tiny_student(torch.float64), [VALID_A, CUT_OFF]
    engine = trainer_of(made, args, rows(2), texts=texts)
    move(engine)
    engine.model.eval()
    parts: list[list[torch.Tensor]] = [[], []]
    for row, text in zip(rows(2), texts, strict=True):
        ids, image = completion_ids(text), row["images"][0]
        asked = chat(f"{row['problem']} Describe, think, answer.", "<description>")
        told = chat(f"{row['problem']} Key: {row['answer']}. Describe, think, answer.", "<description>")
        with torch.no_grad():
            q = full_log_probs(engine.model, asked, image, ids)
            with engine.model.disable_adapter():
                p, key = (full_log_probs(engine.model, context, image, ids) for context in (asked, told))
        m = (0.8 * q.exp() + 0.2 * p.exp()).log()
        parts[0].append((0.2 * p.exp() * (p - m) + 0.8 * q.exp() * (q - m)).sum(-1))
        parts[1].append((key.exp() * (key - (0.3 * q.exp() + 0.7 * key.exp()).log())).sum(-1))
    wanted = torch.cat(parts[0]).mean() + 0.5 * torch.cat(parts[1]).mean()
    engine.train()
    assert engine.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    with pytest.raises(ValueError, match="teacher 'a': beta must be in"):
        Teacher.read({"name": "a", "beta": 0.5})
