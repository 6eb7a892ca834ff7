"""The Triton engine and tree attention at sizes and in dtypes that only a GPU can run: part of `make gpu-check`."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.divergence_cases import heads, split

import vigos
from vigos import reference
from vigos.divergence.supervision import FORWARD_KL, JSD, REVERSE_KL, Supervision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
INF = float("inf")


def assert_no_worse(ours, eager, exact, name, scale=None, factor=2.0):
    """`scale`: the largest value added or subtracted on the way to the answer (default: the answer)."""
    assert torch.isfinite(ours).all(), f"{name}: non-finite values"
    err, base = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    rounding = torch.finfo(ours.dtype).eps * (exact if scale is None else scale).abs().max().item()
    assert err <= factor * base + rounding, f"{name}: max error {err:.2e}, eager {base:.2e}, rounding {rounding:.2e}"


def problem(n, d, v, dtype, *, near, seed=0, d_t=None):
    """Peaked rows (a few clear winners) and, where D_t = D, a teacher that is the student plus noise."""
    torch.manual_seed(seed)
    head = torch.randn(v, d, device="cuda") * 2 / math.sqrt(d)
    hidden = torch.randn(n, d, device="cuda") * 2 + head[torch.randint(v, (n,), device="cuda")] * 3
    if d_t is None:
        teacher, head_t = hidden * (1 + near * torch.randn(n, d, device="cuda")), None
    else:
        teacher = torch.randn(n, d_t, device="cuda") * 2
        head_t = torch.randn(v, d_t, device="cuda") * 2 / math.sqrt(d_t)
    kind = torch.arange(n, device="cuda").remainder(3).to(torch.int8)
    rows = Supervision(
        torch.randperm(n, device="cuda"), torch.randperm(n, device="cuda"), kind,
        torch.rand(n, device="cuda") + 0.1, torch.full((n,), INF, device="cuda"),
    )  # fmt: skip
    if d_t is None:
        rows = Supervision(rows.student_row, rows.student_row, kind, rows.weight, rows.clip)
    return *(None if x is None else x.to(dtype) for x in (hidden, head, teacher, head_t)), rows


def exact(tensors, rows, dtype=torch.float64, **options):
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    transform, options = split(options)
    side_s, side_t = heads(leaves[1], leaves[3], **transform)
    loss, divergence = reference.linear_divergence(leaves[0], side_s, leaves[2], side_t, supervision=rows, **options)
    return loss.detach(), divergence.detach(), *torch.autograd.grad(loss, leaves[:2])


def rows_to(device, rows):
    return Supervision(*(x.to(device) for x in (rows.student_row, rows.teacher_row, rows.kind, rows.weight, rows.clip)))


def run(tensors, rows, train_head=False, **options):
    hidden, head = tensors[0].clone().requires_grad_(), tensors[1].clone().requires_grad_(train_head)
    transform, options = split(options)
    side_s, side_t = heads(head, tensors[3], **transform)
    out = vigos.linear_divergence(hidden, side_s, tensors[2], side_t, supervision=rows, impl="triton", **options)
    out.loss.backward()
    return out, hidden.grad, head.grad


@pytest.mark.parametrize("near", [0.01, 0.03, 0.2])
def test_bf16_gradient_is_rounded_once(near):
    """Error of each row's dhidden against float64 with the same operands: at most 0.5 %, all kinds."""
    *tensors, rows = problem(300, 512, 20_011, torch.bfloat16, near=near)
    _, dhidden, _ = run(tensors, rows)
    _, _, want, _ = exact(tensors, rows)
    assert ((dhidden.double() - want).norm(dim=1) / want.norm(dim=1)).max() <= 5e-3


@pytest.mark.parametrize("d_t", [None, 200])
def test_fp32(d_t):
    *tensors, rows = problem(200, 257, 9_001, torch.float32, near=0.05, d_t=d_t)
    options = {"temperature": 1.3, "softcap": 20.0, "vocab_size": 8_900, "entry_clip": 0.05} if d_t else {}
    out, dhidden, dweight = run(tensors, rows, train_head=True, **options)
    _, divergence, want, want_head = exact(tensors, rows, **options)
    _, eager_divergence, eager, eager_head = exact(tensors, rows, torch.float32, **options)
    lse = torch.logsumexp(tensors[0].double() @ tensors[1].double().T, -1)
    assert_no_worse(out.divergence, eager_divergence, divergence, "divergence", scale=lse)
    assert_no_worse(dhidden, eager, want, "dhidden")
    assert_no_worse(dweight, eager_head, want_head, "dweight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trainable_head(dtype):
    *tensors, rows = problem(700, 256, 5_003, dtype, near=0.1)
    _, dhidden, dweight = run(tensors, rows, train_head=True)
    _, _, want, want_head = exact(tensors, rows)
    assert (dhidden.double() - want).norm() <= 5e-3 * want.norm()
    assert (dweight.double() - want_head).norm() <= 5e-3 * want_head.norm()


def test_clipped_rows_change_nobody_else():
    *tensors, rows = problem(900, 256, 5_003, torch.bfloat16, near=0.1)
    alone, one, _ = run(tensors, rows)
    clip = torch.where(torch.rand(900, device="cuda") < 0.5, 0.5 * alone.divergence.detach(), INF)
    among, other, _ = run(tensors, Supervision(rows.student_row, rows.teacher_row, rows.kind, rows.weight, clip))
    dead = rows.student_row[among.clipped]
    live = rows.student_row[~among.clipped]
    assert torch.equal(alone.divergence, among.divergence)
    assert (other[dead] == 0).all()
    assert torch.equal(one[live], other[live])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_tensors_on_another_device_than_the_current_one(impl):
    *tensors, rows = problem(50, 64, 1_003, torch.bfloat16, near=0.1)
    want, dhidden, _ = run(tensors, rows)
    there = [None if x is None else x.to("cuda:1") for x in tensors]
    leaf = there[0].clone().requires_grad_()
    out = vigos.linear_divergence(leaf, *there[1:], supervision=rows_to("cuda:1", rows), impl=impl)
    out.loss.backward()
    torch.testing.assert_close(out.divergence.cpu(), want.divergence.cpu(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(leaf.grad.cpu(), dhidden.cpu(), rtol=2e-2, atol=1e-4)
    assert torch.cuda.current_device() == 0


def test_bits_repeat():
    *tensors, rows = problem(500, 256, 20_011, torch.bfloat16, near=0.1)
    a, b = (run(tensors, rows, train_head=True) for _ in range(2))
    assert torch.equal(a[0].divergence, b[0].divergence)
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2], b[2])


def test_memory_is_a_chunk():
    """8,192 rows of 151,936 fp32 logits would be 4.6 GiB a side."""
    head = torch.randn(151_936, 256, device="cuda", dtype=torch.bfloat16) * 0.1
    hidden, teacher = (torch.randn(8_192, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    hidden.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vigos.linear_divergence(hidden, head, teacher, impl="triton").loss.backward()
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 <= 700


@pytest.mark.parametrize("kind", [FORWARD_KL, REVERSE_KL, JSD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(kind, dtype):
    torch.manual_seed(0)
    student, teacher = (torch.randn(64, 30_011, device="cuda").mul_(3).to(dtype) for _ in range(2))
    rows = Supervision.aligned(64, kind=kind, device="cuda")
    s = student.clone().requires_grad_()
    out = vigos.logits_divergence(s, teacher, supervision=rows, impl="triton")
    out.loss.backward()
    results = []
    for precision in (torch.float64, torch.float32):
        leaf = student.to(precision).requires_grad_()
        divergence = reference.divergence(leaf, teacher.to(precision), torch.full((64,), kind, device="cuda"))
        results.append((divergence.detach(), torch.autograd.grad(divergence.sum(), leaf)[0]))
    (want, grad), (eager, eager_grad) = results
    assert_no_worse(out.divergence, eager, want, "divergence", scale=torch.tensor(20.0))
    assert_no_worse(s.grad, eager_grad.to(dtype), grad, "dlogits")


def test_offsets_past_2_to_the_31():
    """16,384 rows of 151,936 bf16 logits are 2.5e9 elements; only the last rows are supervised."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    n, v = 16_384, 151_936
    student, teacher = (torch.zeros(n, v, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    student[-2:], teacher[-2:] = torch.randn(2, v, device="cuda") * 3, torch.randn(2, v, device="cuda") * 3
    last = torch.tensor([n - 2, n - 1], device="cuda")
    rows = Supervision(last, last, torch.tensor([0, 1], dtype=torch.int8, device="cuda"), torch.ones(2, device="cuda"),
                       torch.full((2,), INF, device="cuda"))  # fmt: skip
    tail = student[-2:].clone()
    student.requires_grad_()
    out = vigos.logits_divergence(student, teacher, supervision=rows, impl="triton")
    (grad,) = torch.autograd.grad(out.loss, student)
    leaf = tail.double().requires_grad_()
    want = reference.divergence(leaf, teacher[-2:].double(), rows.kind)
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)
    assert (out.divergence.double() - want).abs().max() < 1e-4
    assert (grad[-2:].double() - want_grad).abs().max() <= 2**-8 * want_grad.abs().max()
    assert (grad[-4:-2] == 0).all()


def test_cuda_graph():
    """The engine's own work can be captured: supervision is checked before, and nothing waits for the GPU."""
    from vigos.divergence.engines import engine
    from vigos.divergence.engines.problem import LinearProblem, LogitTransform

    *tensors, rows = problem(100, 128, 5_003, torch.bfloat16, near=0.1)
    rows = Supervision(rows.student_row, rows.teacher_row, rows.kind, rows.weight, torch.full_like(rows.clip, 0.05))
    whole = LinearProblem(
        rows.student_row, rows.teacher_row, rows.kind, rows.weight, rows.clip, None, LogitTransform(),
        LogitTransform(), 0.5, None, 5_003,
        0, None, tensors[0], tensors[1], tensors[2], None, None, None, True, False, False,
    )  # fmt: skip
    run_it = engine("triton").forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        eager = run_it(whole)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = run_it(whole)
    tensors[0].mul_(1.01)
    graph.replay()
    fresh = run_it(whole)
    assert not torch.equal(fresh.statistics.divergence, eager.statistics.divergence)
    assert torch.equal(captured.statistics.divergence, fresh.statistics.divergence)
    torch.testing.assert_close(captured.drow, fresh.drow, rtol=1e-2, atol=1e-5)


# --- tree attention --------------------------------------------------------------------------------------------------


def tree(segments):
    """[(depth, tokens)] in depth-first order -> (subtree_end, positions)."""
    tokens = sum(n for _, n in segments)
    end, position = (torch.zeros(tokens, dtype=torch.int32, device="cuda") for _ in range(2))
    stack, at = [], 0
    for depth, n in segments:
        stack = stack[:depth]
        start = sum(length for *_, length in stack)
        position[at : at + n] = torch.arange(start, start + n)
        stack.append((at, at + n, n))
        at += n
        for first, last, _ in stack:
            end[first:last] = at
    return end, position


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 200])
def test_tree_attention(dtype, width, window):
    from vigos.kernels.tree_attention import tree_attention

    end, positions = tree([(0, 700), (1, 90), (2, 130), (2, 70), (1, 300), (0, 50), (1, 111)])
    tokens = end.shape[0]
    torch.manual_seed(0)
    q, dout = (torch.randn(tokens, 4, width, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(tokens, 2, width, device="cuda", dtype=dtype) for _ in range(2))
    at = torch.arange(tokens, device="cuda")
    mask = (at[None] <= at[:, None]) & (at[:, None] < end[None])
    if window is not None:
        mask &= positions[:, None] - positions[None] < window

    def dense(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) * width**-0.5
        return torch.einsum("hqk,khd->qhd", score.masked_fill(~mask, -INF).softmax(-1), v)

    def results(fn, precision):
        leaves = [x.to(precision).requires_grad_() for x in (q, k, v)]
        out = fn(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(precision))]

    options = {"scale": width**-0.5, "window": window, "positions": positions if window else None}
    ours = results(lambda *x: tree_attention(*x, end, **options), dtype)
    want, eager = results(dense, torch.float64), results(dense, dtype)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, eager, want, strict=True):
        assert_no_worse(a, b, c, name, scale=c.abs().max() * 4)
