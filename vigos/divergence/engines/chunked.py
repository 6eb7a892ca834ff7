"""Chunked PyTorch: any float dtype, any device, never N x V elements. The plain path, and what `auto` ends with.

With delta = log p_s - log p_t, taken as gap - lse_gap = (z_s - z_t) - (L_s - L_t) so that near teachers lose nothing:

    forward KL   sum p_t (expm1(delta) - delta)                      a = p_s - p_t
    reverse KL   sum p_s (expm1(-delta) + delta)                     a = p_s delta
    JSD(beta)    sum beta p_t (log p_t - log m) + a,  m = (1 - beta) p_s + beta p_t
                                                                      a = (1 - beta) p_s (log p_s - log m)
    skew forward sum p_t (expm1(e) - e), e = log m - log p_t         a = (1 - beta) p_s (m - p_t) / m
    skew reverse the same of p_s                                      a = p_s ((1 - beta) (m - p_s) / m - e)

and d/dz_s = a - p_s S with S = sum a, for all five. The two KL sums are the textbook ones plus sum (p_s - p_t) = 0,
which makes every term of them >= 0 and of second order; they do not notice an error of lse_gap to first order,
and neither does a - p_s S. With `entry_clip` the textbook terms are clipped, as in siyan-zhao/OPSD; where a term is
above the clip, a = p_s for forward KL, -p_s for reverse KL and 0 for JSD. With a shared head, (student - teacher) @
head.T is computed instead of the student's logits: its rounding is relative to what the gradient is made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from vigos.divergence.engines.contrast import targets
from vigos.divergence.engines.problem import (
    KNOWN,
    LSE_GAP,
    MEAN_SLOPE,
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
from vigos.divergence.supervision import FORWARD_KL, JSD, KINDS, REVERSE_KL, SKEW_FORWARD

INF = float("inf")


@dataclass(frozen=True)
class Config:
    """Elements of one (chunk, V) tensor; about forty of them come and go. On a CPU they better stay in its cache."""

    cpu_elements: int = 2**19
    elements: int = 2**22

    def on(self, device: torch.device) -> int:
        """Return the number for a device."""
        return self.cpu_elements if device.type == "cpu" else self.elements


CONFIG = Config()


def why_not(problem: LinearProblem) -> str | None:
    """Return None: this engine runs everything."""
    return None


def logits_why_not(problem: LogitsProblem) -> str | None:
    """Return None: this engine runs everything."""
    return None


@dataclass
class _Pair:
    """Logits of a chunk, (C, V): z of both sides, and z_s - z_t with as little rounding as possible."""

    z_s: Tensor
    z_t: Tensor
    gap: Tensor
    slope: Tensor | float  # d z_s / d raw_s, (C, V) under a softcap


def _pair(
    rows: Rows, difference: Tensor, raw_s: Tensor, raw_t: Tensor, bias_s: Tensor | None, bias_t: Tensor | None
) -> _Pair:
    v, real = raw_s.shape[-1], rows.local_vocab(raw_s.shape[-1])
    padding = torch.arange(v, device=raw_s.device) >= real
    if bias_s is not None:
        raw_s = raw_s + bias_s
    if bias_t is not None:
        raw_t = raw_t + bias_t
    if bias_s is not bias_t:
        difference = difference + ((0 if bias_s is None else bias_s) - (0 if bias_t is None else bias_t))  # type: ignore[operator]
    if real < v:  # whatever lies there
        raw_s, raw_t, difference = (x.masked_fill(padding, 0.0) for x in (raw_s, raw_t, difference))
    f, f_t = rows.student_transform, rows.teacher_transform
    z_s, z_t = f(raw_s), f_t(raw_t)
    slope: Tensor | float = f.alpha
    if f.softcap is not None:
        slope = (1 - torch.tanh(raw_s * f.inner) ** 2) * f.alpha
    if not rows.alike:
        gap = z_s - z_t
    elif f.softcap is None:
        gap = difference * f.alpha
    else:
        tanh_s, tanh_t = torch.tanh(raw_s * f.inner), torch.tanh(raw_t * f.inner)
        gap = torch.tanh(difference * f.inner) * (1 - tanh_s * tanh_t) * f.height
        infinite = torch.isinf(raw_s) | torch.isinf(raw_t)  # tanh gives those a finite logit
        gap = torch.where(infinite, z_s - z_t, gap)
    if real < v:
        z_s, z_t = z_s.masked_fill(padding, -INF), z_t.masked_fill(padding, -INF)
    gap = gap.masked_fill((z_s == -INF) & (z_t == -INF), 0.0)
    return _Pair(z_s, z_t, gap, slope)


def _contrasted(rows: Rows, pair: _Pair, z_c: Tensor | None, contrast: Tensor, plausibility: Tensor) -> _Pair:
    """Return the pair with its target in the teacher's place; z_c: of the control, None where no row has a contrast."""
    z_t, gap = pair.z_t, pair.gap
    least = all_reduce(z_t.amax(-1), rows.group, "max") + plausibility.to(z_t.dtype).log()
    cut = (z_t < least[:, None]) & (z_t > -INF)
    if z_c is not None:
        step = torch.where((contrast != 0)[:, None] & (z_t > -INF), contrast[:, None] * (z_t - z_c), 0.0)
        z_t, gap = z_t + step, gap - step
    gap = torch.where(cut, torch.where(pair.z_s == -INF, 0.0, INF), gap)
    return replace(pair, z_t=z_t.masked_fill(cut, -INF), gap=gap)


def _normaliser(z: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the maximum, sum of exp(z - maximum) and the entropy of softmax(z)."""
    top = all_reduce(z.amax(-1), group, "max")
    shifted = z - torch.where(top == -INF, 0.0, top)[:, None]
    e = shifted.exp()
    total, first = all_reduce(torch.stack([e.sum(-1), (e * shifted.masked_fill(z == -INF, 0.0)).sum(-1)]), group)
    return top, total, total.log() - first / total


def _expm1_plus(a: Tensor) -> Tensor:
    """Return exp(-a) - 1 + a for a >= 0, to rounding also where a is small."""
    last = 16 if a.dtype == torch.float64 else 9  # the first term left out is under a rounding at 0.5
    series = torch.full_like(a, 1 / math.factorial(last))
    negative = -a
    for k in range(last - 1, 1, -1):
        series.mul_(negative).add_(1 / math.factorial(k))
    return torch.where(a < 0.5, series * a * a, torch.expm1(negative) + a)


@dataclass
class _Terms:
    """Per entry of a chunk, (C, V): delta and both probabilities, from it so that their difference is exact."""

    delta: Tensor
    p_s: Tensor
    p_t: Tensor
    difference: Tensor  # p_s - p_t
    larger: Tensor  # the larger probability, and where it is the student's
    student_larger: Tensor


def _terms(pair: _Pair, known: Tensor) -> _Terms:
    """Return the terms of a chunk whose rows are known, (C, KNOWN)."""
    top_s, log_s, top_t, log_t, lse_gap = known[:, : LSE_GAP + 1, None].unbind(1)
    neither = (pair.z_s == -INF) & (pair.z_t == -INF)
    delta = (pair.gap - lse_gap).masked_fill(neither, 0.0)
    student_larger = delta > 0
    larger = torch.where(student_larger, (pair.z_s - top_s) - log_s, (pair.z_t - top_t) - log_t).exp()
    fall = larger * torch.expm1(-delta.abs())
    smaller = larger * torch.exp(-delta.abs())
    return _Terms(
        delta,
        torch.where(student_larger, larger, smaller),
        torch.where(student_larger, smaller, larger),
        torch.where(student_larger, -fall, fall),
        larger,
        student_larger,
    )


def _kl_terms(terms: _Terms, of_student: bool) -> Tensor:
    """Return p (expm1(-gap) + gap) of each entry for the side that weights, without the cancellation for small gaps."""
    a = terms.delta.abs()
    fall, second_order = torch.expm1(-a), _expm1_plus(a)
    # The weighting side's probability is the larger one, or the smaller one.
    weighting_larger = torch.where(a == INF, INF, terms.larger * second_order)
    near = -(second_order + fall * a)
    far = -(fall + a.clamp(max=1e3) * torch.exp(-a))
    return torch.where(
        terms.student_larger == of_student, weighting_larger, torch.where(a < 0.25, near, far) * terms.larger
    )


def _entropy_gap(z: Tensor, log: Tensor) -> Tensor:
    """Return (1 + z) log(1 + z) - z given log(1 + z), to rounding also where z is small."""
    series = torch.zeros_like(z)
    for k in range(16 if z.dtype == torch.float64 else 8, 1, -1):
        series.mul_(-z).add_(1 / (k * (k - 1)))
    return torch.where(z.abs() < 0.125, series * z * z, (1 + z) * log - z)


def _jsd_terms(terms: _Terms, share: float) -> tuple[Tensor, Tensor]:
    """Return (the divergence's terms, the student's share of them).

    c = |share|, the smaller weight of the mixture m, is of the smaller probability or of the larger one. A term is
    larger (c k(a) - g(z)) or larger (c h(a) - exp(-a) g(z)), both of order c (1 - c) a^2 / 2 without a cancellation.
    """
    c, a = abs(share), terms.delta.abs()
    fallen, kept = -torch.expm1(-a), torch.exp(-a)
    of_smaller = terms.student_larger == (share > 0)
    part = c * fallen
    mixed = part + kept  # m / larger, where c is of the larger one
    far = ~of_smaller & (part > kept)
    z = torch.where(of_smaller, -part, torch.where(far, (1 - mixed) / mixed, part / kept))
    log = torch.log1p(z)
    most = a.clamp(max=1e3)
    to_larger = torch.where(far, -log, torch.where(of_smaller, log, log - most))  # log m - log larger
    to_smaller = torch.where(of_smaller | far, most + to_larger, log)
    second_order = _expm1_plus(a)
    curve = torch.where(a < 0.25, fallen * a - second_order, fallen - most * kept)
    gap = _entropy_gap(z, log)
    value = torch.where(of_smaller, c * curve - gap, c * second_order - kept * gap)
    value = torch.where(far, mixed * log - (1 - c) * most * kept, value)
    student = -terms.p_s * torch.where(terms.student_larger, to_larger, to_smaller)
    return terms.larger * value, (c if share < 0 else 1 - c) * student


def _skew_entries(terms: _Terms, forward: bool, beta: float, clip: float | None) -> tuple[Tensor, Tensor]:
    """Return what `_entries` does, for KL(w || m): w is the teacher if `forward`, and the mixture has c of it."""
    c = beta if forward else 1 - beta
    weighting, other, delta = (terms.p_t, terms.p_s, terms.delta) if forward else (terms.p_s, terms.p_t, -terms.delta)
    rise = torch.log1p((1 - c) * torch.expm1(delta.clamp(max=1.0)))
    rise = torch.where(delta > 0.5, delta + torch.log1p(c * torch.expm1(-delta)), rise)  # log m - log p_w
    above = rise > 0
    larger = torch.where(above, c * weighting + (1 - c) * other, weighting)
    u = _kl_terms(replace(terms, delta=rise, larger=larger, student_larger=above), of_student=False)
    a = -(1 - beta) * torch.expm1(-rise)
    a = torch.where(terms.p_s > 0, terms.p_s * (a if forward else a - rise), u - u)  # NaN where u is
    if clip is None:
        return u, a
    plain = torch.where(weighting > 0, -weighting * rise, u - u)
    return (
        torch.where(plain > clip, clip, plain),
        torch.where(plain > clip, (1 - beta if forward else -beta) * terms.p_s, a),
    )


def _entries(terms: _Terms, kind: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return (terms of the divergence, a), (C, V) each."""
    clip = rows.entry_clip
    if kind > JSD:
        return _skew_entries(terms, kind == SKEW_FORWARD, rows.beta, clip)
    if kind == JSD:
        u, a = _jsd_terms(terms, rows.share)
        return (u, a) if clip is None else (torch.where(u > clip, clip, u), torch.where(u > clip, 0.0, a))
    nothing = torch.where(terms.delta.isnan(), terms.delta, 0.0)
    if kind == REVERSE_KL:
        u = a = torch.where(terms.p_s > 0, terms.p_s * terms.delta, nothing)
        above = -terms.p_s
    else:
        u = torch.where(terms.p_t > 0, -terms.p_t * terms.delta, nothing)
        a, above = terms.difference, terms.p_s
    if clip is None:
        return _kl_terms(terms, kind == REVERSE_KL), a
    return torch.where(u > clip, clip, u), torch.where(u > clip, above, a)


def _slopes(terms: _Terms, kind: int, rows: Rows) -> Tensor:
    """Return `a` alone."""
    if kind == FORWARD_KL and rows.entry_clip is None:
        return terms.difference
    if kind == REVERSE_KL and rows.entry_clip is None:
        return torch.where(terms.p_s > 0, terms.p_s * terms.delta, torch.where(terms.delta.isnan(), terms.delta, 0.0))
    return _entries(terms, kind, rows)[1]


def _measure(rows: Rows, pair: _Pair, kind: Tensor, labels: Tensor | None) -> tuple[Statistics, Tensor]:
    """Return the statistics of a chunk and what its gradient needs, (C, KNOWN)."""
    top_s, total_s, entropy_s = _normaliser(pair.z_s, rows.group)
    top_t, total_t, entropy_t = _normaliser(pair.z_t, rows.group)
    lse_s, lse_t = top_s + total_s.log(), top_t + total_t.log()
    lse_gap = (top_s - top_t) + (total_s / total_t).log()
    known = torch.stack([top_s, total_s.log(), top_t, total_t.log(), lse_gap, torch.zeros_like(lse_gap)], dim=1)
    terms = _terms(pair, known)
    sums = torch.zeros(2, kind.shape[0], dtype=lse_gap.dtype, device=lse_gap.device)
    for value in KINDS.values():
        of_kind = kind == value
        if of_kind.any():
            sums = torch.where(of_kind, torch.stack([x.sum(-1) for x in _entries(terms, value, rows)]), sums)
    all_reduce(sums, rows.group)
    logprobs: list[Tensor | None] = [None, None]
    if labels is not None:
        local = labels - rows.vocab_start
        mine = (local >= 0) & (local < pair.z_s.shape[-1])
        column = local.clamp(0, pair.z_s.shape[-1] - 1)[:, None]
        for i, (z, lse) in enumerate(((pair.z_s, lse_s), (pair.z_t, lse_t))):
            picked = torch.where(mine, z.gather(1, column).squeeze(1), 0.0)
            logprobs[i] = all_reduce(picked, rows.group) - lse
    statistics = Statistics(sums[0], entropy_s, entropy_t, lse_s, lse_t, *logprobs)
    known[:, MEAN_SLOPE] = sums[1]
    return statistics, known


def _dlogits(rows: Rows, pair: _Pair, kind: Tensor, state: Tensor) -> Tensor:
    """Return d divergence / d raw student logits of a chunk, (C, V)."""
    terms, mean_slope = _terms(pair, state), state[:, MEAN_SLOPE]
    out = torch.zeros_like(pair.z_s)
    for value in KINDS.values():
        of_kind = kind == value
        if of_kind.any():
            a = _slopes(terms, value, rows)
            out = torch.where(of_kind[:, None], a - terms.p_s * mean_slope[:, None], out)
    return out * pair.slope


def _padded(index: Tensor, width: int) -> Tensor:
    """Return `index` with its last entry repeated up to `width`."""
    return torch.cat([index, index[-1:].expand(width - index.shape[0])])


def _store(into: Statistics, chunk_slice: slice, chunk: Statistics) -> None:
    n = chunk_slice.stop - chunk_slice.start
    for name, value in vars(chunk).items():
        if value is not None:
            getattr(into, name)[chunk_slice] = value[:n]


def forward(problem: LinearProblem, config: Config = CONFIG) -> LinearResult:
    """Compute the statistics of every row, and the gradients of the rows through which the loss has one."""
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
    # Rows of the head past the logical vocabulary may hold anything, and are in no product. At least one column stays.
    width = chunk_width(r, max(1, config.on(device) // problem.entries_a_rank(v)))
    v = max(1, problem.local_vocab(v))
    head_s, head_t = head_s[:v], head_t[:v]
    one_bias = bias_s is bias_t
    bias_s, bias_t = (None if b is None else b[:v] for b in (bias_s, bias_t))
    bias_t = bias_s if one_bias else bias_t
    # The head is used in its own dtype when that is the compute dtype, else converted a block of rows at a time.
    block = max(1, config.on(device) // d)

    def project(hidden: Tensor, head: Tensor) -> Tensor:
        out = torch.empty(hidden.shape[0], v, dtype=dtype, device=device)
        for part in chunks(v, v if head.dtype == dtype else block):
            out[:, part] = hidden @ head[part].to(dtype).T
        return out

    for chunk_slice in chunks(r, width):
        pairs = _padded(torch.arange(r, device=device)[chunk_slice], width)
        rows_s, rows_t = problem.student_row[pairs], problem.teacher_row[pairs]
        kind = problem.kind[pairs]
        labels = None if problem.labels is None else problem.labels[pairs]
        hidden, teacher = problem.student_hidden[rows_s].to(dtype), problem.teacher_hidden[rows_t].to(dtype)
        found, separation = targets(problem, pairs), hidden - teacher if problem.teacher_weight is None else None
        control = None
        if found is not None and found.places.shape[0] > 0 and problem.control_row is not None:
            control = problem.teacher_hidden[problem.control_row[pairs]].to(dtype)
        if found is not None and found.step is not None:
            teacher = teacher + found.step
            separation = None if separation is None else separation - found.step
        raw_t = project(teacher, head_t)
        if separation is not None:  # rounding relative to the difference, which the gradient is made of
            difference = project(separation, head_s)
            raw_s = raw_t + difference
        else:
            raw_s = project(hidden, head_s)
            difference = raw_s - raw_t
        pair = _pair(problem, difference, raw_s, raw_t, bias_s, bias_t)
        if control is not None and found is not None:
            alpha, gamma = torch.zeros(2, width, dtype=dtype, device=device)
            alpha[found.places], gamma[found.places] = found.contrast.to(dtype), found.plausibility.to(dtype)
            raw_c = project(control, head_t)
            z_c = _pair(problem, difference, raw_s, raw_c, bias_s, bias_t).z_t
            pair = _contrasted(problem, pair, z_c, alpha, gamma)
            del raw_c, z_c
        del difference, raw_s, raw_t
        measured, state = _measure(problem, pair, kind, labels)
        _store(statistics, chunk_slice, measured)
        if not need:
            continue
        n = chunk_slice.stop - chunk_slice.start
        chunk_rows = replace(problem, weight=problem.weight[chunk_slice], clip=problem.clip[chunk_slice])
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
            result.drow[chunk_slice], result.computed[chunk_slice] = drow[:n], live
        weighted = dlogits[:n] * torch.where(live, problem.weight[chunk_slice], 0.0)[:, None].to(dtype)
        if result.dweight is not None:
            result.dweight[:v].addmm_(weighted.T, hidden[:n].masked_fill(~live[:, None], 0.0))
        if result.dbias is not None:
            result.dbias[:v] += weighted.sum(0)
    if result.drow is not None:
        all_reduce(result.drow, problem.group)
    return result


def _logits_pair(problem: LogitsProblem, rows_s: Tensor, rows_t: Tensor) -> _Pair:
    raw_s, raw_t = problem.student_logits[rows_s], problem.teacher_logits[rows_t]
    raw_s, raw_t = raw_s.to(problem.compute_dtype), raw_t.to(problem.compute_dtype)
    return _pair(problem, raw_s - raw_t, raw_s, raw_t, None, None)


def logits_forward(problem: LogitsProblem, config: Config = CONFIG) -> LogitsResult:
    """Compute the statistics of every row, chunk by chunk."""
    r, v = problem.n_rows, problem.student_logits.shape[1]
    statistics = Statistics.empty(problem)
    state = torch.zeros(r, STATE, dtype=problem.compute_dtype, device=problem.device)
    for chunk_slice in chunks(r, max(1, config.on(problem.device) // problem.entries_a_rank(v))):
        pair = _logits_pair(problem, problem.student_row[chunk_slice], problem.teacher_row[chunk_slice])
        labels = None if problem.labels is None else problem.labels[chunk_slice]
        measured, state[chunk_slice, :KNOWN] = _measure(problem, pair, problem.kind[chunk_slice], labels)
        _store(statistics, chunk_slice, measured)
    return LogitsResult(statistics, state)


def logits_backward(
    problem: LogitsProblem, state: Tensor, row_grad: Tensor, *, out: Tensor | None = None, config: Config = CONFIG
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype: row_grad[r] * d divergence[r] / d student_logits, summed over pairs.

    `out` may be the student's logits, if no row of them is supervised twice. Rows with row_grad 0 are not read.
    """
    n, v = problem.student_logits.shape
    in_place = out is not None and out.data_ptr() == problem.student_logits.data_ptr()
    if out is None:
        out = torch.empty_like(problem.student_logits, memory_format=torch.contiguous_format)
    if not in_place:
        out.zero_()
    active = (row_grad != 0).nonzero().squeeze(1)
    for chunk_slice in chunks(active.shape[0], max(1, config.on(problem.device) // v)):
        r = active[chunk_slice]
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
