"""TRL's and Liger's own functions against ours, where their conventions allow."""

from __future__ import annotations

import pytest
import torch
from helpers.divergence_cases import case, error, heads, split

import vigos

KIND_OF_BETA = {0.0: vigos.FORWARD_KL, 1.0: vigos.REVERSE_KL, 0.5: vigos.JSD, 0.1: vigos.JSD}
IMPLS = ["reference", "cpu"]


def ours(c, beta: float, impl: str, rows: torch.Tensor, **options):
    leaves = [x.float().requires_grad_() for x in (c.student, c.head)]
    supervision = vigos.Supervision(rows, rows, KIND_OF_BETA[beta])
    transform, options = split(options)
    single = [None if x is None else x.float() for x in (c.teacher_head, c.student_bias, c.teacher_bias)]
    head, teacher_head = heads(leaves[1], *single, **transform)
    out = vigos.linear_divergence(
        leaves[0], head, c.teacher.float(), teacher_head, supervision=supervision,
        beta=beta if 0 < beta < 1 else 0.5, impl=impl, **options,
    )  # fmt: skip
    (out.loss / len(rows)).backward()
    return out, leaves


@pytest.mark.parametrize("beta", KIND_OF_BETA)
@pytest.mark.parametrize("impl", IMPLS)
def test_trl(impl, beta):
    """Masked rows, two heads, biases, scale, softcap, temperature; its mean over the mask is our sum by the count."""
    module = pytest.importorskip("trl.trainer.distillation_trainer")
    c = case(24, 32, 301, near=0.3, shared=False, bias=True)
    mask = torch.arange(24) % 3 != 0
    hidden, head = c.student.float().requires_grad_(), c.head.float().requires_grad_()
    loss, entropy, count = module._chunked_divergence_loss(
        hidden[None], c.teacher.float()[None], head, c.teacher_head.float(), mask[None], beta,
        student_lm_head_bias=c.student_bias.float(), teacher_lm_head_bias=c.teacher_bias.float(),
        student_logit_scale=0.7, teacher_logit_scale=0.7, student_final_logit_softcapping=20.0,
        teacher_final_logit_softcapping=20.0, temperature=1.3,
    )  # fmt: skip
    loss.backward()
    out, leaves = ours(c, beta, impl, mask.nonzero().squeeze(1), scale=0.7, softcap=20.0, temperature=1.3)
    assert count == mask.sum()
    assert out.loss.item() / mask.sum() == pytest.approx(loss.item(), rel=2e-5)
    assert out.student_entropy.sum().item() == pytest.approx(entropy.item(), rel=2e-5)
    assert error(leaves[0].grad.double(), hidden.grad.double()) < 1e-4
    assert error(leaves[1].grad.double(), head.grad.double()) < 1e-4


@pytest.mark.parametrize("beta", KIND_OF_BETA)
@pytest.mark.parametrize("impl", IMPLS)
def test_liger(impl, beta):
    """weight_soft_loss 1 and no cross-entropy; rows whose label is ignored are not ours. It divides by kept labels."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    c = case(24, 32, 301, near=0.3, shared=False)
    labels = torch.where(torch.arange(24) % 3 != 0, 5, -100)
    loss_of = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.3, compiled=False, chunk_size=7
    )
    hidden, head = c.student.float().requires_grad_(), c.head.float().requires_grad_()
    loss = loss_of(hidden, head, c.teacher.float(), c.teacher_head.float(), labels)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    out, leaves = ours(c, beta, impl, (labels >= 0).nonzero().squeeze(1), temperature=1.3)
    assert out.loss.item() / (labels >= 0).sum() == pytest.approx(loss.item(), rel=2e-5)
    assert error(leaves[0].grad.double(), hidden.grad.double()) < 1e-4
    assert error(leaves[1].grad.double(), head.grad.double()) < 1e-4


@pytest.mark.parametrize("beta", KIND_OF_BETA)
def test_trl_logits(beta):
    """GKD's generalized_jsd_loss takes logits; with labels and reduction "batchmean" it divides by the kept tokens."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 9, 120, generator=g) * 3, torch.randn(2, 9, 120, generator=g) * 3
    labels = torch.where(torch.rand(2, 9, generator=g) < 0.3, -100, 1)
    leaf = s.clone().requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(leaf, t, labels=labels, beta=beta, temperature=1.2)
    theirs.backward()
    own = s.clone().requires_grad_()
    rows = (labels.flatten() != -100).nonzero().squeeze(1)
    out = vigos.logits_divergence(
        own.flatten(0, 1), t.flatten(0, 1), supervision=vigos.Supervision(rows, rows, KIND_OF_BETA[beta]),
        beta=beta if 0 < beta < 1 else 0.5, temperature=1.2,
    )  # fmt: skip
    mean = out.loss / len(rows)
    mean.backward()
    assert mean.item() == pytest.approx(theirs.item(), rel=2e-5)
    assert error(own.grad.double(), leaf.grad.double()) < 1e-4
