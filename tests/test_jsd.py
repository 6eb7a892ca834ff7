"""JSD with any beta, its ends and a teacher close to its student included, in float32 on every engine."""

from __future__ import annotations

import functools
import math

import mpmath
import pytest
import torch
from helpers.engines import PROFILES, engines_on_cpu

import vigos

BETAS = (1e-12, 1e-6, 0.3, 0.7, 1 - 1e-6, 1 - 1e-8)
DISTANCES = torch.tensor([1e-3, 1e-3, 0.3, 0.3, 4.0, 15.0])  # of the teacher, a row each
ROWS, V = len(DISTANCES), 24


engine = engines_on_cpu(PROFILES)


def logits(distance=DISTANCES[:, None]):
    """Two models' logits (ROWS, V) in float32: a few winners a row, the teacher `distance` away."""
    g = torch.Generator().manual_seed(3)
    student = torch.randn(ROWS, V, generator=g) * 3
    return student, student + distance * torch.randn(ROWS, V, generator=g)


def run(student, teacher, beta, engine):
    """Rows (ROWS,) and their gradient (ROWS, V) as an engine computes them, in float64."""
    leaf = student.clone().requires_grad_()
    rows = vigos.Supervision.aligned(ROWS, kind="jsd")
    out = vigos.logits_divergence(leaf, teacher, supervision=rows, beta=beta, impl=engine).divergence
    out.backward(torch.ones(ROWS))
    return out.detach().double(), leaf.grad.double()


@functools.cache
def exact(beta):
    """The definition with 40 digits: rows (ROWS,) and their gradient (ROWS, V) in float64."""
    rows, gradients = [], []
    with mpmath.workdps(40):
        b = mpmath.mpf(beta)
        for logits_of_row in zip(*(x.tolist() for x in logits()), strict=True):
            masses = [[mpmath.exp(x) for x in z] for z in logits_of_row]
            p_s, p_t = ([x / sum(e) for x in e] for e in masses)
            mixture = [(1 - b) * s + b * t for s, t in zip(p_s, p_t, strict=True)]
            a = [(1 - b) * s * mpmath.log(s / m) for s, m in zip(p_s, mixture, strict=True)]
            rows.append(sum(a) + sum(b * t * mpmath.log(t / m) for t, m in zip(p_t, mixture, strict=True)))
            gradients.append([x - s * sum(a) for x, s in zip(a, p_s, strict=True)])
    return torch.tensor([float(x) for x in rows], dtype=torch.float64), torch.tensor(
        [[float(x) for x in row] for row in gradients], dtype=torch.float64
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter, about infinities
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_of_any_beta(engine, beta):
    """Rows and gradients to 2e-5; a float32 1 - beta was 1.3 % off at 1 - 1e-6 and 0 at 1 - 1e-8."""
    rows, gradient = run(*logits(), beta, engine)
    wanted, wanted_gradient = exact(beta)
    torch.testing.assert_close(rows, wanted, rtol=2e-5, atol=0)
    # The mean that the gradient subtracts rounds too, which shows where one token holds nearly all of the row.
    off = (gradient - wanted_gradient).norm(dim=1) - 5e-7 * wanted
    assert (off < 2e-5 * wanted_gradient.norm(dim=1)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("beta", [1e-8, 0.3, 1 - 1e-8])
def test_jsd_of_impossible_entries(engine, beta):
    """Check that an entry impossible on one side adds a finite term, and on both sides nothing; no NaN."""
    student, teacher = logits(1.0)
    student[:, 0] = teacher[:, 1] = -math.inf
    student[:, 2] = teacher[:, 2] = -math.inf
    log_s, log_t = (x.double().log_softmax(-1) for x in (student, teacher))
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    parts = [(w * x.exp() * (x - log_m)).nan_to_num() for w, x in ((beta, log_t), (1 - beta, log_s))]
    rows, gradient = run(student, teacher, beta, engine)
    torch.testing.assert_close(rows, sum(parts).sum(-1), rtol=2e-5, atol=0)
    wanted = parts[1] - log_s.exp() * parts[1].sum(-1, keepdim=True)
    assert ((gradient - wanted).norm(dim=1) < 2e-5 * wanted.norm(dim=1)).all()


def test_a_beta_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"beta must be at least 1e-30 with torch.float32 operands, got 1e-40"):
        vigos.logits_divergence(*logits(1.0), beta=1e-40)
