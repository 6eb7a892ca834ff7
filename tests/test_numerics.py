"""One mathematics in one convention: gap, lse_gap, delta, terms and mean slopes are the same in every engine."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.engines import emulate

import vigos
from vigos import reference
from vigos.divergence.engines import engine
from vigos.divergence.engines import problem as columns
from vigos.divergence.engines.problem import LogitsProblem, LogitTransform

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402

from vigos.kernels import numerics  # noqa: E402

KINDS = (vigos.FORWARD_KL, vigos.REVERSE_KL, vigos.JSD)
BETA, V = 0.3, 64
pytestmark = pytest.mark.skipif(not numerics.INTERPRETED, reason="compares with Triton in its interpreter")


@pytest.fixture
def emulator(request, monkeypatch):
    return emulate(monkeypatch, request)


def row():
    """Logits (V,) of both sides: near and far entries, and one that is impossible on both."""
    g = torch.Generator().manual_seed(0)
    z_s = torch.randn(V, generator=g) * 3
    z_t = z_s + torch.logspace(-4, 0.7, V) * torch.where(torch.arange(V) % 2 == 0, 1.0, -1.0)
    z_s[5] = z_t[5] = -math.inf
    return z_s, z_t


def exact(z_s, z_t, kind, clip):
    """gap, delta, term and gradient of each entry (4, V), from the definition in float64."""
    leaf, z_t = z_s.double().requires_grad_(), z_t.double()
    rows = reference.divergence(leaf[None], z_t[None], torch.tensor([kind]), BETA, clip)
    (gradient,) = torch.autograd.grad(rows.sum(), leaf)
    log_s, log_t = leaf.detach().log_softmax(-1), z_t.log_softmax(-1)
    p_s, p_t = log_s.exp(), log_t.exp()
    delta = log_s - log_t
    log_m = torch.log((1 - BETA) * p_s + BETA * p_t)
    term = {
        vigos.FORWARD_KL: -p_t * delta, vigos.REVERSE_KL: p_s * delta,
        vigos.JSD: BETA * p_t * (log_t - log_m) + (1 - BETA) * p_s * (log_s - log_m),
    }[kind]  # fmt: skip
    return torch.stack([leaf.detach() - z_t, delta, torch.where(p_s > 0, term, 0.0), gradient])


def problem(z_s, z_t, kind, clip):
    one = torch.zeros(1, dtype=torch.int64)
    return LogitsProblem(
        student_row=one, teacher_row=one, kind=torch.tensor([kind], dtype=torch.int8), weight=torch.ones(1),
        clip=torch.full((1,), math.inf), labels=None, student_transform=LogitTransform(),
        teacher_transform=LogitTransform(), beta=BETA, entry_clip=clip, vocab_size=V, vocab_start=0, group=None,
        student_logits=z_s[None], teacher_logits=z_t[None],
    )  # fmt: skip


@triton.jit
def _entries(s_ptr, t_ptr, state_ptr, out_ptr, kind, beta, clip, V: tl.constexpr, CLIP: tl.constexpr):
    offs = tl.arange(0, V)
    x_s, x_t = tl.load(s_ptr + offs), tl.load(t_ptr + offs)
    gap = x_s - x_t
    origin_s, origin_t = tl.load(state_ptr + numerics.ORIGIN_S), tl.load(state_ptr + numerics.ORIGIN_T)
    p_s = numerics.probability(x_s, origin_s, tl.load(state_ptr + numerics.INV_SUM_S), numerics.LOG2E)
    p_t = numerics.probability(x_t, origin_t, tl.load(state_ptr + numerics.INV_SUM_T), numerics.LOG2E)
    lse_gap = tl.load(state_ptr + numerics.LSE_GAP)
    delta = gap - lse_gap
    term, _ = numerics.term(p_s, p_t, delta, kind, beta)
    slope = numerics.slope_of(
        gap, p_s, p_t, lse_gap, tl.load(state_ptr + numerics.PIVOT), tl.load(state_ptr + numerics.MEAN_GAP),
        tl.load(state_ptr + numerics.MEAN_SLOPE), kind, beta, clip, CLIP, False, True,
    )  # fmt: skip
    tl.store(out_ptr + offs, gap)
    tl.store(out_ptr + V + offs, delta)
    tl.store(out_ptr + 2 * V + offs, term)
    tl.store(out_ptr + 3 * V + offs, slope)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about inf - inf
def test_entries_mean_the_same_everywhere(emulator, kind, clip):
    z_s, z_t = row()
    want = exact(z_s, z_t, kind, clip)
    limit = math.inf if clip is None else clip
    cpp, from_triton = torch.full((4, V), math.nan), torch.full((4, V), math.nan)
    emulator.entries_of_a_row(z_s.data_ptr(), z_t.data_ptr(), V, kind, BETA, limit, cpp.data_ptr())
    state = engine("triton").logits_forward(problem(z_s, z_t, kind, clip)).state
    _entries[(1,)](z_s, z_t, state, from_triton, kind, BETA, limit, V, clip is not None)
    possible = z_s > -math.inf
    for got in (cpp, from_triton):
        assert (got[2:, ~possible] == 0).all()
        torch.testing.assert_close(got[:, possible].double(), want[:, possible], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_states_mean_the_same_everywhere(emulator, kind, clip):
    """The columns that engines name alike hold the same numbers, whoever computed them."""
    z_s, z_t = row()
    one = problem(z_s, z_t, kind, clip)
    states = {
        name: engine(name).logits_forward(one).state[0].double() for name in ("reference", "cpu", "triton", "cuda")
    }
    log_s, log_t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    lse_gap = z_s.double().logsumexp(-1) - z_t.double().logsumexp(-1)
    known = {name: getattr(columns, name) for name in ("TOP_S", "LOG_SUM_S", "TOP_T", "LOG_SUM_T", "MEAN_SLOPE")}
    mean_slope = numerics.MEAN_SLOPE.value
    for name, state in states.items():
        column = columns.LSE_GAP if name in ("reference", "cpu") else numerics.LSE_GAP.value
        torch.testing.assert_close(state[column], lse_gap, rtol=1e-5, atol=1e-6, msg=name)
    for column in known.values():
        torch.testing.assert_close(states["cpu"][column], states["reference"][column], rtol=1e-5, atol=1e-6)
    if kind == vigos.JSD or clip is not None:
        ours, on_cpu = states["triton"][mean_slope], states["cpu"][columns.MEAN_SLOPE]
        for theirs in (states["cuda"][mean_slope], on_cpu):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    weight = (log_s if kind == vigos.REVERSE_KL else log_t).exp()
    mean_gap = torch.where(weight > 0, weight * (z_s - z_t).double().nan_to_num(), 0.0).sum()
    for name in ("triton", "cuda"):
        got = states[name][numerics.MEAN_GAP.value] + states[name][numerics.PIVOT.value]
        torch.testing.assert_close(got, mean_gap, rtol=1e-5, atol=1e-6, msg=name)


def test_codes_are_the_same_everywhere():
    """Kinds and dtypes by number: Python's and those of csrc/numerics.h, which the extension names."""
    extension = pytest.importorskip("vigos._C")
    assert extension.dtypes == {str(dtype)[6:]: code for dtype, code in columns.DTYPES.items()}
    assert extension.kinds == {"forward": vigos.FORWARD_KL, "reverse": vigos.REVERSE_KL, "jsd": vigos.JSD}
    assert (numerics.REVERSE.value, numerics.JSD.value) == (vigos.REVERSE_KL, vigos.JSD)
