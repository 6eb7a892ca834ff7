"""The Triton tree attention against a dense mask in float64; in Triton's interpreter where there is no GPU.

Trees have branches that end inside, at and past a block, so that blocks are skipped, partly masked and full.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch

pytest.importorskip("triton")

from vigos.kernels import tree_attention as kernels
from vigos.kernels.tree_attention import Launch, meeting_blocks, tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small(monkeypatch, request):
    """Blocks of 16, so that a short pack has many; and the interpreter's numpy keeps quiet about inf - inf."""
    for table in () if "gpu" in request.keywords else ("FORWARD", "BACKWARD_Q", "BACKWARD_KV"):
        known = getattr(kernels, table)
        # Backward's two block sizes differ, as they may on a GPU.
        size = (16, 32) if table == "BACKWARD_KV" else (32, 16)
        monkeypatch.setattr(kernels, table, {key: Launch(*size, 4, 1) for key in known})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.*")
        yield


def tree(lengths):
    """[(depth in the tree, tokens)] in depth-first order -> (subtree_end (T,), position on the path (T,))."""
    tokens = sum(n for _, n in lengths)
    end, position, stack, at = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64), [], 0
    for depth, n in lengths:
        stack = stack[:depth]
        start = sum(length for _, _, length in stack)
        position[at : at + n] = torch.arange(start, start + n)
        stack.append((at, at + n, n))
        at += n
        for first, last, _ in stack:
            end[first:last] = at
    return end.to(DEVICE), position.to(DEVICE)


DEEP = [(0, 21), (1, 9), (2, 13), (2, 7), (1, 30), (0, 5), (1, 11)]  # two roots, depth 3
SHAPES = {
    "one token": [(0, 1)],
    "one branch": [(0, 33)],
    "deep": DEEP,
    "wide": [(0, 40), *[(1, 6)] * 5],
}


def dense(q, k, v, end, scale, window=None, softcap=None, positions=None):
    tokens, group = q.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    score = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    at = torch.arange(tokens, device=q.device)
    mask = (at[None] <= at[:, None]) & (at[:, None] < end[None])
    if window is not None:
        mask &= positions[:, None] - positions[None] < window
    p = score.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v)


def run(fn, tensors, dout):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def check(lengths, heads, kv_heads, width, dtype=torch.float32, *, window=None, softcap=None, layout=None):
    end, positions = tree(lengths)
    tokens = end.shape[0]
    g = torch.Generator().manual_seed(0)
    shape = [(tokens, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(*s, generator=g).to(DEVICE, dtype) for s in shape)
    q = q * 2  # peaked attention
    if layout == "heads first":
        q, k, v, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout))
    elif layout == "width strided":
        q, k, v, dout = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, dout))
    options = {"scale": width**-0.5, "window": window, "softcap": softcap}
    options["positions"] = None if window is None else positions
    ours = run(lambda *x: tree_attention(*x, end, **options), (q, k, v), dout)
    exact = run(lambda *x: dense(*x, end, **options), [x.double() for x in (q, k, v)], dout.double())
    eager = run(lambda *x: dense(*x, end, **options), (q, k, v), dout)
    # The largest value on the way: p is exp of a score less the lse, and dq and dk sum products of what is left of
    # dout v^T less its own mean. Both are sums themselves, of terms that may cancel.
    score, dp = (
        torch.einsum("qhd,khd->hqk", a.double().abs(), b.double().abs().repeat_interleave(heads // kv_heads, 1)).max()
        for a, b in ((q * options["scale"], k), (dout, v))
    )
    score = score.clamp(min=1.0)
    sizes = [exact[0].abs().max() * score, *(dp * x.double().abs().max() * options["scale"] * score for x in (k, q))]
    sizes.append(exact[3].abs().max() * score)
    for name, a, b, c, size in zip(("out", "dq", "dk", "dv"), ours, eager, exact, sizes, strict=True):
        assert torch.isfinite(a).all(), name
        err, base = ((x.double() - c).abs().max().item() for x in (a, b))
        assert err <= 2 * base + torch.finfo(dtype).eps * size.item(), f"{name}: {err:.2e} against {base:.2e}"
    return ours


@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_dense_mask(shape):
    check(SHAPES[shape], 2, 1, 16)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 80), (3, 3, 96), (4, 1, 33), (2, 2, 256)])
def test_head_widths_and_groups(heads, kv_heads, width):
    check([(0, 20), (1, 9), (1, 8)], heads, kv_heads, width)


def test_half_precision():
    check(DEEP, 2, 1, 64, torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 200])
def test_sizes_of_a_gpu(dtype, width, window):
    check([(0, 700), (1, 90), (2, 130), (2, 70), (1, 300), (0, 50), (1, 111)], 4, 2, width, dtype, window=window)


@pytest.mark.parametrize("window", [1, 7, 24, 1000])
def test_window_counts_on_the_path(window):
    """A branch's first token is next to its parent's last, however many tokens of siblings lie between in the pack."""
    check(DEEP, 2, 1, 16, window=window)


def test_softcap():
    check(DEEP, 2, 1, 16, softcap=1.5)


@pytest.mark.parametrize("layout", ["heads first", "width strided"])
def test_layouts(layout):
    check([(0, 20), (1, 9), (1, 8)], 2, 1, 16, layout=layout)


def test_repeatable_and_written_in_full(monkeypatch):
    """Outputs start as NaN; two runs agree bit for bit."""
    first = check(DEEP, 4, 2, 16)
    plain = torch.empty

    def poisoned(*size, **options):
        x = plain(*size, **options)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    second = check(DEEP, 4, 2, 16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sequence_does_not_depend_on_the_rest_of_the_pack():
    """NaN in a branch stays in the branch."""
    end, _ = tree([(0, 20), (1, 9), (1, 8)])
    q, k, v = (torch.randn(37, 2, 16, device=DEVICE) for _ in range(3))
    before = tree_attention(q, k, v, end, scale=0.25)
    k[20:29] = math.nan
    after = tree_attention(q, k, v, end, scale=0.25)
    assert torch.equal(before[:20], after[:20])
    assert after[20:29].isnan().all()
    clean = tree_attention(q, k.nan_to_num(0.0), v, end, scale=0.25)
    assert torch.equal(clean[29:], before[29:])


def test_blocks_that_cannot_meet_are_skipped():
    """Exactly the pairs of blocks that hold a visible pair, up to what a block's extremes can tell."""
    end, positions = tree([(0, 16), *[(1, 16)] * 8])
    tokens = end.shape[0]
    at = torch.arange(tokens, device=DEVICE)
    for window in (None, 5):
        mask = (at[None] <= at[:, None]) & (at[:, None] < end[None])
        if window is not None:
            mask &= positions[:, None] - positions[None] < window
        blocks = torch.nn.functional.pad(mask, (0, -tokens % 8, 0, -tokens % 8))
        needed = blocks.view(blocks.shape[0] // 8, 8, -1, 8).amax((1, 3))
        kept = meeting_blocks(end, positions, window, 8, 8)
        assert (kept >= needed).all()
        if window is None:
            assert torch.equal(kept, needed)
            assert kept.sum() < 0.35 * (kept.shape[0] * (kept.shape[0] + 1) / 2)
        else:
            assert kept.sum() <= 1.5 * needed.sum()


def test_lists_of_blocks_are_shared_by_layers_and_end_with_their_pack():
    end, positions = tree(DEEP)
    q, k, v = (torch.randn(end.shape[0], 2, 16, device=DEVICE) for _ in range(3))
    pack = kernels.Pack(end, positions)
    first = tree_attention(q, k, v, pack, scale=0.25)
    lists = dict(pack._lists)
    torch.testing.assert_close(tree_attention(q, k, v, pack, scale=0.25), first, rtol=0, atol=0)
    assert len(lists) == 1
    assert all(pack._lists[key] is x for key, x in lists.items())
    torch.testing.assert_close(first, dense(q, k, v, end, 0.25))
    alive = weakref.ref(end)
    del end, positions, pack, lists
    gc.collect()
    assert alive() is None, "nothing may keep a pack that its caller dropped"


def test_no_tokens():
    q, k, v = (torch.zeros(0, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    out = tree_attention(q, k, v, torch.zeros(0, dtype=torch.int32, device=DEVICE), scale=1.0)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 16)


def test_mistakes_are_named(monkeypatch):
    end, positions = tree([(0, 8)])
    q, k, v = (torch.randn(8, 4, 16, device=DEVICE) for _ in range(3))
    for message, arguments, options in (
        ("query must be", (q[0], k, v, end), {}),
        ("query must be", (q.double(), k, v, end), {}),
        ("query must be", (*torch.zeros(3, 8, 1, 300, device=DEVICE), end), {}),
        ("key must be", (q, k[:, :3], v[:, :3], end), {}),
        ("value must be", (q, k[:, :2], v, end), {}),
        ("key must be torch.float32", (q, k.half(), v, end), {}),
        ("subtree_end must be", (q, k, v, end[:-1]), {}),
        ("subtree_end must be", (q, k, v, end.float()), {}),
        ("window must be", (q, k, v, end), {"window": 4}),
        ("window must be", (q, k, v, end), {"window": 0, "positions": positions}),
        ("softcap must be", (q, k, v, end), {"softcap": -1.0}),
    ):
        with pytest.raises(ValueError, match=message):
            tree_attention(*arguments, scale=1.0, **options)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        with pytest.raises(ValueError, match="CUDA device"):
            tree_attention(q, k, v, end, scale=1.0)


def test_second_derivatives_are_refused():
    end, _ = tree([(0, 8)])
    q, k, v = (torch.randn(8, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(tree_attention(q, k, v, end, scale=1.0).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
