"""Divergence of each row of logits and its gradient, one sweep over the vocabulary for each.

    z = height * tanh(inner * (raw + bias)) with a softcap, else alpha * (raw + bias); each side has its own
    divergence[r] of z_s[student_row[r]] against z_t[teacher_row[r]], formulas and gradients in numerics.py
    dlogits[n] = sum over r with student_row[r] = n of row_grad[r] * d divergence[r] / d raw_s[n]

Kernels, in the order a caller launches them (R rows, S slices of the vocabulary):

    _stats_kernel          a row's slice -> 9 partial sums                        reads both logits
    _finish_kernel         slices merged -> statistics, state
    _second_stats_kernel   JSD, clipped entries, DIFFERENCE: three more sums     reads both logits, for those rows
    _second_finish_kernel  merged -> divergence, the last column of the state
    _grad_kernel           state -> gradient, in place if asked                  reads both logits, writes one

Shapes:  student (N, V), teacher (M, V) in fp32, bf16 or fp16, any strides; statistics and state fp32, nats.
Traffic: forward and backward read 2 R V elements each and write R V; JSD, clipped entries and DIFFERENCE 2 R V more.
Error:   L_s - L_t and exp to a few eps32 (ex2.approx); no sum in fewer bits than fp32, no atomics: bits repeat. A row's
         numbers depend on V alone, never on R or on its neighbours: the slices are fixed by V.
Source:  Milakov & Gimelshein 2018 (arXiv:1805.02867) for the running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vigos.kernels.numerics import (
    GAP,
    INV_SUM_S,
    INV_SUM_T,
    JSD,
    LABEL_S,
    LABEL_T,
    LN2,
    LOG2E,
    LOWEST,
    LSE_GAP,
    MAX_S,
    MAX_T,
    MEAN_GAP,
    MEAN_SLOPE,
    MOMENT_S,
    MOMENT_T,
    N_PARTIAL,
    ORIGIN_S,
    ORIGIN_T,
    PIVOT,
    REVERSE,
    SUM_S,
    SUM_T,
    merge_pair,
    observe_pair,
    probability,
    second_terms,
    slope_of,
    transform_pair,
)

# Contraction of multiply and add is part of the promise of repeatable bits; Triton 3.10 changes its default.
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """Block sizes of the row kernels, and the warps of a block.

    Fixed rather than tuned at run time: a first step must not stall, and a row must not change its rounding because a
    timing did.

    Attributes:
        stats_block: entries that a program of the first sweep takes at a time: 8 a thread, one maximum.
        second_block: of the second sweep, and of the gradient of rows that need it: they have more arithmetic an entry.
        grad_block: of a program of the gradient otherwise: 16 entries a thread share what is loaded for the row.
        span: entries that a program sweeps, a multiple of the blocks: 5 programs a row at 152k fill 132 SMs from 100
            rows on.
    """

    stats_block: int = 2048
    second_block: int = 1024
    grad_block: int = 4096
    span: int = 32768
    stats_warps: int = 8
    grad_warps: int = 8


LAUNCH = Launch()


@dataclass(frozen=True)
class Options:
    """Arguments of the row kernels besides the logits. Tensors are (R,)."""

    student_row: Tensor  # int64
    teacher_row: Tensor  # int64
    kind: Tensor  # int8
    labels: Tensor | None  # int64, global ids
    vocab: int  # entries here that are real: columns from here on have probability 0
    vocab_start: int  # global id of the first column
    student_transform: tuple[float, float, float]  # (alpha, inner, height) of numerics.transform; inner 0: no softcap
    teacher_transform: tuple[float, float, float]
    share: float  # of JSD: the smaller of beta and 1 - beta, negative where it is the student's
    entry_clip: float | None
    difference: bool = False  # a student row's logits are given less its teacher row's
    second: bool = True  # some rows may need the second sweep
    launch: Launch = LAUNCH

    @property
    def n_rows(self) -> int:
        """R."""
        return self.student_row.shape[0]

    @property
    def clip_of_entries(self) -> float:
        """Return the clip of each entry's term, inf without one."""
        return float("inf") if self.entry_clip is None else self.entry_clip

    @property
    def transforms(self) -> tuple[float, ...]:
        """Return both transforms as the kernels take them, the student's first."""
        return (*self.student_transform, *self.teacher_transform)

    @property
    def unit(self) -> float:
        """Return z / x of the entries x that kernels add up: of both sides scaled alike they are raw logits."""
        return self.student_transform[0] if self.constants["SCALED"] else 1.0

    @property
    def constants(self) -> dict[str, bool]:
        """Return what kernels are compiled for: which sides have a softcap; both scaled alike; a difference given."""
        softcaps = {"SOFTCAP_S": self.student_transform[1] > 0, "SOFTCAP_T": self.teacher_transform[1] > 0}
        scaled = self.student_transform == self.teacher_transform and not softcaps["SOFTCAP_S"]
        return softcaps | {"SCALED": scaled, "DIFFERENCE": self.difference}


@triton.jit
def _load_pair(
    s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, alpha_s, inner_s, height_s,
    alpha_t, inner_t, height_t, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, DIFFERENCE: tl.constexpr,
    SCALED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load (x_s, x_t, x_s - x_t, dz_s/draw) of a block of columns; WHOLE: all of them are real entries."""
    mask = None if WHOLE else offs < V
    other = None if WHOLE else 0.0
    wide = offs.to(tl.int64)
    s = tl.load(s_row + wide * stride_sv, mask=mask, other=other).to(tl.float32)
    t = tl.load(t_row + wide * stride_tv, mask=mask, other=other).to(tl.float32)
    raw_gap = s if DIFFERENCE else s - t
    if DIFFERENCE:
        s = t + s
    if s_bias_ptr is not None:
        b_s = tl.load(s_bias_ptr + offs, mask=mask, other=other).to(tl.float32)
        s += b_s
    if t_bias_ptr is not None:
        b_t = tl.load(t_bias_ptr + offs, mask=mask, other=other).to(tl.float32)
        t += b_t
    if s_bias_ptr is not None and t_bias_ptr is not None:
        raw_gap += b_s - b_t
    elif s_bias_ptr is not None:
        raw_gap += b_s
    elif t_bias_ptr is not None:
        raw_gap -= b_t
    x_s, x_t, gap, slope = transform_pair(
        s, t, raw_gap, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED
    )
    if not WHOLE:
        real = (
            offs < vocab
        )  # beside the mask: V is a multiple of 16 and keeps the loads wide, the real size need not be
        x_s = tl.where(real, x_s, -float("inf"))
        x_t = tl.where(real, x_t, -float("inf"))
        gap = tl.where(real, gap, 0.0)
    return x_s, x_t, gap, slope


@triton.jit
def _sweep(
    s_row, t_row, s_bias_ptr, t_bias_ptr, first, last, V, vocab, stride_sv, stride_tv, octaves, alpha_s, inner_s,
    height_s, alpha_t, inner_t, height_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr,
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
    REVERSE_ROW: tl.constexpr,
):  # fmt: skip
    """Add up the entries first..last of a row: 7 sums (LANES,)."""
    top_s = tl.full((LANES,), LOWEST, tl.float32)
    top_t = tl.full((LANES,), LOWEST, tl.float32)
    total_s = tl.full((LANES,), 0.0, tl.float32)
    total_t = tl.full((LANES,), 0.0, tl.float32)
    moment_s = tl.full((LANES,), 0.0, tl.float32)
    moment_t = tl.full((LANES,), 0.0, tl.float32)
    gap = tl.full((LANES,), 0.0, tl.float32)
    real = tl.maximum(tl.minimum(last, vocab) - first, 0)
    last_block = first + real // BLOCK_V * BLOCK_V
    shape: tl.constexpr = (BLOCK_V // (LANES * VEC), LANES, VEC)
    for start in range(first, last_block, BLOCK_V):
        x_s, x_t, x_gap, _ = _load_pair(
            s_row, t_row, s_bias_ptr, t_bias_ptr, start + tl.arange(0, BLOCK_V), V, vocab, stride_sv, stride_tv,
            alpha_s, inner_s, height_s, alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, True,
        )  # fmt: skip
        top_s, total_s, moment_s, top_t, total_t, moment_t, gap = observe_pair(
            top_s, total_s, moment_s, top_t, total_t, moment_t, gap, tl.reshape(x_s, shape), tl.reshape(x_t, shape),
            tl.reshape(x_gap, shape), octaves, REVERSE_ROW,
        )  # fmt: skip
    if last_block < first + real:
        x_s, x_t, x_gap, _ = _load_pair(
            s_row, t_row, s_bias_ptr, t_bias_ptr, last_block + tl.arange(0, BLOCK_V), V, tl.minimum(last, vocab),
            stride_sv, stride_tv, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T,
            DIFFERENCE, SCALED, False,
        )  # fmt: skip
        top_s, total_s, moment_s, top_t, total_t, moment_t, gap = observe_pair(
            top_s, total_s, moment_s, top_t, total_t, moment_t, gap, tl.reshape(x_s, shape), tl.reshape(x_t, shape),
            tl.reshape(x_gap, shape), octaves, REVERSE_ROW,
        )  # fmt: skip
    return top_s, total_s, moment_s, top_t, total_t, moment_t, gap


@triton.jit
def _stats_kernel(
    s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, student_row_ptr, teacher_row_ptr, kind_ptr, label_ptr, partial_ptr,
    V, vocab, vocab_start, span, unit, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t,
    stride_sm, stride_sv, stride_tm, stride_tv, stride_pc,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr, LANES: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr,
    DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Add up a slice of a row. VEC: entries of a thread that lie side by side; LANES: running maxima, one a thread."""
    r, split = tl.program_id(0), tl.program_id(1)
    s_row = s_ptr + tl.load(student_row_ptr + r).to(tl.int64) * stride_sm  # row * stride passes 2**31 on long batches
    t_row = t_ptr + tl.load(teacher_row_ptr + r).to(tl.int64) * stride_tm
    first = split * span
    last = tl.minimum(first + span, V)
    octaves = unit * LOG2E
    # A loop for either weighting: inside one of them nothing is chosen an entry.
    reverse = tl.load(kind_ptr + r).to(tl.int32) == REVERSE
    if reverse:
        top_s, total_s, moment_s, top_t, total_t, moment_t, gap = _sweep(
            s_row, t_row, s_bias_ptr, t_bias_ptr, first, last, V, vocab, stride_sv, stride_tv, octaves, alpha_s,
            inner_s, height_s, alpha_t, inner_t, height_t, BLOCK_V, VEC, LANES, SOFTCAP_S, SOFTCAP_T, DIFFERENCE,
            SCALED, True,
        )  # fmt: skip
    else:
        top_s, total_s, moment_s, top_t, total_t, moment_t, gap = _sweep(
            s_row, t_row, s_bias_ptr, t_bias_ptr, first, last, V, vocab, stride_sv, stride_tv, octaves, alpha_s,
            inner_s, height_s, alpha_t, inner_t, height_t, BLOCK_V, VEC, LANES, SOFTCAP_S, SOFTCAP_T, DIFFERENCE,
            SCALED, False,
        )  # fmt: skip
    top_s, total_s, moment_s, top_t, total_t, moment_t, gap = merge_pair(
        top_s, total_s, moment_s, top_t, total_t, moment_t, gap, octaves, reverse
    )
    out = partial_ptr + r.to(tl.int64) * tl.num_programs(1) + split
    tl.store(out + MAX_S * stride_pc, top_s)
    tl.store(out + SUM_S * stride_pc, total_s)
    tl.store(out + MOMENT_S * stride_pc, moment_s)
    tl.store(out + MAX_T * stride_pc, top_t)
    tl.store(out + SUM_T * stride_pc, total_t)
    tl.store(out + MOMENT_T * stride_pc, moment_t)
    tl.store(out + GAP * stride_pc, gap)
    if label_ptr is not None:
        label_at = tl.load(label_ptr + r) - vocab_start
        mine = (label_at >= first) & (label_at < last) & (label_at < vocab)
        label_at = tl.where(mine, label_at, 0).to(tl.int32) + tl.arange(0, 1)
        x_s, x_t, _, _ = _load_pair(
            s_row, t_row, s_bias_ptr, t_bias_ptr, label_at, V, vocab, stride_sv, stride_tv, alpha_s, inner_s, height_s,
            alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, False,
        )  # fmt: skip
        label_out = out + tl.arange(0, 1)
        tl.store(label_out + LABEL_S * stride_pc, tl.where(mine, x_s, -float("inf")))
        tl.store(label_out + LABEL_T * stride_pc, tl.where(mine, x_t, -float("inf")))


@triton.jit
def _finish_kernel(
    partial_ptr, kind_ptr, state_ptr, stats_ptr,
    R, S, unit, stride_pc, stride_state,
    LABELS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a row's slices into its statistics, (7, R), and its state."""
    r = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_S)
    mask = offs < S
    parts = partial_ptr + r * S + offs
    reverse = tl.load(kind_ptr + r).to(tl.int32) == REVERSE
    top_s, total_s, moment_s, top_t, total_t, moment_t, gap = merge_pair(
        tl.load(parts + MAX_S * stride_pc, mask=mask, other=LOWEST),
        tl.load(parts + SUM_S * stride_pc, mask=mask, other=0.0),
        tl.load(parts + MOMENT_S * stride_pc, mask=mask, other=0.0),
        tl.load(parts + MAX_T * stride_pc, mask=mask, other=LOWEST),
        tl.load(parts + SUM_T * stride_pc, mask=mask, other=0.0),
        tl.load(parts + MOMENT_T * stride_pc, mask=mask, other=0.0),
        tl.load(parts + GAP * stride_pc, mask=mask, other=0.0), unit * LOG2E, reverse,
    )  # fmt: skip
    pivot = (top_s - top_t) * unit
    between = tl.log(total_t / total_s)  # L_t - L_s + pivot
    mean_gap = gap / tl.where(reverse, total_s, total_t) * unit
    kl = between + mean_gap
    kl = tl.where(reverse, kl, -kl)
    kl = tl.where(kl < 0.0, 0.0, kl)  # rounding; NaN stays
    stats = stats_ptr + r
    tl.store(stats, kl)
    tl.store(stats + R, tl.log(total_s) - moment_s / total_s * LN2)
    tl.store(stats + 2 * R, tl.log(total_t) - moment_t / total_t * LN2)
    tl.store(stats + 3 * R, top_s * unit + tl.log(total_s))
    tl.store(stats + 4 * R, top_t * unit + tl.log(total_t))
    if LABELS:
        label_s = tl.max(tl.load(parts + LABEL_S * stride_pc, mask=mask, other=-float("inf")), 0)
        label_t = tl.max(tl.load(parts + LABEL_T * stride_pc, mask=mask, other=-float("inf")), 0)
        tl.store(stats + 5 * R, (label_s - top_s) * unit - tl.log(total_s))
        tl.store(stats + 6 * R, (label_t - top_t) * unit - tl.log(total_t))
    state = state_ptr + r * stride_state
    tl.store(state + ORIGIN_S, top_s)
    tl.store(state + ORIGIN_T, top_t)
    tl.store(state + INV_SUM_S, 1.0 / total_s)
    tl.store(state + INV_SUM_T, 1.0 / total_t)
    tl.store(state + LSE_GAP, pivot - between)
    tl.store(state + PIVOT, pivot)
    tl.store(state + MEAN_GAP, mean_gap)
    tl.store(state + MEAN_SLOPE, 0.0)


@triton.jit
def _second_stats_kernel(
    s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, student_row_ptr, teacher_row_ptr, kind_ptr, state_ptr, partial_ptr,
    V, vocab, span, unit, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t, share, entry_clip,
    stride_sm, stride_sv, stride_tm, stride_tv, stride_pc, stride_state,
    BLOCK_V: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, CLIP_ENTRIES: tl.constexpr,
    DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    r, split = tl.program_id(0), tl.program_id(1)
    kind = tl.load(kind_ptr + r).to(tl.int32)
    out = partial_ptr + r.to(tl.int64) * tl.num_programs(1) + split
    if CLIP_ENTRIES | DIFFERENCE | (kind == JSD):
        s_row = s_ptr + tl.load(student_row_ptr + r).to(tl.int64) * stride_sm
        t_row = t_ptr + tl.load(teacher_row_ptr + r).to(tl.int64) * stride_tm
        state = state_ptr + r.to(tl.int64) * stride_state
        origin_s, origin_t = tl.load(state + ORIGIN_S), tl.load(state + ORIGIN_T)
        inv_sum_s, inv_sum_t = tl.load(state + INV_SUM_S), tl.load(state + INV_SUM_T)
        lse_gap = tl.load(state + LSE_GAP)
        value = tl.full((BLOCK_V,), 0.0, tl.float32)
        mean = tl.full((BLOCK_V,), 0.0, tl.float32)
        mass = tl.full((BLOCK_V,), 0.0, tl.float32)
        first = split * span
        for start in range(first, tl.minimum(first + span, V), BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            x_s, x_t, gap, _ = _load_pair(
                s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, alpha_s, inner_s, height_s,
                alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, False,
            )  # fmt: skip
            p_s = probability(x_s, origin_s, inv_sum_s, unit * LOG2E)
            p_t = probability(x_t, origin_t, inv_sum_t, unit * LOG2E)
            more, slope = second_terms(p_s, p_t, gap * unit - lse_gap, kind, share, entry_clip, CLIP_ENTRIES)
            value += more
            mean += slope
            mass += p_s
        tl.store(out, tl.sum(value, 0))
        tl.store(out + stride_pc, tl.sum(mean, 0))
        tl.store(out + 2 * stride_pc, tl.sum(mass, 0))


@triton.jit
def _second_finish_kernel(
    partial_ptr, kind_ptr, state_ptr, stats_ptr,
    S, stride_pc, stride_state,
    CLIP_ENTRIES: tl.constexpr, DIFFERENCE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if CLIP_ENTRIES | DIFFERENCE | (tl.load(kind_ptr + r).to(tl.int32) == JSD):
        offs = tl.arange(0, BLOCK_S)
        parts = partial_ptr + r * S + offs
        value = tl.sum(tl.load(parts, mask=offs < S, other=0.0), 0)
        if not CLIP_ENTRIES:
            value = tl.where(value < 0.0, 0.0, value)  # rounding; clipped sums may be negative in earnest
        tl.store(stats_ptr + r, value)
        mean = tl.sum(tl.load(parts + stride_pc, mask=offs < S, other=0.0), 0)
        # Where nearly all of the mean cancels, the rounding of the student's normaliser would show.
        mass = tl.sum(tl.load(parts + 2 * stride_pc, mask=offs < S, other=0.0), 0)
        tl.store(state_ptr + r * stride_state + MEAN_SLOPE, tl.where(mass > 0.0, mean / mass, mean))


@triton.jit
def _row_gradient(
    s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, unit, alpha_s, inner_s, height_s,
    alpha_t, inner_t, height_t, state, row_grad, kind, share, entry_clip, SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr, DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, CLIP_ENTRIES: tl.constexpr,
    SECOND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return row_grad * d divergence / d raw student logits of a block; 0 past the logical vocabulary."""
    x_s, x_t, gap, slope = _load_pair(
        s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, alpha_s, inner_s, height_s,
        alpha_t, inner_t, height_t, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, WHOLE,
    )  # fmt: skip
    p_s = probability(x_s, tl.load(state + ORIGIN_S), tl.load(state + INV_SUM_S), unit * LOG2E)
    p_t = probability(x_t, tl.load(state + ORIGIN_T), tl.load(state + INV_SUM_T), unit * LOG2E)
    g = slope_of(
        gap * unit, p_s, p_t, tl.load(state + LSE_GAP), tl.load(state + PIVOT), tl.load(state + MEAN_GAP),
        tl.load(state + MEAN_SLOPE), kind, share, entry_clip, CLIP_ENTRIES, DIFFERENCE, SECOND,
    )  # fmt: skip
    g *= slope * row_grad
    return g if WHOLE else tl.where(offs < vocab, g, 0.0)


@triton.jit
def _grad_kernel(
    s_ptr, t_ptr, s_bias_ptr, t_bias_ptr, student_row_ptr, teacher_row_ptr, kind_ptr, state_ptr, row_grad_ptr,
    order_ptr, offsets_ptr, out_ptr,
    V, vocab, unit, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t, share, entry_clip,
    stride_sm, stride_sv, stride_tm, stride_tv, stride_state, stride_om, stride_ov,
    BLOCK_V: tl.constexpr, SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, CLIP_ENTRIES: tl.constexpr,
    DIFFERENCE: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Write output row i, the sum over r in order[offsets[i]:offsets[i+1]]; these share one student row.

    In place (out = s) is safe: each element is read and written by one program only, the write last.
    """
    i = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.full((BLOCK_V,), 0.0, tl.float32)
    for j in range(tl.load(offsets_ptr + i).to(tl.int32), tl.load(offsets_ptr + i + 1).to(tl.int32)):
        r = tl.load(order_ptr + j).to(tl.int64)
        row_grad = tl.load(row_grad_ptr + r)
        if row_grad != 0.0:  # a row without upstream adds nothing, whatever it holds
            s_row = s_ptr + tl.load(student_row_ptr + r).to(tl.int64) * stride_sm
            t_row = t_ptr + tl.load(teacher_row_ptr + r).to(tl.int64) * stride_tm
            kind = tl.load(kind_ptr + r).to(tl.int32)
            if tl.program_id(1) * BLOCK_V + BLOCK_V <= vocab:
                acc += _row_gradient(
                    s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, unit, alpha_s, inner_s,
                    height_s, alpha_t, inner_t, height_t, state_ptr + r * stride_state, row_grad, kind, share,
                    entry_clip, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, CLIP_ENTRIES, SECOND, True,
                )  # fmt: skip
            else:
                acc += _row_gradient(
                    s_row, t_row, s_bias_ptr, t_bias_ptr, offs, V, vocab, stride_sv, stride_tv, unit, alpha_s, inner_s,
                    height_s, alpha_t, inner_t, height_t, state_ptr + r * stride_state, row_grad, kind, share,
                    entry_clip, SOFTCAP_S, SOFTCAP_T, DIFFERENCE, SCALED, CLIP_ENTRIES, SECOND, False,
                )  # fmt: skip
    out = out_ptr + i.to(tl.int64) * stride_om + offs.to(tl.int64) * stride_ov
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=offs < V)


def slices(vocab: int, launch: Launch) -> int:
    """Return S, how many programs share a row of so many real entries."""
    return max(1, triton.cdiv(vocab, launch.span))


def row_partials(
    student: Tensor, teacher: Tensor, options: Options, student_bias: Tensor | None, teacher_bias: Tensor | None
) -> Tensor:
    """Compute (9, R, S) partial statistics of each row's slices of the vocabulary (columns named in numerics.py)."""
    launch, n, v = options.launch, options.n_rows, student.shape[1]
    splits = slices(options.vocab, launch)
    partial = torch.empty(N_PARTIAL, n, splits, dtype=torch.float32, device=student.device)
    if n > 0:
        block = min(launch.stats_block, triton.next_power_of_2(v))
        vec = min(16 // max(student.element_size(), teacher.element_size()), block)
        _stats_kernel[(n, splits)](
            student, teacher, student_bias, teacher_bias, options.student_row, options.teacher_row, options.kind,
            options.labels, partial, v, options.vocab, options.vocab_start, launch.span, options.unit,
            *options.transforms, student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            partial.stride(0), BLOCK_V=block, VEC=vec, LANES=min(32 * launch.stats_warps, block // vec),
            **options.constants, num_warps=launch.stats_warps, **FUSION,
        )  # fmt: skip
    return partial


def finish(partial: Tensor, options: Options, state: Tensor) -> Tensor:
    """Return (7, R) statistics in the order of `vigos.divergence.engines.problem.Statistics`; writes `state` (R, 8)."""
    _, n, splits = partial.shape
    labels = options.labels is not None
    stats = torch.empty(7 if labels else 5, n, dtype=torch.float32, device=partial.device)
    if n > 0:
        _finish_kernel[(n,)](
            partial, options.kind, state, stats, n, splits, options.unit, partial.stride(0), state.stride(0),
            LABELS=labels, BLOCK_S=triton.next_power_of_2(splits), num_warps=1, **FUSION,
        )  # fmt: skip
    return stats


def second_partials(
    student: Tensor, teacher: Tensor, options: Options, state: Tensor, student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Compute (3, R, S) sums of the second sweep: divergence, slopes, student; rows that need none are not written."""
    launch, n, v = options.launch, options.n_rows, student.shape[1]
    splits = slices(options.vocab, launch)
    partial = torch.empty(3, n, splits, dtype=torch.float32, device=student.device)
    if n > 0:
        _second_stats_kernel[(n, splits)](
            student, teacher, student_bias, teacher_bias, options.student_row, options.teacher_row, options.kind,
            state, partial, v, options.vocab, launch.span, options.unit, *options.transforms, options.share,
            options.clip_of_entries, student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            partial.stride(0), state.stride(0), BLOCK_V=min(launch.second_block, triton.next_power_of_2(v)),
            **options.constants, CLIP_ENTRIES=options.entry_clip is not None, num_warps=launch.stats_warps, **FUSION,
        )  # fmt: skip
    return partial


def finish_second(partial: Tensor, options: Options, state: Tensor, stats: Tensor) -> None:
    """Write the divergence of the rows that needed a second sweep into `stats`, their mean slope into `state`."""
    _, n, splits = partial.shape
    if n > 0:
        _second_finish_kernel[(n,)](
            partial, options.kind, state, stats, splits, partial.stride(0), state.stride(0),
            CLIP_ENTRIES=options.entry_clip is not None, DIFFERENCE=options.difference,
            BLOCK_S=triton.next_power_of_2(splits), num_warps=1, **FUSION,
        )  # fmt: skip


def row_grad(
    student: Tensor, teacher: Tensor, options: Options, state: Tensor, row_grad: Tensor, order: Tensor, offsets: Tensor,
    out: Tensor, student_bias: Tensor | None, teacher_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write out[i] (V,) = sum of row_grad[r] * d divergence[r] / d raw student logits.

    The sum is over r in order[offsets[i]:offsets[i + 1]].

    `out` has any float dtype and may be `student`, if row i of it is the student row of those r.
    """
    n, v = out.shape
    if n > 0:
        launch = options.launch
        block = min(launch.second_block if options.second else launch.grad_block, triton.next_power_of_2(v))
        _grad_kernel[(n, triton.cdiv(v, block))](
            student, teacher, student_bias, teacher_bias, options.student_row, options.teacher_row, options.kind,
            state, row_grad, order, offsets, out, v, options.vocab, options.unit, *options.transforms, options.share,
            options.clip_of_entries, student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
            state.stride(0), out.stride(0), out.stride(1), BLOCK_V=block, **options.constants,
            CLIP_ENTRIES=options.entry_clip is not None, SECOND=options.second, num_warps=launch.grad_warps, **FUSION,
        )  # fmt: skip
