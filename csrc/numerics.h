// Names, codes and signs of the divergence for every engine in C++, and the arithmetic of one supervised row for the
// CUDA kernels and their host tests. kernels/numerics.py says the same for Triton, reference.py defines it.
//
// z_s, z_t are a row's logits after bias, scale, softcap and temperature; L = log sum exp z; p = exp(z - L);
// gap = z_s - z_t; lse_gap = L_s - L_t; delta = log p_s - log p_t = gap - lse_gap.
//
//   forward KL  sum -p_t delta                    d/dz_s = p_s - p_t
//   reverse KL  sum p_s delta                     d/dz_s = p_s (delta - KL)
//   JSD(beta)   sum beta p_t log(p_t/m) + (1 - beta) p_s log(p_s/m),  m = (1 - beta) p_s + beta p_t
//                                                 d/dz_s = (1 - beta) p_s (log(p_s/m) - KL(p_s || m))
//
// Instructions decide what the row kernels cost, so z is never formed: entries stay as x, raw logits where both sides
// have one scale, z = unit x, and exponents count octaves, log2 e z. Gaps and what follows from them stay in nats.
//
// Both KL need one visit: running maxima and sums (Milakov & Gimelshein 2018) and one weighted gap, whose weights are
// the side the expectation is taken over. JSD and the clip of each entry's term need both L first. Errors: nothing of
// size |L| is subtracted. gap comes from the raw logits, lse_gap from a sum of differences, and p_s - p_t is
// p_t expm1(delta) where the models agree: a teacher close to its student costs no digits. Probability 0 (z = -inf):
// the entry adds nothing on its side; forward KL is +inf where p_s = 0 < p_t, and reverse KL where p_t = 0 < p_s.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define VIGOS_HD __host__ __device__ __forceinline__
#else
#define VIGOS_HD inline
#endif

namespace vigos {

// As in vigos/divergence/supervision.py.
enum Kind : signed char { kForwardKL = 0, kReverseKL = 1, kJSD = 2 };

// As in vigos/divergence/engines/problem.py; kStoredPair: both sides' logits of an entry, see cuda/linear_hopper.h.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kStoredPair = 3 };

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kStoredPair ? 4 : 2; }

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kFloor = -200.0f;  // octaves down, where 2^x is 0: 0 * -inf is NaN
constexpr float kFar = 28.0f;      // octaves between the sides' maxima

// 2^x, relative error about 2^-22 + |x| 2^-24.
VIGOS_HD float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// From a raw logit x to z: height * tanh(inner * (x + bias)) with a softcap, else alpha * (x + bias).
// LogitTransform in vigos/divergence/engines/problem.py.
struct Transform {
  float alpha = 1.0f;   // scale / temperature
  float inner = 0.0f;   // scale / softcap; 0: no softcap
  float height = 0.0f;  // softcap / temperature

  bool operator==(const Transform&) const = default;
};

VIGOS_HD float transformed(float x, float bias, const Transform& t) {
  return t.inner > 0.0f ? t.height * tanhf((x + bias) * t.inner) : (x + bias) * t.alpha;
}

// dz/dx at the raw logit x.
VIGOS_HD float transform_slope(float x, float bias, const Transform& t) {
  if (!(t.inner > 0.0f)) return t.alpha;
  const float y = tanhf((x + bias) * t.inner);
  return t.alpha * (1.0f - y * y);
}

// An entry on both sides. gap = x_s - x_t, taken from the raw logits: it is exact to its own rounding where the models
// agree, while each z carries a rounding of its own size. NaN where both are -inf.
struct Logits {
  float x_s, x_t, gap;
};

VIGOS_HD Logits raw_pair(float x_s, float x_t) { return {x_s, x_t, x_s - x_t}; }

// z of both sides, unit 1. f_t: the teacher's transform; `alike`: it is the student's.
VIGOS_HD Logits transformed_pair(float x_s, float bias_s, float x_t, float bias_t, const Transform& f,
                                 const Transform& f_t, bool alike) {
  const float z_s = transformed(x_s, bias_s, f), z_t = transformed(x_t, bias_t, f_t);
  if (!alike) return {z_s, z_t, z_s - z_t};
  const float difference = (x_s - x_t) + (bias_s - bias_t);
  if (!(f.inner > 0.0f)) return {z_s, z_t, difference * f.alpha};
  // tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b); an infinite logit is at the cap, finite.
  const float gap = tanhf(difference * f.inner) * (1.0f - (z_s / f.height) * (z_t / f.height)) * f.height;
  return {z_s, z_t, fabsf(x_s) < INFINITY && fabsf(x_t) < INFINITY ? gap : z_s - z_t};
}

// expm1 for |x| < 1/4: the Taylor polynomial, whose remainder there is below 2^-24 of the value.
VIGOS_HD float expm1_small(float x) {
  float y = 1.0f / 720.0f;
  y = fmaf(y, x, 1.0f / 120.0f);
  y = fmaf(y, x, 1.0f / 24.0f);
  y = fmaf(y, x, 1.0f / 6.0f);
  y = fmaf(y, x, 0.5f);
  y = fmaf(y, x, 1.0f);
  return y * x;
}

// exp(-a) - 1 + a for a >= 0; `fallen` is 1 - exp(-a).
VIGOS_HD float second_order(float a, float fallen) {
  if (!(a < 0.25f)) return a - fallen;
  float y = -1.0f / 5040.0f;
  y = fmaf(y, a, 1.0f / 720.0f);
  y = fmaf(y, a, -1.0f / 120.0f);
  y = fmaf(y, a, 1.0f / 24.0f);
  y = fmaf(y, a, -1.0f / 6.0f);
  return fmaf(y, a, 0.5f) * a * a;
}

// (1 + z) log(1 + z) - z, given the logarithm; to rounding also where z is small.
VIGOS_HD float entropy_gap(float z, float log) {
  if (!(fabsf(z) < 0.125f)) return (1.0f + z) * log - z;
  float y = 1.0f / 56.0f;
  y = fmaf(y, z, -1.0f / 42.0f);
  y = fmaf(y, z, 1.0f / 30.0f);
  y = fmaf(y, z, -1.0f / 20.0f);
  y = fmaf(y, z, 1.0f / 12.0f);
  y = fmaf(y, z, -1.0f / 6.0f);
  return fmaf(y, z, 0.5f) * z * z;
}

// Running sums over some entries of a row, in octaves. Both sides are summed under one shift, the teacher's logits
// lowered by `offset`: e_s = 2^(z_s - shift), e_t = 2^(z_t - offset - shift). That makes sum_t - sum_s a sum of small
// differences where the models agree, and L_t - L_s = offset + log(1 + (sum_t - sum_s) / sum_s) exact to the size of
// the differences. `offset` is 0 unless the sides' maxima lie more than kFar apart, where one of them would underflow.
// Shift and offset are whole: they add up, and factors between shifts are powers of two, without a rounding.
struct RowStats {
  float max_s = -INFINITY, max_t = -INFINITY, offset = 0.0f;
  float sum_s = 0.0f, sum_t = 0.0f;        // sum e_s, sum e_t
  float excess = 0.0f;                     // sum (e_t - e_s), term by term
  float moment_s = 0.0f, moment_t = 0.0f;  // sum e_s log2 e_s, sum e_t log2 e_t
  float gap = 0.0f;                        // sum w (x_s - x_t); w = e_t, with `reverse` e_s

  VIGOS_HD float shift() const {
    const float m = ceilf(fmaxf(max_s, max_t - offset));
    return m == -INFINITY ? 0.0f : m;  // -inf - -inf is NaN
  }
  VIGOS_HD float shift_t() const { return shift() + offset; }

  // Nats.
  VIGOS_HD float lse_s() const { return (shift() + log2f(sum_s)) * kLn2; }
  VIGOS_HD float lse_t() const { return (shift_t() + log2f(sum_t)) * kLn2; }
  VIGOS_HD float entropy_s() const { return (log2f(sum_s) - moment_s / sum_s) * kLn2; }
  VIGOS_HD float entropy_t() const { return (log2f(sum_t) - moment_t / sum_t) * kLn2; }
  VIGOS_HD float lse_gap() const {
    const float ratio = excess / sum_s;
    return -(offset * kLn2 + (fabsf(ratio) < 0.5f ? log1pf(ratio) : logf(sum_t / sum_s)));
  }
};

VIGOS_HD float scaled(float factor, float x) { return factor == 0.0f ? 0.0f : factor * x; }  // x may be infinite

// Moves the sums to other maxima, at least as high, and another offset.
VIGOS_HD void rescale(RowStats& x, float max_s, float max_t, float offset, bool reverse) {
  const float old_s = x.shift(), old_t = x.shift_t();
  const bool together = offset == x.offset, empty = x.sum_s == 0.0f && x.sum_t == 0.0f;
  x.max_s = max_s;
  x.max_t = max_t;
  x.offset = offset;
  if (empty) return;
  const float down_s = old_s - x.shift(), down_t = together ? down_s : old_t - x.shift_t();
  const float factor_s = exp2_of(down_s), factor_t = together ? factor_s : exp2_of(down_t);
  x.moment_s = scaled(factor_s, x.moment_s + x.sum_s * down_s);
  x.moment_t = scaled(factor_t, x.moment_t + x.sum_t * down_t);
  x.sum_s *= factor_s;
  x.sum_t *= factor_t;
  x.excess = together ? x.excess * factor_s : x.sum_t - x.sum_s;
  x.gap = scaled(reverse ? factor_s : factor_t, x.gap);
}

VIGOS_HD bool covers(const RowStats& x, float max_s, float max_t) { return !(max_s > x.max_s) && !(max_t > x.max_t); }

// Makes room for entries of up to these maxima, in octaves.
VIGOS_HD void raise(RowStats& x, float max_s, float max_t, bool reverse) {
  if (covers(x, max_s, max_t)) return;
  max_s = fmaxf(max_s, x.max_s);
  max_t = fmaxf(max_t, x.max_t);
  const float between = max_t - max_s;
  const bool far = fabsf(between - x.offset) > kFar && fabsf(between) < INFINITY;
  rescale(x, max_s, max_t, far ? rintf(between) : x.offset, reverse);
}

// Adds one entry; the maxima already cover it. unit: z / x; shift, shift_t: the row's.
VIGOS_HD void add(RowStats& row, const Logits& x, float unit, float shift, float shift_t, bool reverse) {
  const float octaves = unit * kLog2E;
  const float a_s = fmaf(x.x_s, octaves, -shift), a_t = fmaf(x.x_t, octaves, -shift_t);
  const float e_s = exp2_of(a_s), e_t = exp2_of(a_t), above = fmaf(-x.gap, unit, -row.offset * kLn2);
  row.sum_s += e_s;
  row.sum_t += e_t;
  row.excess += fabsf(above) < 0.25f ? e_s * expm1_small(above) : e_t - e_s;
  row.moment_s = fmaf(e_s, fmaxf(a_s, kFloor), row.moment_s);
  row.moment_t = fmaf(e_t, fmaxf(a_t, kFloor), row.moment_t);
  const float weight = reverse ? e_s : e_t;
  if (weight != 0.0f) row.gap = fmaf(weight, x.gap, row.gap);
}

VIGOS_HD void merge(RowStats& into, RowStats from, bool reverse) {
  raise(into, from.max_s, from.max_t, reverse);
  raise(from, into.max_s, into.max_t, reverse);
  if (into.offset != from.offset) {  // one of them saw the sides far apart: both take the smaller offset's word
    const float offset = fabsf(into.offset) < fabsf(from.offset) ? into.offset : from.offset;
    rescale(into, into.max_s, into.max_t, offset, reverse);
    rescale(from, from.max_s, from.max_t, offset, reverse);
  }
  into.sum_s += from.sum_s;
  into.sum_t += from.sum_t;
  into.excess += from.excess;
  into.moment_s += from.moment_s;
  into.moment_t += from.moment_t;
  into.gap += from.gap;
}

// Sums of the second visit; p_s * mean_slope is what the gradient of JSD, or of a divergence with clipped entries,
// subtracts.
struct SecondSums {
  float divergence = 0.0f, mean_slope = 0.0f;
};

// A row once its statistics are merged: everything an entry's probability, term and gradient need.
struct Row {
  Kind kind = kForwardKL;
  bool entries_clipped = false;  // entry_clip is finite
  float entry_clip = INFINITY;
  float share = 0.5f;  // of JSD: the smaller of beta and 1 - beta, negative where it is the student's
  float unit = 1.0f;   // z / x
  float origin_s = 0.0f, origin_t = 0.0f;  // octaves
  float inv_sum_s = 0.0f, inv_sum_t = 0.0f;
  float lse_gap = 0.0f;   // L_s - L_t, nats
  float mean_gap = 0.0f;  // of x
  SecondSums sums;

  VIGOS_HD float octaves() const { return unit * kLog2E; }

  // Whether the row needs the second visit.
  VIGOS_HD bool second() const { return kind == kJSD || entries_clipped; }

  // Nats; of the first visit alone.
  VIGOS_HD float kl() const {
    const float difference = fmaf(mean_gap, unit, -lse_gap), value = kind == kReverseKL ? difference : -difference;
    return value < 0.0f ? 0.0f : value;  // rounding; NaN stays
  }
  VIGOS_HD float divergence() const { return second() ? sums.divergence : kl(); }
};

VIGOS_HD Row finish(const RowStats& stats, Kind kind, float share, float entry_clip, float unit) {
  Row row;
  row.kind = kind;
  row.unit = unit;
  row.share = share;
  row.entry_clip = entry_clip;
  row.entries_clipped = entry_clip < INFINITY;
  row.origin_s = stats.shift();
  row.origin_t = stats.shift_t();
  row.inv_sum_s = 1.0f / stats.sum_s;
  row.inv_sum_t = 1.0f / stats.sum_t;
  row.lse_gap = stats.lse_gap();
  row.mean_gap = stats.gap / (kind == kReverseKL ? stats.sum_s : stats.sum_t);
  return row;
}

// What a later gradient pass needs of a row: the normalisers, and the means that its gradient subtracts.
// Columns as in kernels/numerics.py, whose mean gap is relative to a pivot; here it is 0. Gaps in nats.
struct State {
  enum : int { kOriginS, kOriginT, kInvSumS, kInvSumT, kLseGap, kPivot, kMeanGap, kMeanSlope, kColumns };
};

VIGOS_HD void save(const Row& row, float* state) {
  state[State::kOriginS] = row.origin_s;
  state[State::kOriginT] = row.origin_t;
  state[State::kInvSumS] = row.inv_sum_s;
  state[State::kInvSumT] = row.inv_sum_t;
  state[State::kLseGap] = row.lse_gap;
  state[State::kPivot] = 0.0f;
  state[State::kMeanGap] = row.mean_gap * row.unit;
  state[State::kMeanSlope] = row.sums.mean_slope;
}

VIGOS_HD Row restore(const float* state, Kind kind, float share, float entry_clip, float unit) {
  Row row;
  row.kind = kind;
  row.unit = unit;
  row.share = share;
  row.entry_clip = entry_clip;
  row.entries_clipped = entry_clip < INFINITY;
  row.origin_s = state[State::kOriginS];
  row.origin_t = state[State::kOriginT];
  row.inv_sum_s = state[State::kInvSumS];
  row.inv_sum_t = state[State::kInvSumT];
  row.lse_gap = state[State::kLseGap];
  row.mean_gap = state[State::kMeanGap] / unit;
  row.sums.mean_slope = state[State::kMeanSlope];
  return row;
}

// One entry under known normalisers.
struct Entry {
  float p_s, p_t;
  float delta;  // nats; +-inf or NaN where a probability is 0
  float gap;    // x_s - x_t
};

VIGOS_HD Entry entry_of(const Row& row, const Logits& x) {
  const float octaves = row.octaves();
  return {exp2_of(fmaf(x.x_s, octaves, -row.origin_s)) * row.inv_sum_s,
          exp2_of(fmaf(x.x_t, octaves, -row.origin_t)) * row.inv_sum_t, fmaf(x.gap, row.unit, -row.lse_gap), x.gap};
}

// An entry's term of a divergence before the entry clip, and p_s times its derivative to p_s; for reverse KL less p_s,
// which sums to 1 and drops out.
struct Term {
  float value, slope;
};

// JSD. With a = |delta|, c = |share| the smaller of the mixture's weights, and that weight on the smaller probability,
// m = larger (1 + z), z = -c (1 - exp(-a)), and the term is larger (c k(a) - g(z)), k = 1 - exp(-a) - a exp(-a),
// g = (1 + z) log(1 + z) - z. With it on the larger one, m = smaller (1 + z), z = c (exp(a) - 1), and the term is
// larger (c h(a) - exp(-a) g(z)), h = exp(-a) - 1 + a. Both are of order c (1 - c) a^2 / 2 and at most half of their
// first part cancels, however small c and a are. Where z > 1, m / larger = c (1 - exp(-a)) + exp(-a) is used as it is.
VIGOS_HD Term jsd_term(const Entry& e, float share) {
  if (e.p_s == 0.0f && e.p_t == 0.0f) return {0.0f, 0.0f};
  const float c = fabsf(share), a = fabsf(e.delta), most = a > 1e3f ? 1e3f : a;
  const float fallen = -expm1f(-a), kept = expf(-a);
  const bool up = e.delta > 0.0f;
  const float part = c * fallen, mixed = part + kept, second = second_order(most, fallen);
  float z, log, value, to_larger, to_smaller;  // log m - log of each
  if (up == (share > 0.0f)) {
    z = -part;
    log = log1pf(z);
    const float k = a < 0.25f ? fallen * a - second : fallen - most * kept;
    value = c * k - entropy_gap(z, log);
    to_larger = log;
    to_smaller = log + most;
  } else if (part > kept) {
    log = log1pf((1.0f - mixed) / mixed);
    value = mixed * log - (1.0f - c) * most * kept;
    to_larger = -log;
    to_smaller = most - log;
  } else {
    z = part / kept;
    log = log1pf(z);
    value = c * second - kept * entropy_gap(z, log);
    to_larger = log - most;
    to_smaller = log;
  }
  const float student = (share < 0.0f ? c : 1.0f - c) * e.p_s;
  return {(up ? e.p_s : e.p_t) * value, e.p_s == 0.0f ? 0.0f : -student * (up ? to_larger : to_smaller)};
}

VIGOS_HD Term term(const Row& row, const Entry& e) {
  if (row.kind == kJSD) return jsd_term(e, row.share);
  if (row.kind == kForwardKL) return {e.p_t == 0.0f ? 0.0f : -e.p_t * e.delta, 0.0f};
  const float value = e.p_s == 0.0f ? 0.0f : e.p_s * e.delta;
  return {value, value};
}

// The slope of a term that may be clipped.
VIGOS_HD float clipped_slope(const Row& row, const Entry& e, float slope, bool clipped) {
  if (!clipped) return slope;
  return row.kind == kReverseKL ? -e.p_s : 0.0f;
}

VIGOS_HD void add_second(SecondSums& sums, const Row& row, const Entry& e) {
  const Term t = term(row, e);
  const bool clipped = t.value > row.entry_clip;
  sums.divergence += clipped ? row.entry_clip : t.value;
  if (row.kind == kForwardKL) {
    sums.mean_slope += clipped ? e.p_t : 0.0f;  // 1 - the kept mass: p_s * kept - p_t would cancel
  } else {
    sums.mean_slope += clipped_slope(row, e, t.slope, clipped);
  }
}

// p_s - p_t, without cancellation where the two are close.
VIGOS_HD float difference(const Entry& e) {
  return fabsf(e.delta) < 0.25f ? e.p_t * expm1_small(e.delta) : e.p_s - e.p_t;
}

// d divergence / d z_s of the entry, for rows of either KL without a second visit.
template <bool REVERSE>
VIGOS_HD float gradient_kl(const Row& row, const Entry& e) {
  if (!REVERSE) return difference(e);
  // The normalisers drop out: log p_s - log p_t - KL = gap - mean_gap.
  return e.p_s == 0.0f ? 0.0f : e.p_s * ((e.gap - row.mean_gap) * row.unit);
}

// The same after a second visit.
VIGOS_HD float gradient_second(const Row& row, const Entry& e) {
  const Term t = term(row, e);
  const bool clipped = t.value > row.entry_clip;
  const float subtracted = e.p_s * row.sums.mean_slope;
  if (row.kind == kForwardKL) return (clipped ? e.p_s : difference(e)) - subtracted;
  return clipped_slope(row, e, t.slope, clipped) - subtracted;
}

VIGOS_HD float gradient(const Row& row, const Entry& e) {
  if (row.second()) return gradient_second(row, e);
  return row.kind == kReverseKL ? gradient_kl<true>(row, e) : gradient_kl<false>(row, e);
}

}  // namespace vigos
