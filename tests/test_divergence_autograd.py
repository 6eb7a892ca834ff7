"""Second derivatives, inference mode, writes to outputs, meta tensors, gradients that never come."""

from __future__ import annotations

import warnings

import pytest
import torch

import vigos
from vigos import reference
from vigos.divergence import validation

T, D, V = 5, 6, 17


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(2, T, D, generator=g, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=dtype)
    return student, head, torch.randn(2, T, D, generator=g, dtype=dtype)


CALLS = {
    "linear": lambda s, w, t: vigos.linear_divergence(s, w, t).loss,
    "linear, a mean": lambda s, w, t: vigos.linear_divergence(s, w, t, reduction="mean").loss,
    "linear, rows": lambda s, w, t: vigos.linear_divergence(s, w, t, reduction="none").loss.sum(),
    "logits": lambda s, w, t: vigos.logits_divergence(s @ w.T, t @ w.T).loss,
    "slices of logits": lambda s, w, t: vigos.logits_divergence((s @ w.T)[:, :-1], (t @ w.T)[:, :-1]).loss,
    "in place": lambda s, w, t: vigos.logits_divergence(s @ w.T, t @ w.T, inplace=True).loss,
    "slices in place": lambda s, w, t: vigos.logits_divergence((s @ w.T)[:, :-1], (t @ w.T)[:, :-1], inplace=True).loss,
}


def penalise(loss, student):
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (gradient.pow(2).sum() + student.pow(2).sum()).backward()


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_raise(name):
    """Never a derivative that leaves the divergence out, as a penalty on the gradient beside the loss would get."""
    student, head, teacher = tensors()
    loss = CALLS[name](student, head, teacher)
    with pytest.raises(RuntimeError, match="differentiable once"):
        penalise(loss, student)


def test_a_teacher_of_inference_mode():
    """Read a teacher computed under inference_mode where it lies."""
    student, head, teacher = tensors()
    expected = [CALLS[name](student, head, teacher) for name in ("linear", "logits")]
    with torch.inference_mode():
        teacher, teacher_logits = teacher.clone(), teacher @ head.T
        frozen, rows = head.clone(), vigos.Supervision.from_mask(torch.ones(2, T, dtype=torch.int64), weight=1.0)
    for options in ({}, {"supervision": rows, "labels": torch.zeros(2, T, dtype=torch.int64)}):
        ours = [
            vigos.linear_divergence(student, head, teacher, frozen, **options).loss,
            vigos.logits_divergence(student @ head.T, teacher_logits, **options).loss,
        ]
        torch.testing.assert_close(ours, expected)
        gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (*ours, *expected)]
        torch.testing.assert_close(gradients[:2], gradients[2:])
    with torch.inference_mode():
        torch.testing.assert_close(vigos.linear_divergence(student, frozen, teacher).loss, expected[0].detach())


@pytest.mark.parametrize("op", ["linear", "logits"])
def test_rows_of_the_divergence_may_be_written(op):
    """A caller's own mask: `out.divergence[mask] = 0`, as with any other output of PyTorch."""
    student, head, teacher = tensors(torch.float64)
    out = (
        vigos.linear_divergence(student, head, teacher)
        if op == "linear"
        else vigos.logits_divergence(student @ head.T, teacher @ head.T)
    )
    mask = torch.arange(2 * T) % 3 == 0
    out.divergence[mask] = 0
    (gradient,) = torch.autograd.grad(out.divergence.sum() + out.loss, student)
    rows = reference.forward_kl(student.flatten(0, 1) @ head.T, teacher.flatten(0, 1) @ head.T)
    exact = (rows * ~mask).sum() + rows.sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, student)[0])


def test_meta_tensors():
    """Shapes without memory, as in a dry run of a model on the meta device."""
    student = torch.randn(2, T, D, device="meta", requires_grad=True)
    head = torch.randn(V, D, device="meta", requires_grad=True)
    out = vigos.linear_divergence(student, vigos.Head(head, softcap=3.0), torch.randn(2, T, D, device="meta"))
    out.loss.backward()
    assert out.loss.device.type == "meta"
    assert out.divergence.shape == (2 * T,)
    assert student.grad.shape == (2, T, D)
    assert head.grad.shape == (V, D)
    logits = torch.randn(4, V, device="meta", requires_grad=True)
    vigos.logits_divergence(logits, torch.randn(4, V, device="meta")).loss.backward()
    assert logits.grad.shape == (4, V)


def test_gradients_that_never_come_are_warned_of_once(monkeypatch):
    monkeypatch.setattr(validation, "_warned", set())
    student, head, teacher = tensors()
    weight = torch.ones(2, T, requires_grad=True)
    rows = vigos.Supervision.from_mask(torch.ones(2, T, dtype=torch.bool), weight=weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            vigos.linear_divergence(student, head, teacher.requires_grad_(), head.clone().requires_grad_())
            vigos.logits_divergence(student, teacher, supervision=rows)
        with torch.no_grad():
            vigos.logits_divergence(student, weight[..., None].expand(2, T, D), supervision=rows)
    messages = [str(w.message) for w in caught]
    assert [m.split(" ", 1)[0] for m in messages] == [
        "teacher_hidden", "teacher_head.weight", "teacher_logits", "supervision.weight",
    ]  # fmt: skip
    assert all("requires a gradient and gets none" in m for m in messages)
    assert {w.filename for w in caught} == {__file__}


def test_a_shared_head_that_trains_is_warned_of(monkeypatch):
    """A frozen teacher's head is not the student's once that has trained: nobody notices until the curves part."""
    monkeypatch.setattr(validation, "_warned", set())
    student, head, teacher = tensors()
    with pytest.warns(UserWarning, match=r"teacher_head is None and head\.weight is trained"):
        vigos.linear_divergence(student, head.requires_grad_(), teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = head.requires_grad_()
        vigos.linear_divergence(student, vigos.Head(shared), teacher.detach(), vigos.Head(shared))
