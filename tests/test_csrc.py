"""The C++ below the CPU engine: vector functions, matrix products, threads, the choice of an instruction set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import vigos.divergence.engines.cpu  # torch first: the extension uses the threads that it brought

_C = pytest.importorskip("vigos._C")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    try:
        _C.select_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    _C.select_isa("best")


def evaluate(function: int, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    _C.evaluate(function, x.data_ptr(), x.numel(), y.data_ptr())
    return y


def ulps(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest distance in units of the last place of the exact value."""
    exponent = torch.frexp(exact).exponent.double()
    return ((y.double() - exact) / 2.0 ** (exponent - 24)).abs().max().item()


# What is evaluated where, and how far it may be off: simd.h promises these.
FUNCTIONS = {
    "exp": (0, lambda x: -x, torch.exp, (0.0, 87.0), 1.0),
    "exp(-x) - 1": (1, lambda x: x, lambda x: torch.expm1(-x), (1e-30, 200.0), 2.0),
    "log(1 + x)": (2, lambda x: -x, torch.log1p, (1e-30, 0.9999), 2.0),
    "tanh": (3, lambda x: x, torch.tanh, (1e-30, 30.0), 3.0),
    "tanh, negative": (3, lambda x: -x, torch.tanh, (1e-30, 30.0), 3.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vector_functions(isa, name):
    function, argument, exact, (low, high), most = FUNCTIONS[name]
    even = torch.linspace(low, high, 200_003)
    logarithmic = torch.logspace(-30 if low > 0 else -10, torch.tensor(high).log10().item() - 1e-4, 100_003)
    x = argument(torch.cat([even, logarithmic]))
    assert ulps(evaluate(function, x), exact(x.double())) <= most


def test_vector_functions_at_their_ends(isa):
    inf, nan = float("inf"), float("nan")
    assert evaluate(0, torch.tensor([0.0, -0.0, -87.5, -inf, -1e30])).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert evaluate(0, torch.tensor([nan])).isnan().all()
    assert evaluate(1, torch.tensor([0.0, 1e30, inf])).tolist() == [0.0, -1.0, -1.0]
    assert evaluate(3, torch.tensor([0.0, inf, -inf])).tolist() == [0.0, 1.0, -1.0]
    assert evaluate(3, torch.tensor([nan])).isnan().all()


# One row, one column; past a register tile, a panel, a super-block of 96 rows, a depth of 256; nothing a multiple.
@pytest.mark.parametrize(("v", "d", "n"), [(1, 1, 1), (97, 65, 17), (300, 257, 50), (4100, 33, 131)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(isa, v, d, n, dtype):
    """All three, against float64; what they write is everything, what they leave alone is everything else."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(v, d + 3, generator=g).to(dtype)[:, :d]
    x = torch.randn(n, d, generator=g)
    exact_head = head.double()
    out = torch.full((v, n + 2), float("nan"))
    head_ = vigos.divergence.engines.cpu._matrix(head)
    _C.project(head_, x.data_ptr(), d, n, out.data_ptr(), n + 2, 3)
    torch.testing.assert_close(out[:, :n].double(), exact_head @ x.double().T, rtol=1e-5, atol=1e-5 * d**0.5)
    assert out[:, n:].isnan().all()

    width = (n + 15) // 16 * 16
    a, p = torch.randn(2, v, width + 5, generator=g)
    mean, live = torch.randn(width, generator=g), torch.randperm(width, generator=g)[:n].sort().values.int()
    gradient = (a[:, :width].double() - p[:, :width].double() * mean.double())[:, live]
    slopes = _C.Slopes(a.data_ptr(), p.data_ptr(), width + 5, width, mean.data_ptr(), live.data_ptr(), n)
    back = torch.full((n, d), float("nan"))
    _C.backproject(slopes, head_, back.data_ptr(), 2)
    torch.testing.assert_close(back.double(), gradient.T @ exact_head, rtol=1e-5, atol=2e-5 * v**0.5)

    total, bias, weight = (torch.randn(size, generator=g) for size in ((v, d), (v,), (n,)))
    expected, expected_bias = total.double() + gradient @ x.double(), bias.double() + gradient @ weight.double()
    _C.accumulate_head(slopes, v, x.data_ptr(), d, weight.data_ptr(), total.data_ptr(), bias.data_ptr(), 2)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * n**0.5)
    torch.testing.assert_close(bias.double(), expected_bias, rtol=1e-5, atol=1e-5 * n**0.5)


def test_a_product_rounds_each_element_alike(isa):
    """However many columns there are and wherever one stands among them."""
    g = torch.Generator().manual_seed(0)
    head, x = torch.randn(501, 300, generator=g), torch.randn(90, 300, generator=g)
    order = torch.randperm(90, generator=g)

    def project(x):
        out = torch.empty(501, x.shape[0])
        _C.project(
            vigos.divergence.engines.cpu._matrix(head), x.data_ptr(), 300, x.shape[0], out.data_ptr(), x.shape[0], 2
        )
        return out

    every = project(x)
    assert torch.equal(project(x[order].contiguous()), every[:, order])
    for few in (1, 5, 33):
        assert torch.equal(project(x[:few]), every[:, :few])


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="this machine does not run mmx"):
        _C.select_isa("mmx")
    assert _C.isa() in ("portable", "avx2", "avx512")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_one_pool_of_threads():
    """After parallel work of torch's and of ours no thread was added, and one OpenMP runtime is loaded."""
    script = """
import torch, vigos
def threads():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1])
torch.set_num_threads(3)
a = torch.randn(600, 600)
a @ a, torch.randn(1 << 20).exp()
before = threads()
h = torch.randn(64, 32, requires_grad=True)
vigos.linear_divergence(h, torch.randn(5000, 32), torch.randn(64, 32), impl="cpu").loss.backward()
from vigos import _C
assert _C.thread_backend() == "openmp", _C.thread_backend()
assert threads() == before, (before, threads())
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if any(x in line for x in ("gomp", "libomp", "iomp"))}
assert len(runtimes) == 1, runtimes
"""
    subprocess.run([sys.executable, "-c", script], check=True)
