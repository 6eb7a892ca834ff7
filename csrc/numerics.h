// The arithmetic of one supervised row, shared word for word by the CUDA kernels and their host tests.
//
// z_s, z_t are a row's logits after bias, scale, softcap and temperature; L = log sum exp z; p = exp(z - L);
// delta = log p_t - log p_s = (z_t - z_s) - (L_t - L_s).
//
//   forward KL  sum p_t delta                     d/dz_s = p_s - p_t
//   reverse KL  sum -p_s delta                    d/dz_s = p_s (-delta - KL)
//   JSD(beta)   sum beta p_t log(p_t/m) + (1 - beta) p_s log(p_s/m),  m = (1 - beta) p_s + beta p_t
//                                                 d/dz_s = (1 - beta) p_s (log(p_s/m) - KL(p_s || m))
//
// Both KL need one visit: a running maximum and sum per side (Milakov & Gimelshein 2018) and one weighted gap, whose
// weights are the side the expectation is taken over. JSD and the clip of each entry's term need both L first.
// Errors: L_t - L_s is formed from the differences of maxima and of log sums, so nothing of size |L| is subtracted;
// p_s - p_t is p_t expm1(-delta) where the models agree, so a teacher close to its student costs no digits.
// Probability 0 (z = -inf): the entry adds nothing on its side; forward KL is +inf where p_s = 0 < p_t, and reverse KL
// where p_t = 0 < p_s.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define VIGOS_HD __host__ __device__ __forceinline__
#else
#define VIGOS_HD inline
#endif

namespace vigos {

// As in vigos/supervision.py.
enum Kind : signed char { kForwardKL = 0, kReverseKL = 1, kJSD = 2 };

// FAST: ex2.approx, relative error about 2^-22 + |x| 2^-24; enough wherever a 16-bit gradient is written.
template <bool FAST>
VIGOS_HD float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (FAST) return __expf(x);
#endif
  return expf(x);
}

// What turns a raw logit x into z: softcap * tanh((x + bias) * scale / softcap) / temperature.
struct Transform {
  float scale = 1.0f;            // logit_scale; without softcap the temperature is folded into it
  float softcap = 0.0f;          // 0: none
  float inv_temperature = 1.0f;  // read with a softcap only
};

VIGOS_HD float transformed(float x, float bias, const Transform& t) {
  x = (x + bias) * t.scale;
  return t.softcap > 0.0f ? t.softcap * t.inv_temperature * tanhf(x / t.softcap) : x;
}

// dz/dx at the raw logit x.
VIGOS_HD float transform_slope(float x, float bias, const Transform& t) {
  if (!(t.softcap > 0.0f)) return t.scale;
  const float y = tanhf((x + bias) * t.scale / t.softcap);
  return t.scale * t.inv_temperature * (1.0f - y * y);
}

// One side of a row: max z, sum exp(z - max), sum exp(z - max) (z - max).
struct Side {
  float max = -INFINITY, sum = 0.0f, moment = 0.0f;

  VIGOS_HD float origin() const { return max == -INFINITY ? 0.0f : max; }  // -inf - -inf is NaN
  VIGOS_HD float lse() const { return max + logf(sum); }                   // nats
  VIGOS_HD float entropy() const { return logf(sum) - moment / sum; }      // nats
};

// Both sides and gap = sum w (x): w exp(z_t - max_t), x = z_t - z_s; with `reverse` w exp(z_s - max_s), x = z_s - z_t.
struct RowStats {
  Side student, teacher;
  float gap = 0.0f;
};

// Moves a side to a higher maximum; returns the factor of what was summed under the old one.
template <bool FAST>
VIGOS_HD float raise(Side& side, float max) {
  if (!(max > side.max)) return 1.0f;
  const float shift = side.max - max;
  side.max = max;
  if (side.sum == 0.0f) return 1.0f;  // nothing summed yet, and shift may be -inf
  const float factor = exp_of<FAST>(shift);
  side.moment = factor == 0.0f ? 0.0f : factor * (side.moment + side.sum * shift);
  side.sum *= factor;
  return factor;
}

template <bool FAST>
VIGOS_HD void raise(RowStats& row, float max_s, float max_t, bool reverse) {
  const float factor_s = raise<FAST>(row.student, max_s);
  const float factor_t = raise<FAST>(row.teacher, max_t);
  const float factor = reverse ? factor_s : factor_t;
  row.gap = factor == 0.0f ? 0.0f : factor * row.gap;  // the gap may be +inf
}

// Adds one entry; both maxima already cover it.
template <bool FAST>
VIGOS_HD void add(RowStats& row, float z_s, float z_t, bool reverse) {
  const float above_s = z_s - row.student.origin(), above_t = z_t - row.teacher.origin();
  const float e_s = exp_of<FAST>(above_s), e_t = exp_of<FAST>(above_t);
  row.student.sum += e_s;
  row.teacher.sum += e_t;
  row.student.moment += e_s == 0.0f ? 0.0f : e_s * above_s;
  row.teacher.moment += e_t == 0.0f ? 0.0f : e_t * above_t;
  const float weight = reverse ? e_s : e_t;
  row.gap += weight == 0.0f ? 0.0f : weight * (reverse ? z_s - z_t : z_t - z_s);
}

template <bool FAST>
VIGOS_HD void merge(RowStats& into, RowStats from, bool reverse) {
  const float max_s = fmaxf(into.student.max, from.student.max), max_t = fmaxf(into.teacher.max, from.teacher.max);
  raise<FAST>(into, max_s, max_t, reverse);
  raise<FAST>(from, max_s, max_t, reverse);
  into.student.sum += from.student.sum;
  into.student.moment += from.student.moment;
  into.teacher.sum += from.teacher.sum;
  into.teacher.moment += from.teacher.moment;
  into.gap += from.gap;
}

// Sums of the second visit; p_s * mean is what the gradient of JSD, or of a divergence with clipped entries, subtracts.
struct SecondSums {
  float divergence = 0.0f, mean = 0.0f;
};

// A row once its statistics are merged: everything an entry's probability, term and gradient need.
struct Row {
  Kind kind = kForwardKL;
  bool entries_clipped = false;  // entry_clip is finite
  float entry_clip = INFINITY, beta = 0.5f;
  float origin_s = 0.0f, origin_t = 0.0f, inv_sum_s = 0.0f, inv_sum_t = 0.0f;
  float lse_gap = 0.0f;   // L_t - L_s
  float mean_gap = 0.0f;  // gap / sum
  SecondSums sums;

  // Whether the row needs the second visit.
  VIGOS_HD bool second() const { return kind == kJSD || entries_clipped; }

  // Nats; of the first visit alone.
  VIGOS_HD float kl() const {
    const float value = kind == kReverseKL ? mean_gap + lse_gap : mean_gap - lse_gap;
    return value < 0.0f ? 0.0f : value;  // rounding; NaN stays
  }
  VIGOS_HD float divergence() const { return second() ? sums.divergence : kl(); }
};

VIGOS_HD Row finish(const RowStats& stats, Kind kind, float beta, float entry_clip) {
  Row row;
  row.kind = kind;
  row.beta = beta;
  row.entry_clip = entry_clip;
  row.entries_clipped = entry_clip < INFINITY;
  row.origin_s = stats.student.origin();
  row.origin_t = stats.teacher.origin();
  row.inv_sum_s = 1.0f / stats.student.sum;
  row.inv_sum_t = 1.0f / stats.teacher.sum;
  row.lse_gap = (stats.teacher.max - stats.student.max) + logf(stats.teacher.sum / stats.student.sum);
  row.mean_gap = stats.gap / (kind == kReverseKL ? stats.student.sum : stats.teacher.sum);
  return row;
}

// What a later gradient pass needs of a row: the normalisers, and the means that its gradient subtracts.
constexpr int kRowState = 7;

VIGOS_HD void save(const Row& row, float* state) {
  const float fields[kRowState] = {row.origin_s, row.origin_t, row.inv_sum_s, row.inv_sum_t,
                                   row.lse_gap,  row.mean_gap, row.sums.mean};
  for (int i = 0; i < kRowState; ++i) state[i] = fields[i];
}

VIGOS_HD Row restore(const float* state, Kind kind, float beta, float entry_clip) {
  Row row;
  row.kind = kind;
  row.beta = beta;
  row.entry_clip = entry_clip;
  row.entries_clipped = entry_clip < INFINITY;
  row.origin_s = state[0];
  row.origin_t = state[1];
  row.inv_sum_s = state[2];
  row.inv_sum_t = state[3];
  row.lse_gap = state[4];
  row.mean_gap = state[5];
  row.sums.mean = state[6];
  return row;
}

// One entry under known normalisers.
struct Entry {
  float p_s, p_t, delta;  // delta is +-inf or NaN where a probability is 0
};

template <bool FAST>
VIGOS_HD Entry entry_of(const Row& row, float z_s, float z_t) {
  return {exp_of<FAST>(z_s - row.origin_s) * row.inv_sum_s, exp_of<FAST>(z_t - row.origin_t) * row.inv_sum_t,
          (z_t - z_s) - row.lse_gap};
}

// log(p_s / m); log(p_t / m) is this plus delta, except where delta = +inf.
VIGOS_HD float log_student_over_mixture(float delta, float beta) {
  return delta > 0.0f ? -delta - log1pf((1.0f - beta) * expm1f(-delta)) : -log1pf(beta * expm1f(delta));
}

VIGOS_HD float log_teacher_over_mixture(float delta, float beta) {
  return delta > 0.0f ? -log1pf((1.0f - beta) * expm1f(-delta)) : delta - log1pf(beta * expm1f(delta));
}

// The entry's term of the divergence, before the entry clip.
VIGOS_HD float term(const Row& row, const Entry& e) {
  if (row.kind == kForwardKL) return e.p_t == 0.0f ? 0.0f : e.p_t * e.delta;
  if (row.kind == kReverseKL) return e.p_s == 0.0f ? 0.0f : -e.p_s * e.delta;
  const float teacher = e.p_t == 0.0f ? 0.0f : row.beta * e.p_t * log_teacher_over_mixture(e.delta, row.beta);
  const float student = e.p_s == 0.0f ? 0.0f : (1.0f - row.beta) * e.p_s * log_student_over_mixture(e.delta, row.beta);
  return teacher + student;
}

// p_s * d term / d p_s of an entry whose term is not clipped; reverse KL and JSD.
VIGOS_HD float term_slope(const Row& row, const Entry& e) {
  if (e.p_s == 0.0f) return 0.0f;
  if (row.kind == kReverseKL) return e.p_s * (1.0f - e.delta);
  return (1.0f - row.beta) * e.p_s * log_student_over_mixture(e.delta, row.beta);
}

VIGOS_HD void add_second(SecondSums& sums, const Row& row, const Entry& e) {
  const float value = term(row, e);
  const bool clipped = value > row.entry_clip;
  sums.divergence += clipped ? row.entry_clip : value;
  if (row.kind == kForwardKL) {
    sums.mean += clipped ? e.p_t : 0.0f;  // 1 - the kept mass: p_s * kept - p_t would cancel
  } else {
    sums.mean += clipped ? 0.0f : term_slope(row, e);
  }
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

// p_s - p_t, without cancellation where the two are close.
VIGOS_HD float difference(const Entry& e) {
  return fabsf(e.delta) < 0.25f ? e.p_t * expm1_small(-e.delta) : e.p_s - e.p_t;
}

// d divergence / d z_s of the entry, for rows of either KL without a second visit.
VIGOS_HD float gradient_kl(const Row& row, const Entry& e, float z_s, float z_t) {
  if (row.kind == kForwardKL) return difference(e);
  // The normalisers drop out: log p_s - log p_t - KL = (z_s - z_t) - mean_gap.
  return e.p_s == 0.0f ? 0.0f : e.p_s * ((z_s - z_t) - row.mean_gap);
}

// The same after a second visit.
VIGOS_HD float gradient_second(const Row& row, const Entry& e) {
  const bool clipped = term(row, e) > row.entry_clip;
  const float subtracted = e.p_s * row.sums.mean;
  if (row.kind == kForwardKL) return (clipped ? e.p_s : difference(e)) - subtracted;
  return (clipped ? 0.0f : term_slope(row, e)) - subtracted;
}

VIGOS_HD float gradient(const Row& row, const Entry& e, float z_s, float z_t) {
  return row.second() ? gradient_second(row, e) : gradient_kl(row, e, z_s, z_t);
}

}  // namespace vigos
