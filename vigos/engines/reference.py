"""Chunked PyTorch: any float dtype, any device, never N x V elements. The plain path, and what `auto` ends with.

With x = log p_s - log p_t, taken as (z_s - z_t) - (lse_s - lse_t) so that near teachers lose nothing:
    forward KL   sum p_t (expm1(x) - x)                        gradient p_t expm1(x)
    reverse KL   sum p_s (expm1(-x) + x)                       gradient p_s (x - KL)
    JSD(beta)    sum beta p_t (log p_t - log m) + g            gradient g - p_s sum g
                     with m = (1 - beta) p_s + beta p_t and g = (1 - beta) p_s (log p_s - log m)
The two KL sums are the textbook ones plus sum (p_s - p_t) = 0, which makes every term of them >= 0 and of second order.
They do not notice an error of lse_s - lse_t to first order; the gradient does, so the residual sum (p_s - p_t) is
measured and taken out. With `entry_clip` the textbook terms are clipped, as in siyan-zhao/OPSD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.engines.problem import (
    STATE,
    LinearProblem,
    LinearResult,
    LogitsProblem,
    LogitsResult,
    Rows,
    Statistics,
    all_reduce,
    chunk_width,
    chunks,
    live_rows,
)
from vigos.supervision import FORWARD_KL, JSD, REVERSE_KL

INF = float("inf")
CHUNK_ELEMENTS = 2**22  # of one (chunk, V) tensor; about ten of them live at once


def why_not(problem: LinearProblem) -> str | None:
    """It runs everything."""
    return None


def logits_why_not(problem: LogitsProblem) -> str | None:
    """It runs everything."""
    return None


@dataclass
class _Pair:
    """Logits of a chunk, (C, V): z of both sides, and z_s - z_t with as little rounding as possible."""

    z_s: Tensor
    z_t: Tensor
    gap: Tensor
    slope: Tensor | float  # d z_s / d raw_s, (C, V) under a softcap


def _pair(rows: Rows, raw_s: Tensor, raw_t: Tensor, bias_s: Tensor | None, bias_t: Tensor | None) -> _Pair:
    difference = raw_s - raw_t
    if bias_s is not None:
        raw_s = raw_s + bias_s
    if bias_t is not None:
        raw_t = raw_t + bias_t
    if bias_s is not bias_t:
        difference = difference + ((0 if bias_s is None else bias_s) - (0 if bias_t is None else bias_t))  # type: ignore[operator]
    slope: Tensor | float = rows.alpha
    if rows.softcap is None:
        z_s, z_t, gap = raw_s * rows.alpha, raw_t * rows.alpha, difference * rows.alpha
    else:
        tanh_s, tanh_t = (torch.tanh(raw * (rows.scale / rows.softcap)) for raw in (raw_s, raw_t))
        height = rows.softcap / rows.temperature
        z_s, z_t, slope = tanh_s * height, tanh_t * height, (1 - tanh_s**2) * rows.alpha
        gap = torch.tanh(difference * (rows.scale / rows.softcap)) * (1 - tanh_s * tanh_t) * height
        infinite = torch.isinf(raw_s) | torch.isinf(raw_t)  # tanh gives those a finite logit
        gap = torch.where(infinite, z_s - z_t, gap)
    v, real = z_s.shape[-1], rows.local_vocab(z_s.shape[-1])
    if real < v:
        padding = torch.arange(v, device=z_s.device) >= real
        z_s, z_t = z_s.masked_fill(padding, -INF), z_t.masked_fill(padding, -INF)
    gap = gap.masked_fill((z_s == -INF) & (z_t == -INF), 0.0)
    return _Pair(z_s, z_t, gap, slope)


def _normaliser(z: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the maximum, sum of exp(z - maximum) and the entropy of softmax(z)."""
    top = all_reduce(z.amax(-1), group, "max")
    shifted = z - torch.where(top == -INF, 0.0, top)[:, None]
    e = shifted.exp()
    total, first = all_reduce(torch.stack([e.sum(-1), (e * shifted.masked_fill(z == -INF, 0.0)).sum(-1)]), group)
    return top, total, total.log() - first / total


def _expm1_plus(a: Tensor) -> Tensor:
    """exp(-a) - 1 + a for a >= 0, to rounding also where a is small."""
    series = torch.zeros_like(a)
    for k in range(16, 1, -1):
        series = series * -a + 1 / math.factorial(k)
    return torch.where(a < 0.5, series * a * a, torch.expm1(-a) + a)


@dataclass
class _Terms:
    """Per entry of a chunk, (C, V): x and both probabilities, from x so that their difference is exact."""

    x: Tensor
    p_s: Tensor
    p_t: Tensor
    difference: Tensor  # p_s - p_t
    larger: Tensor  # the larger probability, and where it is the student's
    student_larger: Tensor


def _terms(pair: _Pair, lse_s: Tensor, lse_t: Tensor, delta: Tensor) -> _Terms:
    neither = (pair.z_s == -INF) & (pair.z_t == -INF)
    x = (pair.gap - delta[:, None]).masked_fill(neither, 0.0)
    student_larger = x > 0
    larger = torch.where(student_larger, pair.z_s - lse_s[:, None], pair.z_t - lse_t[:, None]).exp()
    fall = larger * torch.expm1(-x.abs())
    smaller = larger + fall
    return _Terms(
        x,
        torch.where(student_larger, larger, smaller),
        torch.where(student_larger, smaller, larger),
        torch.where(student_larger, -fall, fall),
        larger,
        student_larger,
    )


def _log_ratios_to_mixture(terms: _Terms, beta: float) -> tuple[Tensor, Tensor]:
    """log p_s - log m and log p_t - log m, m = (1 - beta) p_s + beta p_t; 0 where the probability is 0."""
    a = terms.x.abs()
    to_larger = torch.log1p(torch.where(terms.student_larger, beta, 1 - beta) * torch.expm1(-a))
    larger, smaller = -to_larger, -a - to_larger
    smaller = torch.where(torch.isinf(a), 0.0, smaller)
    return torch.where(terms.student_larger, larger, smaller), torch.where(terms.student_larger, smaller, larger)


def _entry_terms(terms: _Terms, kind: int, beta: float) -> tuple[Tensor, Tensor | None]:
    """Textbook terms of the sum over the vocabulary, and for JSD also g."""
    if kind == FORWARD_KL:
        return torch.where(terms.p_t > 0, -terms.p_t * terms.x, 0.0), None
    if kind == REVERSE_KL:
        return torch.where(terms.p_s > 0, terms.p_s * terms.x, 0.0), None
    ratio_s, ratio_t = _log_ratios_to_mixture(terms, beta)
    g = (1 - beta) * terms.p_s * ratio_s
    return beta * terms.p_t * ratio_t + g, g


def _sums(terms: _Terms, kind: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, first, second) of each row: the divergence and the two sums its gradient needs.

    first: forward KL 0; reverse KL the sum of its (unclipped) terms; JSD the sum of g. second: the probability that
    clipped entries hold, of the teacher for forward, of the student for reverse KL.
    """
    u, g = _entry_terms(terms, kind, rows.beta)
    zero = torch.zeros_like(u[:, 0])
    if rows.entry_clip is not None:
        inside = u <= rows.entry_clip
        value = torch.where(inside, u, rows.entry_clip).sum(-1)
        outside = torch.where(inside, 0.0, terms.p_t if kind == FORWARD_KL else terms.p_s).sum(-1)
        first = torch.where(inside, u if g is None else g, 0.0).sum(-1)
        return value, (zero if kind == FORWARD_KL else first), (zero if kind == JSD else outside)
    if kind == JSD:
        assert g is not None
        return u.sum(-1), g.sum(-1), zero
    a = terms.x.abs()
    of_larger = terms.larger * _expm1_plus(a)  # larger * (log larger - log smaller) + smaller - larger
    e = torch.expm1(-a)
    of_smaller = torch.where(a < 0.5, -(_expm1_plus(a) + e * a), -(e + a.clamp(max=1e3) * torch.exp(-a))) * terms.larger
    of_larger = torch.where(terms.larger > 0, of_larger, 0.0)
    from_student = kind == REVERSE_KL
    value = torch.where(terms.student_larger == from_student, of_larger, of_smaller).sum(-1)
    return value, (value if from_student else zero), zero


def _gradient(terms: _Terms, kind: int, rows: Rows, first: Tensor, second: Tensor) -> Tensor:
    """d divergence / d z_s, (C, V)."""
    first, second = first[:, None], second[:, None]
    clip = rows.entry_clip
    if kind == FORWARD_KL:
        if clip is None:
            return terms.difference
        inside = _entry_terms(terms, kind, rows.beta)[0] <= clip
        return torch.where(inside, terms.difference - terms.p_s * second, terms.p_s * (1 - second))
    if kind == REVERSE_KL:
        with_gap = torch.where(terms.p_s > 0, terms.p_s * (terms.x - first + second), 0.0)
        if clip is None:
            return with_gap
        inside = _entry_terms(terms, kind, rows.beta)[0] <= clip
        return torch.where(inside, with_gap, -terms.p_s * (first + 1 - second))
    u, g = _entry_terms(terms, kind, rows.beta)
    assert g is not None
    return (g if clip is None else torch.where(u <= clip, g, 0.0)) - terms.p_s * first


def _measure(rows: Rows, pair: _Pair, kind: Tensor, labels: Tensor | None) -> tuple[Statistics, Tensor]:
    """Statistics of a chunk and what its gradient needs (C, 5): lse_s, lse_t, lse_s - lse_t, first, second."""
    top_s, total_s, entropy_s = _normaliser(pair.z_s, rows.group)
    top_t, total_t, entropy_t = _normaliser(pair.z_t, rows.group)
    lse_s, lse_t = top_s + total_s.log(), top_t + total_t.log()
    delta = (top_s - top_t) + (total_s / total_t).log()
    residual = all_reduce(_terms(pair, lse_s, lse_t, delta).difference.sum(-1), rows.group)
    delta = delta + torch.where(residual.abs() < 0.5, residual, 0.0).log1p()
    terms = _terms(pair, lse_s, lse_t, delta)
    sums = torch.zeros(3, kind.shape[0], dtype=delta.dtype, device=delta.device)
    for value in (FORWARD_KL, REVERSE_KL, JSD):
        of_kind = kind == value
        if of_kind.any():
            sums = torch.where(of_kind, torch.stack(_sums(terms, value, rows)), sums)
    value, first, second = all_reduce(sums, rows.group)
    logprobs: list[Tensor | None] = [None, None]
    if labels is not None:
        local = labels - rows.vocab_start
        mine = (local >= 0) & (local < pair.z_s.shape[-1])
        at = local.clamp(0, pair.z_s.shape[-1] - 1)[:, None]
        for i, (z, lse) in enumerate(((pair.z_s, lse_s), (pair.z_t, lse_t))):
            picked = torch.where(mine, z.gather(1, at).squeeze(1), 0.0)
            logprobs[i] = all_reduce(picked, rows.group) - lse
    statistics = Statistics(value, entropy_s, entropy_t, lse_s, lse_t, *logprobs)
    return statistics, torch.stack([lse_s, lse_t, delta, first, second], dim=1)


def _dlogits(rows: Rows, pair: _Pair, kind: Tensor, state: Tensor) -> Tensor:
    """d divergence / d raw student logits of a chunk, (C, V)."""
    lse_s, lse_t, delta, first, second = state[:, :5].unbind(1)
    terms = _terms(pair, lse_s, lse_t, delta)
    out = torch.zeros_like(pair.z_s)
    for value in (FORWARD_KL, REVERSE_KL, JSD):
        of_kind = kind == value
        if of_kind.any():
            out = torch.where(of_kind[:, None], _gradient(terms, value, rows, first, second), out)
    return out * pair.slope


def _padded(index: Tensor, width: int) -> Tensor:
    """`index` with its last entry repeated up to `width`."""
    return torch.cat([index, index[-1:].expand(width - index.shape[0])])


def _store(into: Statistics, at: slice, chunk: Statistics) -> None:
    n = at.stop - at.start
    for name, value in vars(chunk).items():
        if value is not None:
            getattr(into, name)[at] = value[:n]


def forward(problem: LinearProblem) -> LinearResult:
    """Statistics of every row; gradients of the rows through which the loss has one."""
    dtype, device, r = problem.compute_dtype, problem.device, problem.n_rows
    v, d = problem.student_weight.shape
    statistics = Statistics.empty(problem)
    result = LinearResult(statistics)
    need = problem.need_dhidden or problem.need_dweight or problem.need_dbias
    if problem.need_dhidden:
        result.drow = torch.zeros(r, d, dtype=dtype, device=device)
        result.computed = torch.zeros(r, dtype=torch.bool, device=device)
    if problem.need_dweight:
        result.dweight = torch.zeros(v, d, dtype=dtype, device=device)
    if problem.need_dbias:
        result.dbias = torch.zeros(v, dtype=dtype, device=device)
    head_s = problem.student_weight
    head_t = head_s if problem.teacher_weight is None else problem.teacher_weight
    bias_s, bias_t = (None if b is None else b.to(dtype) for b in (problem.student_bias, problem.teacher_bias))
    if problem.teacher_bias is problem.student_bias:
        bias_t = bias_s
    # The head is used in its own dtype when that is the compute dtype, else converted a block of rows at a time.
    width = chunk_width(r, max(1, CHUNK_ELEMENTS // v))
    block = max(1, CHUNK_ELEMENTS // d)

    def project(hidden: Tensor, head: Tensor) -> Tensor:
        out = torch.empty(hidden.shape[0], v, dtype=dtype, device=device)
        for part in chunks(v, v if head.dtype == dtype else block):
            out[:, part] = hidden @ head[part].to(dtype).T
        return out

    for at in chunks(r, width):
        rows_s, rows_t = (_padded(index[at], width) for index in (problem.student_row, problem.teacher_row))
        kind = _padded(problem.kind[at], width)
        labels = None if problem.labels is None else _padded(problem.labels[at], width)
        hidden = problem.student_hidden[rows_s].to(dtype)
        pair = _pair(
            problem, project(hidden, head_s), project(problem.teacher_hidden[rows_t].to(dtype), head_t), bias_s, bias_t
        )
        measured, state = _measure(problem, pair, kind, labels)
        _store(statistics, at, measured)
        if not need:
            continue
        n = at.stop - at.start
        chunk_rows = replace(problem, weight=problem.weight[at], clip=problem.clip[at])
        live = live_rows(chunk_rows, measured.divergence[:n])
        if not live.any():
            continue
        keep = torch.zeros(width, dtype=torch.bool, device=device)
        keep[:n] = live
        dlogits = _dlogits(problem, pair, kind, state).masked_fill(~keep[:, None], 0.0)
        del pair
        if result.drow is not None and result.computed is not None:
            drow = torch.zeros(width, d, dtype=dtype, device=device)
            for part in chunks(v, v if head_s.dtype == dtype else block):
                drow.addmm_(dlogits[:, part], head_s[part].to(dtype))
            result.drow[at], result.computed[at] = drow[:n], live
        weighted = dlogits[:n] * torch.where(live, problem.weight[at], 0.0)[:, None].to(dtype)
        if result.dweight is not None:
            result.dweight.addmm_(weighted.T, hidden[:n].masked_fill(~live[:, None], 0.0))
        if result.dbias is not None:
            result.dbias += weighted.sum(0)
    if result.drow is not None:
        all_reduce(result.drow, problem.group)
    return result


def _logits_pair(problem: LogitsProblem, rows_s: Tensor, rows_t: Tensor) -> _Pair:
    dtype = problem.compute_dtype
    return _pair(
        problem, problem.student_logits[rows_s].to(dtype), problem.teacher_logits[rows_t].to(dtype), None, None
    )


def logits_forward(problem: LogitsProblem) -> LogitsResult:
    """Statistics of every row, chunk by chunk."""
    r, v = problem.n_rows, problem.student_logits.shape[1]
    statistics = Statistics.empty(problem)
    state = torch.zeros(r, STATE, dtype=problem.compute_dtype, device=problem.device)
    for at in chunks(r, max(1, CHUNK_ELEMENTS // v)):
        pair = _logits_pair(problem, problem.student_row[at], problem.teacher_row[at])
        labels = None if problem.labels is None else problem.labels[at]
        measured, state[at, :5] = _measure(problem, pair, problem.kind[at], labels)
        _store(statistics, at, measured)
    return LogitsResult(statistics, state)


def logits_backward(problem: LogitsProblem, state: Tensor, row_grad: Tensor, *, out: Tensor | None = None) -> Tensor:
    """dlogits (N, V) in the logits' dtype: row_grad[r] * d divergence[r] / d student_logits, summed over repeated rows.

    `out` may be the student's logits, if no row of them is supervised twice. Rows with row_grad 0 are not read.
    """
    n, v = problem.student_logits.shape
    in_place = out is not None and out.data_ptr() == problem.student_logits.data_ptr()
    if out is None:
        out = torch.empty_like(problem.student_logits, memory_format=torch.contiguous_format)
    if not in_place:
        out.zero_()
    active = (row_grad != 0).nonzero().squeeze(1)
    for at in chunks(active.shape[0], max(1, CHUNK_ELEMENTS // v)):
        r = active[at]
        pair = _logits_pair(problem, problem.student_row[r], problem.teacher_row[r])
        dlogits = (_dlogits(problem, pair, problem.kind[r], state[r]) * row_grad[r][:, None]).to(out.dtype)
        if in_place:
            out[problem.student_row[r]] = dlogits
        else:
            out.index_add_(0, problem.student_row[r], dlogits)
    if in_place:
        quiet = torch.ones(n, dtype=torch.bool, device=out.device)
        quiet[problem.student_row[active]] = False
        out[quiet] = 0
    return out
