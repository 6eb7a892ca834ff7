"""Divergences from hidden states in which no logit is ever stored: projections and statistics in one kernel.

    z_s = student_hidden[student_row] @ head_s.T,  z_t = teacher_hidden[teacher_row] @ head_t.T, a tile at a time

_stream_kernel projects a block of rows onto a slice of the vocabulary, both sides from the same tile of the head where
they share it, and in the epilogue of each tile

    STATS    merges the tile into the row's 10 running sums              -> one set a slice, merged by _finish_kernel
    SECOND   adds the two sums of JSD and clipped entries                -> merged by _second_finish_kernel
    GRAD     turns the tile into dlogits and stores it in a workspace    -> dhidden += workspace @ head, by the BLAS

Backward thus recomputes the logits of the rows that need it, a slab of the vocabulary at a time: 5 products in all with
a frozen shared head against the floor of 3, for a memory of (rows, slab) instead of (rows, V).

Shapes:  hidden (N, D) and (M, D_t), heads (V, D) and (V, D_t), fp32, fp16 or bf16, width contiguous; formulas in
         entries.py, statistics and state as in divergence.py.
Traffic: every block of rows reads the head once; programs that run together read the same slice, so it stays in L2.
Error:   products accumulate in fp32 (fp32 operands are multiplied exactly, not in TF32); sums merge in a fixed order
         without atomics: repeatable bit for bit, and a row's numbers depend on neither R nor its neighbours.
Source:  the fusion is that of Cut Cross-Entropy (arXiv:2411.09009), without its gradient filter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vigos.kernels.divergence import FUSION, Options
from vigos.kernels.entries import (
    GAP,
    INF,
    INTERPRETED,
    JSD,
    LABEL_S,
    LABEL_T,
    MAX_S,
    MAX_T,
    MOMENT_S,
    MOMENT_T,
    N_PARTIAL,
    PIVOT,
    REVERSE,
    SUM_S,
    SUM_T,
    bregman,
    difference,
    lift,
    merge_gap,
    merge_side,
    mixture_logs,
    probabilities,
    transform_pair,
)


@dataclass(frozen=True)
class Launch:
    """Rows, vocabulary entries and width a tile; tiles a slice; warps and pipeline stages."""

    block_m: int
    block_v: int
    block_d: int
    tiles: int
    num_warps: int
    num_stages: int


# By bytes an element and whether the tile is smaller: with a heavy epilogue (softcap, entry clip), two heads, or on
# a chip without wgmma, where the full one spills 190 bytes a thread. 64 rows of each side share a tile of 128 entries,
# the reuse of a 128 x 128 product; both accumulators take 64 registers a thread and leave room for the epilogue. Slices
# have 4,096 entries: 38 of them at 152k fill 132 SMs from 256 rows on. fp32 multiplies exactly on the ordinary cores
# and serves checks.
LAUNCH = {
    (2, False): Launch(64, 128, 64, 32, 8, 3), (2, True): Launch(64, 32, 64, 64, 8, 3),
    (4, False): Launch(32, 64, 32, 64, 8, 1), (4, True): Launch(32, 64, 32, 64, 8, 1),
}  # fmt: skip
FULL_TILE_FROM = 9  # major compute capability
STATS, SECOND, GRAD = (tl.constexpr(i) for i in range(3))


@triton.jit
def _join_side(top, total, moment, more_top, more_total, more_moment):
    """Two disjoint parts of one side's sums become one."""
    highest = tl.maximum(top, more_top)
    f, g = lift(top, highest), lift(more_top, highest)
    down, more_down = tl.where(f == 0.0, 0.0, top - highest), tl.where(g == 0.0, 0.0, more_top - highest)
    moment = tl.where(f == 0.0, 0.0, f * (moment + total * down))
    moment += tl.where(g == 0.0, 0.0, g * (more_moment + more_total * more_down))
    return highest, total * f + more_total * g, moment


@triton.jit
def _join_gap(gap, pivot, top, total, more_gap, more_pivot, more_top, more_total):
    """The same for the gap; the pivot is that of the part with the higher maximum."""
    highest = tl.maximum(top, more_top)
    f, g = lift(top, highest), lift(more_top, highest)
    common = tl.where(more_top > top, more_pivot, pivot)
    joined = tl.where(f == 0.0, 0.0, f * (gap + total * (pivot - common)))
    joined += tl.where(g == 0.0, 0.0, g * (more_gap + more_total * (more_pivot - common)))
    return joined, common


@triton.jit
def _terms(p_s, p_t, delta, reverse, jsd, some_jsd, beta):
    """`term` and the unclipped `clipped_slope` of entries.py for a tile whose rows differ in kind."""
    of_reverse = tl.where(p_s == 0.0, 0.0, -p_s * delta)
    value = tl.where(reverse, of_reverse, tl.where(p_t == 0.0, 0.0, p_t * delta))
    slope = tl.where(reverse, of_reverse, difference(p_s, p_t, delta))
    if some_jsd:
        log_s, log_t = mixture_logs(delta, beta)
        of_jsd = tl.where(p_s == 0.0, 0.0, (1.0 - beta) * p_s * log_s)
        slope = tl.where(jsd, of_jsd, slope)
        value = tl.where(jsd, of_jsd + tl.where(p_t == 0.0, 0.0, beta * p_t * log_t), value)
    return value, slope


@triton.jit
def _slope_outside(p_s, reverse, jsd):
    """What takes a slope's place where the entry is clipped."""
    return tl.where(jsd, 0.0, tl.where(reverse, -p_s, p_s))


@triton.jit
def _project(
    hidden_ptr, rows, stride_h, weight_ptr, offs_v, stride_w, D, V, live,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(rows, entries) fp32 logits of one side."""
    offs_d = tl.arange(0, BLOCK_D)
    h = hidden_ptr + rows[:, None] * stride_h + offs_d[None, :]
    w = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
    acc = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (d + offs_d < D)[None, :]
        a = tl.load(h + d, mask=live[:, None] & inside, other=0.0)
        b = tl.load(w + d, mask=(offs_v < V)[:, None] & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def _project_both(
    s_ptr, rows_s, stride_s, t_ptr, rows_t, stride_t, weight_ptr, offs_v, stride_w, D, V, live,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Both sides' logits from one reading of the head they share; DIFFERENCE: the student's less the teacher's."""
    offs_d = tl.arange(0, BLOCK_D)
    s = s_ptr + rows_s[:, None] * stride_s + offs_d[None, :]
    t = t_ptr + rows_t[:, None] * stride_t + offs_d[None, :]
    w = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_w + offs_d[None, :]
    acc_s = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    acc_t = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (d + offs_d < D)[None, :]
        a = tl.load(s + d, mask=live[:, None] & inside, other=0.0)
        c = tl.load(t + d, mask=live[:, None] & inside, other=0.0)
        b = tl.trans(tl.load(w + d, mask=(offs_v < V)[:, None] & inside, other=0.0))
        if DIFFERENCE:
            a = a - c
        acc_s = tl.dot(a, b, acc_s, input_precision="ieee")
        acc_t = tl.dot(c, b, acc_t, input_precision="ieee")
    return acc_s, acc_t


@triton.jit
def _stream_kernel(
    s_ptr, t_ptr, head_s_ptr, head_t_ptr, s_bias_ptr, t_bias_ptr, student_row_ptr, teacher_row_ptr, kind_ptr, label_ptr,
    order_ptr, state_ptr, row_grad_ptr, out_ptr,
    R, D, D_t, V, vocab, vocab_start, first_v, alpha, cap_in, cap_out, beta, entry_clip,
    stride_s, stride_t, stride_ws, stride_wt, stride_state, stride_oc, stride_om,
    MODE: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, CLIP_ENTRIES: tl.constexpr, DIFFERENCE: tl.constexpr,
):  # fmt: skip
    """Rows program_id(0), slice program_id(1): programs of one slice run together and share its part of the head.

    STATS, SECOND: out is (10 or 2, R, slices). GRAD: rows are order[i] for i < R, out is the workspace (R, slab).
    """
    split = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = offs_m < R
    r = offs_m.to(tl.int64)
    if MODE == GRAD:
        r = tl.load(order_ptr + offs_m, mask=live, other=0).to(tl.int64)
    rows_s = tl.load(student_row_ptr + r, mask=live, other=0).to(tl.int64)
    rows_t = tl.load(teacher_row_ptr + r, mask=live, other=0).to(tl.int64)
    kind = tl.load(kind_ptr + r, mask=live, other=0).to(tl.int32)
    reverse, jsd = (kind == REVERSE)[:, None], (kind == JSD)[:, None]
    some_jsd = tl.max(kind, 0) == JSD
    # What the modes carry from tile to tile; the compiler drops what a mode does not use.
    top_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    top_t = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total_s = tl.full((BLOCK_M,), 0.0, tl.float32)
    total_t = tl.full((BLOCK_M,), 0.0, tl.float32)
    moment_s = tl.full((BLOCK_M,), 0.0, tl.float32)
    moment_t = tl.full((BLOCK_M,), 0.0, tl.float32)
    gap = tl.full((BLOCK_M,), 0.0, tl.float32)
    pivot = tl.full((BLOCK_M,), 0.0, tl.float32)
    label_s = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    label_t = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    divergence = tl.full((BLOCK_M,), 0.0, tl.float32)
    mean = tl.full((BLOCK_M,), 0.0, tl.float32)
    if MODE != STATS:
        state = state_ptr + r * stride_state
        origin_s = tl.load(state, mask=live, other=0.0)[:, None]
        origin_t = tl.load(state + 1, mask=live, other=0.0)[:, None]
        scale_s = tl.load(state + 2, mask=live, other=0.0)[:, None]
        scale_t = tl.load(state + 3, mask=live, other=0.0)[:, None]
        lse_gap = tl.load(state + 4, mask=live, other=0.0)[:, None]
    begin = first_v + split * (TILES * BLOCK_V)
    needed = True
    if MODE == SECOND:
        needed = CLIP_ENTRIES | DIFFERENCE | some_jsd
    if needed:
        for start in range(begin, tl.minimum(begin + TILES * BLOCK_V, V), BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            if head_t_ptr is None:
                raw_s, raw_t = _project_both(
                    s_ptr, rows_s, stride_s, t_ptr, rows_t, stride_t, head_s_ptr, offs_v, stride_ws, D, V, live,
                    BLOCK_M, BLOCK_V, BLOCK_D, DIFFERENCE,
                )  # fmt: skip
            else:
                raw_s = _project(
                    s_ptr, rows_s, stride_s, head_s_ptr, offs_v, stride_ws, D, V, live, BLOCK_M, BLOCK_V, BLOCK_D
                )
                raw_t = _project(
                    t_ptr, rows_t, stride_t, head_t_ptr, offs_v, stride_wt, D_t, V, live, BLOCK_M, BLOCK_V, BLOCK_D
                )
            b_s = 0.0
            b_t = 0.0
            if s_bias_ptr is not None:
                b_s = tl.load(s_bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
            if t_bias_ptr is not None:
                b_t = tl.load(t_bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
            real = (offs_v < vocab)[None, :]
            z_s, z_t, apart, chain = transform_pair(raw_s, raw_t, b_s, b_t, alpha, cap_in, cap_out, SOFTCAP, DIFFERENCE)
            apart = tl.where(real, apart, 0.0)
            z_s = tl.where(real, z_s, -float("inf"))
            z_t = tl.where(real, z_t, -float("inf"))
            if MODE == STATS:
                one = tl.full((BLOCK_M, BLOCK_V), 1.0, tl.float32)
                nothing = tl.full((BLOCK_M, BLOCK_V), 0.0, tl.float32)
                x = tl.where(reverse, apart, -apart)
                finite = tl.abs(x) < INF
                more_gap, more_pivot = merge_gap(
                    tl.where(finite, 0.0, x), tl.where(finite, x, 0.0), tl.where(reverse, z_s, z_t), one, 1
                )
                more_top_s, more_total_s, more_moment_s = merge_side(z_s, one, nothing, 1)
                more_top_t, more_total_t, more_moment_t = merge_side(z_t, one, nothing, 1)
                of_student = kind == REVERSE
                gap, pivot = _join_gap(
                    gap, pivot, tl.where(of_student, top_s, top_t), tl.where(of_student, total_s, total_t),
                    more_gap, more_pivot, tl.where(of_student, more_top_s, more_top_t),
                    tl.where(of_student, more_total_s, more_total_t),
                )  # fmt: skip
                top_s, total_s, moment_s = _join_side(top_s, total_s, moment_s, more_top_s, more_total_s, more_moment_s)
                top_t, total_t, moment_t = _join_side(top_t, total_t, moment_t, more_top_t, more_total_t, more_moment_t)
                if label_ptr is not None:
                    label = tl.load(label_ptr + r, mask=live, other=-1) - vocab_start
                    here = label[:, None] == offs_v[None, :]
                    label_s = tl.maximum(label_s, tl.max(tl.where(here, z_s, -float("inf")), 1))
                    label_t = tl.maximum(label_t, tl.max(tl.where(here, z_t, -float("inf")), 1))
            else:
                p_s, p_t, delta = probabilities(z_s, z_t, apart, origin_s, origin_t, scale_s, scale_t, lse_gap)
                if MODE == SECOND:
                    value, slope = _terms(p_s, p_t, delta, reverse, jsd, some_jsd, beta)
                    if CLIP_ENTRIES:
                        slope = tl.where(value > entry_clip, _slope_outside(p_s, reverse, jsd), slope)
                        value = tl.where(value > entry_clip, entry_clip, value)
                    else:
                        p, other = tl.where(reverse, p_s, p_t), tl.where(reverse, p_t, p_s)
                        value = tl.where(jsd, value, bregman(p, other, tl.where(reverse, -delta, delta)))
                    divergence += tl.sum(value, 1)
                    mean += tl.sum(slope, 1)
                else:
                    mean_slope = tl.load(state + 7, mask=live, other=0.0)[:, None]
                    if CLIP_ENTRIES:
                        value, slope = _terms(p_s, p_t, delta, reverse, jsd, some_jsd, beta)
                        g = tl.where(value > entry_clip, _slope_outside(p_s, reverse, jsd), slope) - p_s * mean_slope
                    else:
                        moved = tl.load(state + 5, mask=live, other=0.0)[:, None]
                        mean_gap = tl.load(state + 6, mask=live, other=0.0)[:, None]
                        of_reverse = tl.where(p_s == 0.0, 0.0, p_s * ((apart - moved) - mean_gap))
                        g = tl.where(reverse, of_reverse, difference(p_s, p_t, delta) - p_s * mean_slope)
                        if some_jsd:
                            _value, slope = _terms(p_s, p_t, delta, reverse, jsd, some_jsd, beta)
                            g = tl.where(jsd, slope - p_s * mean_slope, g)
                    row_grad = tl.load(row_grad_ptr + r, mask=live, other=0.0)[:, None]
                    g = tl.where(real & (row_grad != 0.0), g * chain * row_grad, 0.0)
                    to = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + (offs_v - first_v)[None, :]
                    tl.store(to, g.to(out_ptr.dtype.element_ty), mask=live[:, None] & (offs_v < V)[None, :])
    if MODE != GRAD:
        out = out_ptr + r * tl.num_programs(1) + split
        if MODE == STATS:
            tl.store(out + MAX_S * stride_oc, top_s, mask=live)
            tl.store(out + SUM_S * stride_oc, total_s, mask=live)
            tl.store(out + MOMENT_S * stride_oc, moment_s, mask=live)
            tl.store(out + MAX_T * stride_oc, top_t, mask=live)
            tl.store(out + SUM_T * stride_oc, total_t, mask=live)
            tl.store(out + MOMENT_T * stride_oc, moment_t, mask=live)
            tl.store(out + GAP * stride_oc, gap, mask=live)
            tl.store(out + PIVOT * stride_oc, pivot, mask=live)
            if label_ptr is not None:
                tl.store(out + LABEL_S * stride_oc, label_s, mask=live)
                tl.store(out + LABEL_T * stride_oc, label_t, mask=live)
        else:
            tl.store(out, divergence, mask=live)
            tl.store(out + stride_oc, mean, mask=live)


@dataclass(frozen=True)
class Operands:
    """Hidden states and heads, width contiguous; teacher_head None: the student's serves both."""

    student: Tensor  # (N, D)
    teacher: Tensor  # (M, D_t)
    head: Tensor  # (V, D)
    teacher_head: Tensor | None  # (V, D_t)
    bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None  # (V,)
    launch: Launch


def operands(
    student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor | None, bias: Tensor | None,
    teacher_bias: Tensor | None, options: Options,
) -> Operands:  # fmt: skip
    """The tensors as the kernel takes them; copies where the width is not contiguous."""

    def ready(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if INTERPRETED:
            x = x.float()  # the interpreter multiplies bf16 as the integers it stores them in
        return x if x.stride(-1) == 1 else x.contiguous()

    heavy = teacher_head is not None or options.softcap is not None or options.entry_clip is not None
    if student.is_cuda:
        heavy = heavy or torch.cuda.get_device_capability(student.device)[0] < FULL_TILE_FROM
    widest = max(student.element_size(), teacher.element_size())
    tensors = [ready(x) for x in (student, teacher, head, teacher_head, bias, teacher_bias)]
    return Operands(*tensors, LAUNCH[widest, heavy])  # type: ignore[arg-type]


def slices(vocab: int, launch: Launch) -> int:
    """How many programs share a row block over so many real entries."""
    return max(1, triton.cdiv(vocab, launch.tiles * launch.block_v))


def _run(
    x: Operands, options: Options, mode: int, grid_v: int, tiles: int, out: Tensor, stride_oc: int, stride_om: int, *,
    n: int, end: int, first_v: int = 0, state: Tensor | None = None, order: Tensor | None = None,
    row_grad: Tensor | None = None,
) -> None:  # fmt: skip
    launch, other = x.launch, x.teacher_head
    _stream_kernel[(triton.cdiv(n, launch.block_m), grid_v)](
        x.student, x.teacher, x.head, other, x.bias, x.teacher_bias, options.student_row, options.teacher_row,
        options.kind, options.labels if mode == STATS.value else None, order, state, row_grad, out,
        n, x.student.shape[1], x.teacher.shape[1], end, options.vocab, options.vocab_start, first_v, *options.scalars,
        options.beta, options.clip_of_entries, x.student.stride(0), x.teacher.stride(0), x.head.stride(0),
        0 if other is None else other.stride(0), 0 if state is None else state.stride(0), stride_oc, stride_om,
        MODE=mode, TILES=tiles, BLOCK_M=launch.block_m, BLOCK_V=launch.block_v, BLOCK_D=launch.block_d,
        SOFTCAP=options.softcap is not None, CLIP_ENTRIES=options.entry_clip is not None,
        DIFFERENCE=options.difference,
        num_warps=launch.num_warps, num_stages=launch.num_stages, **FUSION,
    )  # fmt: skip


def stream_partials(x: Operands, options: Options, state: Tensor | None = None) -> Tensor:
    """(10, R, S) partial statistics; with the rows' state the (2, R, S) sums of the second sweep."""
    n, splits = options.n_rows, slices(options.vocab, x.launch)
    columns = N_PARTIAL if state is None else 2
    out = torch.empty(columns, n, splits, dtype=torch.float32, device=x.student.device)
    if n > 0:
        mode = STATS if state is None else SECOND
        _run(
            x, options, mode.value, splits, x.launch.tiles, out, out.stride(0), 0, n=n, end=x.head.shape[0], state=state
        )
    return out


def stream_grad(
    x: Operands, options: Options, state: Tensor, row_grad: Tensor, order: Tensor, first_v: int, end: int, out: Tensor
) -> None:
    """out[i, v - first_v] = row_grad[r] * d divergence[r] / d raw student logit v; r = order[i], first_v <= v < end."""
    n = order.shape[0]
    if n > 0:
        _run(
            x, options, GRAD.value, triton.cdiv(end - first_v, x.launch.block_v), 1, out, 0, out.stride(0), n=n,
            end=end, first_v=first_v, state=state, order=order, row_grad=row_grad,
        )  # fmt: skip
