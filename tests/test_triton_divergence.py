"""Ask what only the Triton engine can be asked; test_engines.py and test_engines_logits.py say that it is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.divergence_cases import case
from helpers.engines import PROFILES, configure, small_triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vigos
from vigos import reference
from vigos.divergence.engines import triton as triton_engine

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from vigos.kernels.numerics import expm1, log1p, tanh_and_slope  # noqa: E402

DEVICE = PROFILES["triton"].device


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation inside returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_never_holds_every_logit(monkeypatch):
    """Nothing of N x V elements: at most 48 rows, those of three chunks, where the naive loss is seen to hold all."""
    configure(monkeypatch, "triton", small_triton())
    n, v = 96, 300
    c = case(n, 8, v)
    hidden, head, teacher = (x.to(DEVICE, torch.float32) for x in (c.student, c.head, c.teacher))
    with torch.no_grad(), Largest() as ours:
        vigos.linear_divergence(hidden, head, teacher, impl="triton")
    with torch.no_grad(), Largest() as naive:
        reference.forward_kl(hidden @ head.T, hidden @ head.T)
    assert naive.bytes >= 4 * n * v
    assert ours.bytes <= 4 * n * v / 2, f"{ours.bytes / 4:.0f} elements in one tensor, N x V is {n * v}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_live_rows_of_many_chunks_meet_in_one_product(monkeypatch):
    """Chunks of 16 with 5, 0, 16 and 13 live rows take two products of 32, and each row is what it was."""
    configure(monkeypatch, "triton", replace(small_triton(), waiting_with_head=2))
    products, multiply = [], triton_engine.backproject
    monkeypatch.setattr(triton_engine, "backproject", lambda *a: (products.append(a[0].shape[0]), multiply(*a)))
    hidden, head, noise = (torch.randn(n, 24, device=DEVICE) for n in (64, 65, 64))
    live = torch.stack([torch.arange(16).flip(0) < n for n in (5, 0, 16, 13)]).flatten().to(DEVICE)

    def gradients(weight, call, dtype, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, head)]
        teacher, fixed = (hidden + 0.3 * noise).to(dtype), head.to(dtype)
        kind, clip = torch.zeros(64, dtype=torch.int8), torch.full((64,), float("inf"))
        rows = vigos.Supervision.aligned(64, kind=kind.to(DEVICE), weight=weight.to(DEVICE), clip=clip.to(DEVICE))
        out = call(*leaves, teacher, fixed, supervision=rows, **options)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out.loss, leaves)

    one, _ = gradients(torch.ones(64), vigos.linear_divergence, torch.float32, impl="triton")
    other, dhead = gradients(live.float(), vigos.linear_divergence, torch.float32, impl="triton")
    assert products == [32] * 4
    assert torch.equal(one[live], other[live])
    assert (other[~live] == 0).all()
    _, want = gradients(live.float(), reference.linear_divergence, torch.float64)
    torch.testing.assert_close(dhead.double(), want, rtol=1e-4, atol=1e-5)


def test_float64_and_a_missing_interpreter_are_refused(monkeypatch):
    tensors = [torch.randn(n, 8, device=DEVICE) for n in (2, 16, 2)]
    with pytest.raises(ValueError, match="float64"):
        vigos.linear_divergence(*(x.double() for x in tensors), impl="triton")
    if DEVICE == "cpu":
        monkeypatch.setattr("vigos.kernels.numerics.INTERPRETED", False)
        with pytest.raises(ValueError, match="need a CUDA device"):
            vigos.linear_divergence(*tensors, impl="triton")


@triton.jit
def _probe(x_ptr, out_ptr, n: tl.constexpr):
    offs = tl.arange(0, n)
    x = tl.load(x_ptr + offs)
    tanh, slope = tanh_and_slope(x)
    tl.store(out_ptr + offs, expm1(x))
    tl.store(out_ptr + n + offs, log1p(expm1(-tl.abs(x)) * 0.7))
    tl.store(out_ptr + 2 * n + offs, tanh)
    tl.store(out_ptr + 3 * n + offs, slope)


def test_elementary_functions():
    """expm1, log1p and tanh to 2 eps over their whole range, where exp and log themselves are."""
    magnitudes = torch.logspace(-30, 1.3, 1024)
    x = torch.cat([-magnitudes, magnitudes]).to(DEVICE)
    out = torch.full((4, 2048), math.nan, device=DEVICE)
    _probe[(1,)](x, out, 2048)
    y = x.double()
    wanted = (
        torch.expm1(y), torch.log1p(torch.expm1(-y.abs()) * 0.7), torch.tanh(y),
        4 * torch.exp(-2 * y.abs()) / (1 + torch.exp(-2 * y.abs())) ** 2,
    )  # fmt: skip
    for got, want in zip(out, wanted, strict=True):
        relative = (got.double() - want).abs() / want.abs()
        assert relative.max() <= 40 * torch.finfo(torch.float32).eps if DEVICE == "cuda" else 2.4e-7
