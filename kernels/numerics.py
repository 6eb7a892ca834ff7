"""Mathematics of one vocabulary entry, and running sums over entries, for the divergence kernels.

    z_s, z_t    a row's logits after bias, scale, softcap and temperature, fp32; -inf: an impossible entry
    L           log sum exp z, p = exp(z - L)
    gap         z_s - z_t; lse_gap = L_s - L_t; delta = log p_s - log p_t = gap - lse_gap

    forward KL  sum -p_t delta                                  d/dz_s = p_s - p_t
    reverse KL  sum p_s delta                                   d/dz_s = p_s (delta - KL)
    JSD(beta)   sum beta p_t log(p_t / m) + (1 - beta) p_s log(p_s / m), m = (1 - beta) p_s + beta p_t
                                                                d/dz_s = (1 - beta) p_s (log(p_s / m) - KL(p_s || m))

Both KL need one sweep: per side a running maximum, sum of exp(z - max) and sum of exp(z - max) (z - max), which gives
the entropy, and one gap weighted by the side that the expectation is over. The gap is kept relative to the difference
of both maxima so far, the pivot: a student whose logits lie far from the teacher's loses no digits of a small KL. Each
thread keeps a running maximum of its own for all entries that it loads at a time (Milakov & Gimelshein 2018): threads
meet once a row. Instructions decide: exponentials are exp2, entries x are logits as they lie in memory where a row has
one scale, z = unit x, and a subtraction before the scale keeps the digits of the likely ones. JSD and
the clip of each entry's term need both L first: a second sweep. So does DIFFERENCE, where the gap is known better than
either: the rounding of L would show, so the divergence is summed in a form that has it in second order only, and
the gradient's sum over the row, which is 0 but for that rounding, is taken off again. `p_s - p_t` is p_t expm1(delta)
where the models agree, so that a teacher close to its student costs no digits, and lse_gap is formed from
differences: nothing of size |L| is subtracted.

Triton has no expm1, log1p and tanh outside libdevice, which its interpreter lacks; those here are good to 2 eps.
"""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# Columns of a row's partial statistics, one set per slice of the vocabulary, and of its finished state.
# Maxima, gap and labels are those of x; moments count octaves.
MAX_S, SUM_S, MOMENT_S, MAX_T, SUM_T, MOMENT_T, GAP, LABEL_S, LABEL_T = map(tl.constexpr, range(9))
N_PARTIAL = 9
# A row's finished state: the maxima of x, 1 / sum exp(z - maximum), and in nats L_s - L_t, the pivot, the mean gap
# less the pivot, and the mean slope of the second sweep. csrc/numerics.h has the same columns.
ORIGIN_S, ORIGIN_T, INV_SUM_S, INV_SUM_T, LSE_GAP, PIVOT, MEAN_GAP, MEAN_SLOPE = map(tl.constexpr, range(8))

INF = tl.constexpr(float("inf"))
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # the maximum of entries that are all impossible
FLOOR = tl.constexpr(-200.0)  # octaves down, where exp2 is 0: 0 * -inf is NaN
REVERSE = tl.constexpr(1)  # as in vigos/divergence/supervision.py
JSD = tl.constexpr(2)


@triton.jit
def expm1_tail(x):
    """Return exp(x) - 1 - x for |x| < 0.7, a Taylor polynomial whose remainder is under 2**-26 of exp(x) - 1."""
    y = x * (1.0 / 362880.0) + (1.0 / 40320.0)
    y = y * x + (1.0 / 5040.0)
    y = y * x + (1.0 / 720.0)
    y = y * x + (1.0 / 120.0)
    y = y * x + (1.0 / 24.0)
    y = y * x + (1.0 / 6.0)
    y = y * x + 0.5
    return y * x * x


@triton.jit
def expm1(x):
    """Return exp(x) - 1."""
    return tl.where(tl.abs(x) < 0.7, x + expm1_tail(x), tl.exp(x) - 1.0)


@triton.jit
def expm1_near(x):
    """Return exp(x) - 1 for |x| < 0.25, a Taylor polynomial whose remainder is under 2**-24 of it."""
    y = x * (1.0 / 720.0) + (1.0 / 120.0)
    y = y * x + (1.0 / 24.0)
    y = y * x + (1.0 / 6.0)
    y = y * x + 0.5
    y = y * x + 1.0
    return y * x


@triton.jit
def log1p(x):
    """Return log(1 + x), x > -1: the rounding of 1 + x is undone by the factor (Goldberg 1991, theorem 4)."""
    w = 1.0 + x
    return tl.where((w == 1.0) | (w == INF), x, tl.log(w) * (x / (w - 1.0)))


@triton.jit
def tanh_and_slope(x):
    """Return (tanh(x), its derivative), both good near 0 and near +-1."""
    a = -2.0 * tl.abs(x)
    e = expm1(a)
    y = -e / (2.0 + e)
    u = tl.exp(a)
    return tl.where(x < 0.0, -y, y), 4.0 * u / ((1.0 + u) * (1.0 + u))


@triton.jit
def transform(raw, alpha, inner, height, SOFTCAP: tl.constexpr):
    """Return (z, dz/draw): height * tanh(inner * raw) with a softcap, else alpha * raw."""
    if SOFTCAP:
        y, slope = tanh_and_slope(raw * inner)
        return y * height, slope * alpha
    else:
        return raw * alpha, alpha


@triton.jit
def transform_pair(
    raw_s, raw_t, raw_gap, alpha_s, inner_s, height_s, alpha_t, inner_t, height_t,
    SOFTCAP_S: tl.constexpr, SOFTCAP_T: tl.constexpr, DIFFERENCE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return (x_s, x_t, x_s - x_t, dz_s/draw): z itself, or where both sides are SCALED alike z / alpha_s.

    Raw logits are given with their biases. DIFFERENCE: raw_gap is known better than either, and the gap keeps its
    digits; both transforms are the same.
    """
    if SCALED:
        return raw_s, raw_t, raw_gap, alpha_s
    else:
        z_s, slope = transform(raw_s, alpha_s, inner_s, height_s, SOFTCAP_S)
        z_t, _ = transform(raw_t, alpha_t, inner_t, height_t, SOFTCAP_T)
        gap = z_s - z_t
        if DIFFERENCE:  # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b); the cap makes infinite logits finite
            near, _ = tanh_and_slope(raw_gap * inner_s)
            gap = tl.where(tl.abs(raw_gap) < INF, near * (1.0 - (z_s / height_s) * (z_t / height_s)) * height_s, gap)
        return z_s, z_t, gap, slope


@triton.jit
def observe(top, total, moment, x, octaves):
    """Add entries (G, LANES, VEC) to each lane of a side; return the side, what its old sums shrank by, and exp.

    octaves: of a step of 1 in x.
    """
    highest = tl.maximum(top, tl.max(tl.max(x, 2), 0))
    down = (top - highest) * octaves
    keep = tl.exp2(down)
    a = (x - highest[None, :, None]) * octaves
    e = tl.exp2(a)  # NaN stays
    moment = keep * (moment + total * down) + tl.sum(tl.sum(e * tl.maximum(a, FLOOR), 2), 0)
    return highest, total * keep + tl.sum(tl.sum(e, 2), 0), moment, keep, e


@triton.jit
def observe_pair(
    top_s, total_s, moment_s, top_t, total_t, moment_t, gap, x_s, x_t, x_gap, octaves, REVERSE_ROW: tl.constexpr
):  # fmt: skip
    """Add entries (G, LANES, VEC) to each lane of both sides and the gap; `x_gap` is x_s - x_t.

    REVERSE_ROW: the student weights the gap.
    """
    pivot = top_s - top_t
    before = total_s if REVERSE_ROW else total_t
    top_s, total_s, moment_s, keep_s, e_s = observe(top_s, total_s, moment_s, x_s, octaves)
    top_t, total_t, moment_t, keep_t, e_t = observe(top_t, total_t, moment_t, x_t, octaves)
    keep = keep_s if REVERSE_ROW else keep_t
    e = e_s if REVERSE_ROW else e_t
    moved = top_s - top_t
    # 0 * inf: a gap that became infinite stays so unless its whole weight vanished.
    gap = tl.where(keep == 0.0, 0.0, keep * (gap + before * (pivot - moved)))
    gap += tl.sum(tl.sum(tl.where(e == 0.0, 0.0, e * (x_gap - moved[None, :, None])), 2), 0)
    return top_s, total_s, moment_s, top_t, total_t, moment_t, gap


@triton.jit
def merge_side(top, total, moment, octaves):
    """Merge the lanes of one side into (top, total, moment, the factor of each lane's sums)."""
    highest = tl.max(top, 0)
    down = (top - highest) * octaves
    f = tl.exp2(down)
    return highest, tl.sum(total * f, 0), tl.sum(f * (moment + total * down), 0), f


@triton.jit
def merge_pair(top_s, total_s, moment_s, top_t, total_t, moment_t, gap, octaves, reverse):
    """Merge all lanes of both sides; the result's pivot is the difference of its maxima, as each lane's is."""
    pivot = top_s - top_t
    total = tl.where(reverse, total_s, total_t)
    top_s, total_s, moment_s, f_s = merge_side(top_s, total_s, moment_s, octaves)
    top_t, total_t, moment_t, f_t = merge_side(top_t, total_t, moment_t, octaves)
    f = tl.where(reverse, f_s, f_t)
    gap = tl.sum(tl.where(f == 0.0, 0.0, f * (gap + total * (pivot - (top_s - top_t)))), 0)
    return top_s, total_s, moment_s, top_t, total_t, moment_t, gap


@triton.jit
def probability(x, origin, inv_sum, octaves):
    """Return exp(z - L) from x, its row's maximum, and 1 / sum exp(z - maximum)."""
    return tl.exp2((x - origin) * octaves) * inv_sum


@triton.jit
def difference(p_s, p_t, delta):
    """Return p_s - p_t without cancellation where the two are close."""
    return tl.where(tl.abs(delta) < 0.25, p_t * expm1_near(delta), p_s - p_t)


@triton.jit
def bregman(p, other, log_ratio):
    """Return p (r + exp(-r) - 1), r = log(p / other): an entry's term of KL(p || other) plus other - p, of sum 0.

    An error of lse_gap, which is one of rounding in L, is of second order in the sum.
    """
    near = tl.where(tl.abs(log_ratio) < 0.7, p * expm1_tail(-log_ratio), p * log_ratio + (other - p))
    return tl.where(p == 0.0, other, near)


@triton.jit
def jsd_term(p_s, p_t, delta, share):
    """Return the entry's term of JSD and the student's part of it, as csrc/numerics.h derives them."""
    c, a = tl.abs(share), tl.abs(delta)
    e, kept = expm1(-a), tl.exp(-a)
    up = delta > 0.0
    of_smaller = up == (share > 0.0)
    part = -c * e
    mixed = part + kept
    far = (part > kept) & (of_smaller == 0)
    z = tl.where(of_smaller, -part, tl.where(far, (1.0 - mixed) / mixed, part / tl.where(kept == 0.0, 1.0, kept)))
    log = log1p(z)
    most = tl.where(a > 1e3, 1e3, a)  # NaN stays
    to_larger = tl.where(far, -log, tl.where(of_smaller, log, log - most))
    to_smaller = tl.where(of_smaller | far, most + to_larger, log)
    second_order = tl.where(a < 0.7, expm1_tail(-a), e + most)
    curve = tl.where(a < 0.25, -(second_order + e * most), -e - most * kept)
    square = z * (1.0 / 56.0) - (1.0 / 42.0)
    square = square * z + (1.0 / 30.0)
    square = square * z - (1.0 / 20.0)
    square = square * z + (1.0 / 12.0)
    square = square * z - (1.0 / 6.0)
    square = square * z + 0.5
    square = tl.where(tl.abs(z) < 0.125, square * z * z, (1.0 + z) * log - z)  # (1 + z) log(1 + z) - z
    value = tl.where(of_smaller, c * curve - square, c * second_order - kept * square)
    value = tl.where(far, mixed * log - (1.0 - c) * most * kept, value)
    larger = tl.where(up, p_s, p_t)
    student = tl.where(share < 0.0, c, 1.0 - c) * p_s
    return (
        tl.where((p_s == 0.0) & (p_t == 0.0), 0.0, larger * value),
        tl.where(p_s == 0.0, 0.0, -student * tl.where(up, to_larger, to_smaller)),
    )


@triton.jit
def term(p_s, p_t, delta, kind, share):
    """Return (the entry's term of the divergence, p_s times its derivative to p_s, for reverse KL less p_s).

    The p_s that is subtracted sums to 1 and drops out of the gradient. Forward KL has no use for the second.
    """
    if kind == JSD:
        value, slope = jsd_term(p_s, p_t, delta, share)
    else:
        if kind == REVERSE:
            value = tl.where(p_s == 0.0, 0.0, p_s * delta)
        else:
            value = tl.where(p_t == 0.0, 0.0, -p_t * delta)
        slope = value
    return value, slope


@triton.jit
def clipped_slope(slope, p_s, p_t, delta, clipped, kind):
    """Return an entry's part of its logit's gradient, before p_s times the row's sum is subtracted."""
    if kind == 0:
        g = tl.where(clipped, p_s, difference(p_s, p_t, delta))
    elif kind == REVERSE:
        g = tl.where(clipped, -p_s, slope)
    else:
        g = tl.where(clipped, 0.0, slope)
    return g


@triton.jit
def second_terms(p_s, p_t, delta, kind, share, entry_clip, CLIP_ENTRIES: tl.constexpr):
    """Return what an entry adds to (divergence, mean slope) in the second sweep."""
    value, slope = term(p_s, p_t, delta, kind, share)
    clipped = value > entry_clip
    divergence = tl.where(clipped, entry_clip, value)
    if not CLIP_ENTRIES:
        if kind == 0:
            divergence = bregman(p_t, p_s, -delta)
        elif kind == REVERSE:
            divergence = bregman(p_s, p_t, delta)
    return divergence, clipped_slope(slope, p_s, p_t, delta, clipped, kind)


@triton.jit
def slope_of(
    gap, p_s, p_t, lse_gap, pivot, mean_gap, mean_slope, kind, share, entry_clip,
    CLIP_ENTRIES: tl.constexpr, DIFFERENCE: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Return d divergence / d z_s, of z_s - z_t in nats. SECOND: rows of JSD or with clipped entries may be there."""
    delta = gap - lse_gap
    if CLIP_ENTRIES:
        value, slope = term(p_s, p_t, delta, kind, share)
        g = clipped_slope(slope, p_s, p_t, delta, value > entry_clip, kind) - p_s * mean_slope
    else:
        if (kind == JSD) & SECOND:
            value, slope = term(p_s, p_t, delta, kind, share)
            g = slope - p_s * mean_slope
        else:
            if kind == REVERSE:
                # The normalisers drop out of log p_s - log p_t - KL.
                g = tl.where(p_s == 0.0, 0.0, p_s * ((gap - pivot) - mean_gap))
            else:
                g = difference(p_s, p_t, delta)
                if DIFFERENCE:
                    g -= p_s * mean_slope
    return g


# The interpreter runs kernels on CPU tensors; compiled kernels want a GPU. Triton decides when it decorates.
INTERPRETED = not isinstance(observe, JITFunction)
