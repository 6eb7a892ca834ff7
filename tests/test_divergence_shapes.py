"""The everyday call: (B, T) masks, leading batch dimensions, reductions, kinds by name, TRL's beta."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vigos
from vigos import reference

B, T, D, V = 3, 5, 6, 41


def hidden(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(B, T, D, generator=g, dtype=dtype)
    teacher = student + 0.3 * torch.randn(B, T, D, generator=g, dtype=dtype)
    return student, torch.randn(V, D, generator=g, dtype=dtype), teacher


def mask() -> Tensor:
    return torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])


def rows_of_the_oracle(kind: int = vigos.FORWARD_KL) -> Tensor:
    """(B, T) divergences in float64, every token."""
    student, head, teacher = hidden()
    z_s, z_t = (reference.logits(x.flatten(0, 1), head) for x in (student, teacher))
    return reference.divergence(z_s, z_t, torch.full((B * T,), kind)).view(B, T)


def test_a_mask_pairs_the_tokens_it_keeps():
    student, head, teacher = hidden()
    for m in (mask(), mask().bool(), mask().to(torch.int8)):
        out = vigos.linear_divergence(student, head, teacher, supervision=vigos.Supervision.from_mask(m))
        torch.testing.assert_close(out.divergence, rows_of_the_oracle()[mask().bool()])
    flat = vigos.linear_divergence(
        student.flatten(0, 1), head, teacher.flatten(0, 1), supervision=vigos.Supervision.from_mask(mask())
    )
    assert torch.equal(flat.divergence, out.divergence)
    spread = torch.zeros(B, T).double().masked_scatter(mask().bool(), out.divergence)
    torch.testing.assert_close(spread, rows_of_the_oracle() * mask())


def test_a_mask_carries_weights_clips_and_kinds_of_its_shape():
    student, head, teacher = hidden()
    kept, exact = mask().bool(), torch.stack([rows_of_the_oracle(kind) for kind in range(3)])
    kind, weight = torch.arange(B * T).view(B, T) % 3, torch.arange(1.0, B * T + 1).view(B, T)
    clip = torch.where(torch.arange(B * T).view(B, T) % 2 == 0, 0.25, float("inf"))
    rows = vigos.Supervision.from_mask(kept, kind=kind, weight=weight, clip=clip)
    out = vigos.linear_divergence(student, head, teacher, supervision=rows)
    picked = exact.gather(0, kind[None])[0]
    torch.testing.assert_close(out.divergence, picked[kept])
    torch.testing.assert_close(out.loss, (weight * picked.minimum(clip.double()) * kept).sum())
    with pytest.raises(ValueError, match=r"weight must be one value or \(3, 5\) like mask, got \(8,\)"):
        vigos.Supervision.from_mask(kept, weight=torch.ones(8))


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[5, -100]]), torch.ones(2, 2), [[1]]], ids=["labels", "floats", "list"]
)
def test_what_is_no_mask_is_refused(wrong):
    with pytest.raises(ValueError, match="mask must"):
        vigos.Supervision.from_mask(wrong)


def test_a_mask_of_other_dimensions_is_refused():
    student, head, teacher = hidden()
    with pytest.raises(
        ValueError, match=r"mask is \(5, 3\) and must match the student's leading dimensions, got \(3, 5\)"
    ):
        vigos.linear_divergence(student, head, teacher, supervision=vigos.Supervision.from_mask(mask().T))


@pytest.mark.parametrize(("name", "kind"), [("forward", 0), ("reverse", 1), ("jsd", 2)])
def test_kinds_have_names(name, kind):
    student, head, teacher = hidden()
    out = vigos.linear_divergence(student, head, teacher, supervision=vigos.Supervision.from_mask(mask(), kind=name))
    torch.testing.assert_close(out.divergence, rows_of_the_oracle(kind)[mask().bool()])


def test_the_beta_of_trl_and_liger():
    assert vigos.kind_and_beta(0) == (vigos.FORWARD_KL, 0.5)
    assert vigos.kind_and_beta(1.0) == (vigos.REVERSE_KL, 0.5)
    assert vigos.kind_and_beta(0.3) == (vigos.JSD, 0.3)
    with pytest.raises(ValueError, match=r"beta must be between 0 .* and 1 .*, got 1\.5"):
        vigos.kind_and_beta(1.5)


@pytest.mark.parametrize("op", ["linear", "logits"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_reductions(op, reduction):
    """A pair of weight 0 is not counted in the mean; value and gradient against autograd through the oracle."""
    weight = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) + 0.1
    weight[0, 1] = 0
    kept, clip, upstream = mask().bool(), 0.3, torch.linspace(0.5, 2, 7).double()
    student, head, teacher = hidden()
    start = student if op == "linear" else student @ head.T
    end = teacher if op == "linear" else teacher @ head.T
    rows = vigos.Supervision.from_mask(kept, weight=weight, clip=clip)
    leaves = [start.clone().requires_grad_() for _ in range(2)]
    if op == "linear":
        ours = vigos.linear_divergence(leaves[0], head, end, supervision=rows, reduction=reduction).loss
    else:
        ours = vigos.logits_divergence(leaves[0], end, supervision=rows, reduction=reduction).loss
    z_s, z_t = (x @ head.T if op == "linear" else x for x in (leaves[1], end))
    each = reference.forward_kl(z_s[kept], z_t[kept]).clamp(max=clip) * weight[kept].double()
    exact = {"sum": each.sum(), "mean": each.sum() / 6, "none": each}[reduction]
    torch.testing.assert_close(ours, exact)
    for value in (ours, exact):
        (value * (upstream if reduction == "none" else 1.7)).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_the_mean_of_nothing_is_zero():
    student, head, teacher = hidden()
    student.requires_grad_()
    rows = vigos.Supervision.from_mask(torch.zeros(B, T, dtype=torch.bool))
    loss = vigos.linear_divergence(student, head, teacher, supervision=rows, reduction="mean").loss
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_labels_of_the_masks_shape():
    student, head, teacher = hidden()
    labels = torch.where(mask().bool(), torch.arange(B * T).view(B, T), -100)
    rows = vigos.Supervision.from_mask(labels != -100)
    out = vigos.linear_divergence(student, head, teacher, supervision=rows, labels=labels)
    exact = (student @ head.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(out.student_logprob, exact[labels != -100])


def test_rows_that_share_memory():
    """Expanded logits get each row's gradient; written in place they would get the last one's."""
    g = torch.Generator().manual_seed(3)
    base, teacher = torch.randn(1, T, V, generator=g), torch.randn(B, T, V, generator=g)
    results = []
    for compute in (vigos.logits_divergence, lambda s, t: reference.forward_kl(s.flatten(0, 1), t.flatten(0, 1))):
        leaf = base.clone().requires_grad_()
        value = compute(leaf.expand(B, -1, -1), teacher)
        (value.loss if isinstance(value, vigos.DivergenceOutput) else value.sum()).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results)
    for expanded in (base.expand(B, -1, -1), base[0, :1].expand(T, -1), base[..., :1].expand(B, T, V)):
        with pytest.raises(ValueError, match="inplace must be False for student_logits whose rows share memory"):
            vigos.logits_divergence(
                expanded, teacher.reshape(-1, V)[: expanded[..., 0].numel()].view(expanded.shape), inplace=True
            )
