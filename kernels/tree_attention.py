"""Attention over a packed prefix tree, flash style: no score is stored, forward or backward.

    s[q, k] = scale * query[q] . key[k], then cap * tanh(s / cap) with a softcap
    visible = k <= q and q < subtree_end[k]                 (tokens in depth-first order)
              and position[q] - position[k] < window        with a sliding window
    out[q]  = sum_k softmax(s[q])[k] value[k]               lse[q] = log sum_k exp s[q, k]

    dv = p^T dout;  ds = p * (dout v^T - sum_d dout out);  dq = scale ds k;  dk = scale ds^T q

Shapes:  query (T, Hq, Dh), key and value (T, Hkv, Dh), Hkv divides Hq; fp32, fp16 or bf16; subtree_end (T,) int.
         Dh up to 256; a width that is no power of two is padded inside the kernel.
Work:    only blocks of keys that some query of a block can see: per block of keys the largest subtree_end (and for a
         window the positions' extremes) decides. The lists are made once a pack and shared by its layers.
Traffic: forward reads K and V once a block of queries; backward recomputes the scores twice, once for dq and once for
         dk and dv. No atomics: every output element has one writer, and results repeat bit for bit.
Source:  Dao 2023 (arXiv:2307.08691) for the scheme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vigos.kernels.numerics import INTERPRETED, tanh_and_slope


@dataclass(frozen=True)
class Launch:
    """Queries and keys a block, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (padded head width, bytes an element). Chosen from what compiles without spills and within 163 KiB of shared memory
# on sm_80 (tests/test_triton_aot.py); fp32 multiplies exactly, not in TF32, and is for checking rather than for speed.
FORWARD = {
    (16, 2): Launch(128, 64, 4, 3), (32, 2): Launch(128, 64, 4, 3), (64, 2): Launch(128, 64, 4, 3),
    (128, 2): Launch(128, 64, 8, 2), (256, 2): Launch(64, 32, 4, 2),
    (16, 4): Launch(32, 32, 4, 1), (32, 4): Launch(32, 32, 4, 1), (64, 4): Launch(32, 32, 4, 1),
    (128, 4): Launch(16, 32, 8, 1), (256, 4): Launch(16, 16, 8, 1),
}  # fmt: skip
BACKWARD_Q = {
    (16, 2): Launch(64, 64, 4, 2), (32, 2): Launch(64, 64, 4, 2), (64, 2): Launch(64, 64, 4, 2),
    (128, 2): Launch(64, 64, 8, 2), (256, 2): Launch(32, 32, 8, 1),
    (16, 4): Launch(32, 32, 4, 1), (32, 4): Launch(32, 32, 4, 1), (64, 4): Launch(32, 32, 4, 1),
    (128, 4): Launch(16, 32, 8, 1), (256, 4): Launch(16, 16, 8, 1),
}  # fmt: skip
BACKWARD_KV = {
    (16, 2): Launch(64, 64, 4, 2), (32, 2): Launch(64, 64, 4, 2), (64, 2): Launch(64, 64, 4, 2),
    (128, 2): Launch(32, 64, 8, 2), (256, 2): Launch(32, 64, 8, 1),
    (16, 4): Launch(32, 32, 4, 1), (32, 4): Launch(32, 32, 4, 1), (64, 4): Launch(32, 32, 4, 1),
    (128, 4): Launch(16, 32, 8, 1), (256, 4): Launch(16, 16, 8, 1),
}  # fmt: skip
MAX_HEAD = 256
LOG2E = tl.constexpr(1.4426950408889634)
FUSION = {"enable_fp_fusion": True}  # part of the promise of repeatable bits; Triton 3.10 changes its default


@triton.jit
def _rows(base, offs_t, offs_d, stride_t, T, DH):
    """Load a block (rows, padded width) of one head; zeros past T and DH."""
    ptrs = base + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]  # token * stride passes 2**31
    return tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_d < DH)[None, :], other=0.0)


@triton.jit
def _visible(offs_q, offs_k, end_ptr, position_ptr, T, window):
    """Return which queries see which keys, (queries, keys) bool."""
    end = tl.load(end_ptr + offs_k, mask=offs_k < T, other=0)
    seen = (offs_k[None, :] <= offs_q[:, None]) & (offs_q[:, None] < end[None, :]) & (offs_q < T)[:, None]
    if position_ptr is not None:
        position_q = tl.load(position_ptr + offs_q, mask=offs_q < T, other=0)
        position_k = tl.load(position_ptr + offs_k, mask=offs_k < T, other=0)
        seen = seen & (position_q[:, None] - position_k[None, :] < window)
    return seen


@triton.jit
def _capped(dots, scale, cap, SOFTCAP: tl.constexpr):
    """Return (score in units of log 2, d score / d (scale * dot)) of raw products."""
    if SOFTCAP:
        y, slope = tanh_and_slope(dots * (scale / cap))
        return y * (cap * LOG2E), slope
    else:
        return dots * (scale * LOG2E), 1.0


@triton.jit
def _tree_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, end_ptr, position_ptr, list_ptr, count_ptr,
    T, DH, group, window, scale, cap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_list,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // group
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, PAD_D)
    q = _rows(q_ptr + head * stride_qh, offs_m, offs_d, stride_qt, T, DH)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    acc = tl.full((BLOCK_M, PAD_D), 0.0, tl.float32)
    for i in range(0, tl.load(count_ptr + block)):
        offs_n = tl.load(list_ptr + block * stride_list + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr + kv_head * stride_kh, offs_n, offs_d, stride_kt, T, DH)
        v = _rows(v_ptr + kv_head * stride_vh, offs_n, offs_d, stride_vt, T, DH)
        score, _ = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, cap, SOFTCAP)
        score = tl.where(_visible(offs_m, offs_n, end_ptr, position_ptr, T, window), score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        origin = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is NaN
        p = tl.exp2(score - origin[:, None])
        rescale = tl.exp2(top - origin)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = higher
    total = tl.where(total == 0.0, 1.0, total)  # rows past T
    out = out_ptr + head * stride_oh + offs_m.to(tl.int64)[:, None] * stride_ot + offs_d[None, :]
    mask = (offs_m < T)[:, None] & (offs_d < DH)[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head.to(tl.int64) * T + offs_m, top + tl.log2(total), mask=offs_m < T)  # in units of log 2


@triton.jit
def _tree_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, end_ptr, position_ptr, list_ptr, count_ptr,
    T, DH, group, window, scale, cap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_gt, stride_gh,
    stride_list,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // group
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, PAD_D)
    q = _rows(q_ptr + head * stride_qh, offs_m, offs_d, stride_qt, T, DH)
    dout = _rows(dout_ptr + head * stride_oh, offs_m, offs_d, stride_ot, T, DH)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + offs_m, mask=offs_m < T, other=0.0)
    delta = tl.load(delta_ptr + head.to(tl.int64) * T + offs_m, mask=offs_m < T, other=0.0)
    acc = tl.full((BLOCK_M, PAD_D), 0.0, tl.float32)
    for i in range(0, tl.load(count_ptr + block)):
        offs_n = tl.load(list_ptr + block * stride_list + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr + kv_head * stride_kh, offs_n, offs_d, stride_kt, T, DH)
        v = _rows(v_ptr + kv_head * stride_vh, offs_n, offs_d, stride_vt, T, DH)
        score, slope = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, cap, SOFTCAP)
        seen = _visible(offs_m, offs_n, end_ptr, position_ptr, T, window)
        p = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    dq = dq_ptr + head * stride_gh + offs_m.to(tl.int64)[:, None] * stride_gt + offs_d[None, :]
    mask = (offs_m < T)[:, None] & (offs_d < DH)[None, :]
    tl.store(dq, (acc * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tree_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, end_ptr, position_ptr, list_ptr, count_ptr,
    T, DH, group, window, scale, cap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_gt, stride_gh,
    stride_list,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Sum dk and dv of one block of one key head over the query heads that share it: one writer, fixed order."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, PAD_D)
    k = _rows(k_ptr + kv_head * stride_kh, offs_n, offs_d, stride_kt, T, DH)
    v = _rows(v_ptr + kv_head * stride_vh, offs_n, offs_d, stride_vt, T, DH)
    dk = tl.full((BLOCK_N, PAD_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, PAD_D), 0.0, tl.float32)
    blocks = tl.load(count_ptr + block)
    for j in range(0, blocks * group):
        head = kv_head * group + j // blocks
        offs_m = tl.load(list_ptr + block * stride_list + j % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        q = _rows(q_ptr + head * stride_qh, offs_m, offs_d, stride_qt, T, DH)
        dout = _rows(dout_ptr + head * stride_oh, offs_m, offs_d, stride_ot, T, DH)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + offs_m, mask=offs_m < T, other=0.0)
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + offs_m, mask=offs_m < T, other=0.0)
        score, slope = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, cap, SOFTCAP)
        seen = _visible(offs_m, offs_n, end_ptr, position_ptr, T, window)
        p = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
        dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    offsets = offs_n.to(tl.int64)[:, None] * stride_gt + kv_head * stride_gh + offs_d[None, :]
    mask = (offs_n < T)[:, None] & (offs_d < DH)[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Lists:
    """Blocks that meet: for each block of rows the blocks of the other side, ascending, and how many."""

    index: Tensor  # (blocks, blocks of the other side) int32
    count: Tensor  # (blocks,) int32


def _extremes(x: Tensor, block: int, largest: bool) -> Tensor:
    """Return the largest or smallest element of each block: (T,) -> (blocks,)."""
    empty = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
    padded = torch.nn.functional.pad(x, (0, -x.shape[0] % block), value=empty).view(-1, block)
    return padded.amax(1) if largest else padded.amin(1)


def meeting_blocks(
    subtree_end: Tensor, positions: Tensor | None, window: int | None, block_m: int, block_n: int
) -> Tensor:
    """Return, (query blocks, key blocks) bool, whether any query of the one may see any key of the other."""
    tokens, device = subtree_end.shape[0], subtree_end.device
    first_q = torch.arange(0, tokens, block_m, device=device)
    first_k = torch.arange(0, tokens, block_n, device=device)
    last_q = (first_q + block_m).clamp(max=tokens) - 1
    meet = (first_k[None] <= last_q[:, None]) & (_extremes(subtree_end, block_n, True)[None] > first_q[:, None])
    if window is not None:
        assert positions is not None
        nearest = _extremes(positions, block_m, False)[:, None] - _extremes(positions, block_n, True)[None]
        meet &= nearest < window
    return meet


def _lists(meet: Tensor) -> Lists:
    absent = (~meet).to(torch.int8).contiguous()
    return Lists(torch.argsort(absent, dim=1, stable=True).to(torch.int32), meet.sum(1, dtype=torch.int32))


class Pack:
    """The mask of a pack of sequences and its block lists, which are made on first use; one for all layers.

    subtree_end, positions: as in `tree_attention`.
    """

    def __init__(self, subtree_end: Tensor, positions: Tensor | None) -> None:
        for name, x in (("subtree_end", subtree_end), ("positions", positions)):
            if x is not None and (x.dim() != 1 or x.dtype not in (torch.int32, torch.int64)):
                raise ValueError(f"{name} must be int32 or int64 (T,), got {tuple(x.shape)} {x.dtype}")
        self.end = subtree_end.to(torch.int32).contiguous()
        self.positions = None if positions is None else positions.to(torch.int32).contiguous()
        self._lists: dict[Any, Lists] = {}

    def lists(self, window: int | None, launch: Launch, *, of_keys: bool = False) -> Lists:
        """Return the key blocks of each query block, or with `of_keys` the query blocks of each key block."""
        key = (window, launch.block_m, launch.block_n, of_keys)
        if key not in self._lists:
            meet = meeting_blocks(self.end, self.positions, window, launch.block_m, launch.block_n)
            self._lists[key] = _lists(meet.T if of_keys else meet)
        return self._lists[key]


def _launch(table: dict[tuple[int, int], Launch], query: Tensor) -> tuple[Launch, dict[str, Any]]:
    width = max(16, triton.next_power_of_2(query.shape[2]))
    launch = table[width, query.element_size()]
    options = {
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "PAD_D": width, "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }  # fmt: skip
    return launch, options | FUSION


def tree_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return (out (T, Hq, Dh), lse (Hq, T) fp32 in units of log 2). Arguments were checked in `tree_attention`."""
    tokens, heads, width = query.shape
    out = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    if tokens > 0:
        launch, options = _launch(FORWARD, query)
        lists = pack.lists(window, launch)
        _tree_fwd_kernel[(triton.cdiv(tokens, launch.block_m), heads)](
            query, key, value, out, lse, pack.end, None if window is None else pack.positions, lists.index, lists.count,
            tokens, width, heads // key.shape[1], window or 0, scale, softcap or 1.0,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *out.stride()[:2], lists.index.stride(0),
            SOFTCAP=softcap is not None, **options,
        )  # fmt: skip
    return out, lse


def tree_attention_bwd(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pack: Pack, scale: float,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dquery, dkey, dvalue)."""
    tokens, heads, width = query.shape
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    dk, dv = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
    if tokens > 0:
        delta = (dout.float() * out.float()).sum(-1).T.contiguous()  # (Hq, T)
        positions = None if window is None else pack.positions
        scalars = (tokens, width, heads // key.shape[1], window or 0, scale, softcap or 1.0)
        strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *dout.stride()[:2])
        launch, options = _launch(BACKWARD_Q, query)
        lists = pack.lists(window, launch)
        _tree_bwd_q_kernel[(triton.cdiv(tokens, launch.block_m), heads)](
            query, key, value, dout, lse, delta, dq, pack.end, positions, lists.index, lists.count, *scalars, *strides,
            *dq.stride()[:2], lists.index.stride(0), SOFTCAP=softcap is not None, **options,
        )  # fmt: skip
        launch, options = _launch(BACKWARD_KV, query)
        lists = pack.lists(window, launch, of_keys=True)
        _tree_bwd_kv_kernel[(triton.cdiv(tokens, launch.block_n), key.shape[1])](
            query, key, value, dout, lse, delta, dk, dv, pack.end, positions, lists.index, lists.count, *scalars,
            *strides, *dk.stride()[:2], lists.index.stride(0), SOFTCAP=softcap is not None, **options,
        )  # fmt: skip
    return dq, dk, dv


class TreeAttentionFunction(torch.autograd.Function):
    """Saves q, k, v, out and lse; the mask travels as the pack."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        with torch.cuda.device_of(query):  # Triton launches on the current device
            out, lse = tree_attention_fwd(query, key, value, pack, scale, window, softcap)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = (pack, scale, window, softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        with torch.cuda.device_of(query):
            grads = tree_attention_bwd(dout, query, key, value, out, lse, *ctx.options)
        return (*grads, None, None, None, None)


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor | Pack, *, scale: float, window: int | None = None,
    softcap: float | None = None, positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention in which a token sees itself and its ancestors; differentiable once in query, key and value.

        q, k = torch.arange(T)[:, None], torch.arange(T)
        mask = (k <= q) & (q < subtree_end)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)

    Args:
        query: (T, Hq, Dh). key, value: (T, Hkv, Dh), Hkv a divisor of Hq, Dh at most 256; fp32, fp16 or bf16.
        subtree_end: (T,) int, one past the last token that descends from each token; tokens in depth-first order.
            A `Pack` of it and of the positions, made once, shares the lists of blocks between layers.
        scale: factor of query · key.
        window: a query sees keys whose position is less than this many below its own; needs `positions`.
        softcap: c in c * tanh(score / c).
        positions: (T,) int, each token's place on its path from the root.

    Returns:
        (T, Hq, Dh) in the dtype of `query`.
    """
    pack = subtree_end if isinstance(subtree_end, Pack) else Pack(subtree_end, positions)
    _check(query, key, value, pack, window, softcap)
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    return TreeAttentionFunction.apply(query, key, value, pack, float(scale), window, softcap)


def _check(query: Tensor, key: Tensor, value: Tensor, pack: Pack, window: int | None, softcap: float | None) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if query.dim() != 3 or query.dtype not in dtypes or not 1 <= query.shape[2] <= MAX_HEAD:
        raise ValueError(
            f"query must be (T, heads, at most {MAX_HEAD}) in float32, float16 or bfloat16, got {tuple(query.shape)} "
            f"{query.dtype}"
        )
    tokens, heads, width = query.shape
    for name, x in (("key", key), ("value", value)):
        fits = x.dim() == 3 and x.shape[0] == tokens and x.shape[2] == width and x.shape[1] > 0
        if not fits or heads % x.shape[1] or x.shape != key.shape:
            raise ValueError(
                f"{name} must be ({tokens}, a divisor of {heads} heads, {width}) like query and the same for key and "
                f"value, got {tuple(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(f"{name} must be {query.dtype} on {query.device} like query, got {x.dtype} on {x.device}")
    for name, optional in (("subtree_end", pack.end), ("positions", pack.positions)):
        if optional is not None and optional.shape != (tokens,):
            raise ValueError(f"{name} must be ({tokens},), one for each token of query, got {tuple(optional.shape)}")
        if optional is not None and optional.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {optional.device}")
    if window is not None and (window < 1 or pack.positions is None):
        raise ValueError(
            f"window must be at least 1 and come with positions (distances in a pack are not distances on a path), got "
            f"window {window} and positions {'missing' if pack.positions is None else 'given'}"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if query.device.type != "cuda" and not (INTERPRETED and query.device.type == "cpu"):
        raise ValueError(f"query must be on a CUDA device, got {query.device} (TRITON_INTERPRET=1 runs on the CPU)")
