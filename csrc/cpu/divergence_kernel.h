// The row kernels for one instruction set. See divergence.h for the layout, simd.h for the vectors.
//
// With delta = log p_s - log p_t, formed as gap - lse_gap = (z_s - z_t) - (L_s - L_t) so that a teacher close to its
// student costs no digits, and p_s, p_t formed from the larger of the two and exp(-|delta|):
//
//   forward KL  sum p_t (expm1(delta) - delta)         a = p_s - p_t
//   reverse KL  sum p_s (expm1(-delta) + delta)        a = p_s delta
//   JSD(beta)   sum beta p_t (log p_t - log m) + a,  a = (1 - beta) p_s (log p_s - log m),  m = (1 - beta) p_s + beta
//   p_t
//
// and d/dz_s = a - p_s S with S = sum a, the same for all three. The KL sums are the textbook ones plus
// sum (p_s - p_t) = 0: no term is negative, and an error of lse_gap shows in second order only; a - p_s S does
// not show one at all. With a clip the textbook terms u are clipped: where u is above it, a = p_s for forward and -p_s
// for reverse KL, 0 for JSD. The first visit accumulates exp(z - max) in float32 over 64 entries and in float64 from
// there on, so do the others.
#pragma once

#include "divergence.h"
#include "simd.h"

namespace vigos::cpu::VIGOS_ISA {

constexpr int kBlock = 64;

// How raw logits become z: alpha * raw, the same with biases, with a softcap, or each side in a way of its own.
// kDifference is added to one of the first three.
enum { kScaled, kBiased, kCapped, kUnlike, kDifference = 4 };

struct Entry {
  vf z_s, z_t, gap;  // gap = z_s - z_t, with as little rounding as possible
  vf slope;          // d z_s / d raw_s
};

template <int FORM>
inline Entry entry(vf raw_s, vf raw_t, const Transforms& f, int64_t v) {
  Entry out;
  vf difference = raw_s - raw_t;
  if constexpr ((FORM & kDifference) != 0) {
    difference = raw_s;
    raw_s += raw_t;
  }
  if constexpr ((FORM & 3) != kScaled) {
    if (f.bias_gap != nullptr) {
      raw_s += f.bias_s[v];
      raw_t += f.bias_t[v];
      difference += f.bias_gap[v];
    }
  }
  const float alpha = f.student.alpha, inner = f.student.inner, height = f.student.height;
  if constexpr ((FORM & 3) == kCapped) {
    const vf t_s = tanh_(raw_s * inner), t_t = tanh_(raw_t * inner);
    out.z_s = t_s * height;
    out.z_t = t_t * height;
    const vf gap = tanh_(difference * inner) * (1.0f - t_s * t_t) * height;
    out.gap = abs_(difference) < kInf ? gap : out.z_s - out.z_t;  // the cap makes infinite logits finite
    out.slope = (1.0f - t_s * t_s) * alpha;
    return out;
  }
  out.z_s = raw_s * alpha;
  out.z_t = raw_t * f.teacher.alpha;
  out.slope = splat(alpha);
  if constexpr (FORM == kUnlike) {
    if (inner != 0.0f) {
      const vf t_s = tanh_(raw_s * inner);
      out.z_s = t_s * height;
      out.slope = (1.0f - t_s * t_s) * alpha;
    }
    if (f.teacher.inner != 0.0f) out.z_t = tanh_(raw_t * f.teacher.inner) * f.teacher.height;
    difference = out.z_s - out.z_t;
  } else {
    difference *= alpha;
  }
  if constexpr (FORM == kScaled + kDifference) {
    out.gap = difference;  // products of finite numbers: none is -inf
  } else {
    const vi neither = (out.z_s == -kInf) & (out.z_t == -kInf);
    out.gap = neither ? vf{} : difference;
  }
  return out;
}

// Brings what the next block has at the same place into the second-level cache: its rows lie far apart, and the
// hardware does not look past a page.
inline void fetch_next_block(const float* p, int64_t ld) { __builtin_prefetch(p + kBlock * ld, 0, 2); }

// Moves a column's running sums to a maximum at least as high and adds a block's.
inline void add_block(double* top, double* total, double* first, vf most, vf sum, vf sum_first) {
  for (int l = 0; l < W; ++l) {
    if (most[l] != top[l] && total[l] != 0.0) {  // exp of the fall of everything summed so far
      const double fall = top[l] - most[l], fallen = __builtin_exp(fall);
      first[l] = fallen * (first[l] + total[l] * fall);
      total[l] *= fallen;
    }
  }
  for (int l = 0; l < W; ++l) {
    top[l] = most[l];
    total[l] += sum[l];
    first[l] += sum_first[l];
  }
}

template <int FORM>
void statistics_form(const View& view, const Transforms& f, double* sums) {
  vf z_s[kBlock], z_t[kBlock];
  for (int64_t from = 0; from < view.steps; from += kBlock) {
    const int n = static_cast<int>(view.steps - from < kBlock ? view.steps - from : kBlock);
    for (int64_t lane = 0; lane < view.lanes; lane += W) {
      const float* s = view.s + from * view.ld_s + lane;
      const float* t = view.t + from * view.ld_t + lane;
      const auto row = [&](int i) { return sums + i * view.lanes + lane; };
      vf most_s{}, most_t{};
      for (int l = 0; l < W; ++l) {
        most_s[l] = static_cast<float>(row(Sums::kTopS)[l]);
        most_t[l] = static_cast<float>(row(Sums::kTopT)[l]);
      }
      for (int i = 0; i < n; ++i) {
        const Entry e = entry<FORM>(load(s + i * view.ld_s), load(t + i * view.ld_t), f, view.start + from + i);
        z_s[i] = e.z_s;
        z_t[i] = e.z_t;
        most_s = max_(e.z_s, most_s);
        most_t = max_(e.z_t, most_t);
      }
      const vf base_s = most_s == -kInf ? vf{} : most_s, base_t = most_t == -kInf ? vf{} : most_t;
      vf sum_s{}, sum_t{}, sum_first_s{}, sum_first_t{};
      for (int i = 0; i < n; ++i) {
        // Where exp is 0 all the same, but not -inf, whose product with 0 is NaN; a NaN stays.
        const vf d_s = max_(splat(-100.0f), z_s[i] - base_s), d_t = max_(splat(-100.0f), z_t[i] - base_t);
        const vf e_s = exp_(d_s), e_t = exp_(d_t);
        sum_s += e_s;
        sum_t += e_t;
        sum_first_s += e_s * d_s;
        sum_first_t += e_t * d_t;
      }
      add_block(row(Sums::kTopS), row(Sums::kTotalS), row(Sums::kFirstS), most_s, sum_s, sum_first_s);
      add_block(row(Sums::kTopT), row(Sums::kTotalT), row(Sums::kFirstT), most_t, sum_t, sum_first_t);
    }
  }
}

struct Column {
  vf top_s, top_t, log_sum_s, log_sum_t, lse_gap;
};

inline Column column(const Normalised& n, int64_t lane) {
  return {load(n.top_s + lane), load(n.top_t + lane), load(n.log_sum_s + lane), load(n.log_sum_t + lane),
          load(n.lse_gap + lane)};
}

// min(x, most), and NaN where x is.
inline vf capped(vf x, float most) { return x > most ? splat(most) : x; }

struct Terms {
  vf value;  // of the divergence
  vf a;      // of the gradient
  vf p_s;
};

// (1 + z) log(1 + z) - z, given the logarithm; to rounding also where z is small.
inline vf entropy_gap(vf z, vf log) {
  vf y = z * (1.0f / 56.0f) - 1.0f / 42.0f;
  y = y * z + 1.0f / 30.0f;
  y = y * z - 1.0f / 20.0f;
  y = y * z + 1.0f / 12.0f;
  y = y * z - 1.0f / 6.0f;
  y = y * z + 0.5f;
  return abs_(z) < 0.125f ? y * z * z : (1.0f + z) * log - z;
}

// VALUE: of the unclipped KL, whose terms the third visit has no use for.
template <int KIND, bool CLIP, bool VALUE>
inline Terms terms(const Entry& e, const Column& c, const Options& o) {
  const vf delta = e.gap - c.lse_gap;
  const vi up = delta > 0.0f;  // the student's probability is the larger
  const vf a = abs_(delta);
  const Fall f = fall(a);
  const vf larger = exp_(up ? (e.z_s - c.top_s) - c.log_sum_s : (e.z_t - c.top_t) - c.log_sum_t);
  const vf smaller = larger * f.ex;
  const vf p_s = up ? larger : smaller, p_t = up ? smaller : larger;
  const vf nothing = delta == delta ? vf{} : delta;
  if constexpr (KIND == kJSD) {
    // The arms of jsd_term in csrc/numerics.h.
    const float share = o.share < 0.0f ? -o.share : o.share;
    const vi of_smaller = o.share > 0.0f ? up : ~up;
    const vf part = -share * f.e, mixed = part + f.ex, most = capped(a, 200.0f);
    const vi far = ~of_smaller & (part > f.ex);
    const vf z = of_smaller ? -part : (far ? (1.0f - mixed) / mixed : part / f.ex);
    const vf log = log1p_(z);
    const vf to_larger = far ? -log : (of_smaller ? log : log - most);  // log m - log larger
    const vf to_smaller = of_smaller | far ? to_larger + most : log;
    const vf k = a < 0.25f ? -(f.h + f.e * a) : -f.e - most * f.ex;
    const vf gap = entropy_gap(z, log);
    const vf near = of_smaller ? share * k - gap : share * f.h - f.ex * gap;
    const vf u = larger * (far ? mixed * log - (1.0f - share) * most * f.ex : near);
    const vf g = (o.share > 0.0f ? share - 1.0f : -share) * (p_s * (up ? to_larger : to_smaller));
    if constexpr (CLIP) return {capped(u, o.entry_clip), u <= o.entry_clip ? g : nothing, p_s};
    return {u, g, p_s};
  } else {
    // The terms of the KL weighted by the larger probability, and by the smaller one.
    vf value{};
    if constexpr (VALUE) {
      const vf of_larger = a == kInf ? a : larger * f.h;
      const vf of_smaller = -larger * (a < 0.25f ? f.h + f.e * a : f.e + capped(a, 200.0f) * f.ex);
      value = (KIND == kReverseKL ? up : ~up) ? of_larger : of_smaller;
    }
    const vf difference = larger * (up ? -f.e : f.e);
    const vf weight = KIND == kReverseKL ? p_s : p_t;
    const vf u = weight > 0.0f ? weight * (KIND == kReverseKL ? delta : -delta) : nothing;
    const vf a_inside = KIND == kReverseKL ? u : difference;
    if constexpr (CLIP) {
      const vi outside = u > o.entry_clip;
      return {outside ? splat(o.entry_clip) : u, outside ? (KIND == kReverseKL ? -p_s : p_s) : a_inside, p_s};
    }
    return {value, a_inside, p_s};
  }
}

// A strip with rows of several kinds runs the code of each and keeps its own columns: a row's result does not depend on
// who stands beside it, to the last bit.
template <int FORM, int KIND, bool CLIP>
void measure_strip(const View& view, int64_t from, int n, int64_t lane, const Transforms& f, const Options& o,
                   const Normalised& normalised, double* value, double* gradient, float* a, float* p_s) {
  const Column c = column(normalised, lane);
  const vi mine = load(normalised.kind + lane) == KIND;
  bool all_mine = true;
  for (int l = 0; l < W; ++l) all_mine &= mine[l] != 0;
  const int64_t at_s = from * view.ld_s + lane, at_t = from * view.ld_t + lane;
  const float *s = view.s + at_s, *t = view.t + at_t;
  vf sum_value{}, sum_a{};
  for (int i = 0; i < n; ++i) {
    const Entry e = entry<FORM>(load(s + i * view.ld_s), load(t + i * view.ld_t), f, view.start + from + i);
    const Terms term = terms<KIND, CLIP, !CLIP>(e, c, o);
    sum_value += term.value;
    sum_a += term.a;
    fetch_next_block(s + i * view.ld_s, view.ld_s);
    fetch_next_block(t + i * view.ld_t, view.ld_t);
    if (a != nullptr) {
      float *to_a = a + at_s + i * view.ld_s, *to_p = p_s + at_t + i * view.ld_t;
      store(to_a, all_mine ? term.a * e.slope : (mine ? term.a * e.slope : load(to_a)));
      store(to_p, all_mine ? term.p_s * e.slope : (mine ? term.p_s * e.slope : load(to_p)));
    }
  }
  for (int l = 0; l < W; ++l) {
    if (normalised.kind[lane + l] != KIND) continue;
    value[lane + l] += sum_value[l];
    gradient[lane + l] += sum_a[l];
  }
}

template <int FORM, int KIND, bool CLIP>
void gradient_strip(const View& view, int64_t from, int n, int64_t lane, const Transforms& f, const Options& o,
                    const Normalised& normalised, const float* scale, float* out, int64_t ld_out) {
  const Column c = column(normalised, lane);
  const vf S = load(normalised.mean_slope + lane), factor = load(scale + lane);
  const vi mine = load(normalised.kind + lane) == KIND;
  const float* s = view.s + from * view.ld_s + lane;
  const float* t = view.t + from * view.ld_t + lane;
  out += from * ld_out + lane;
  for (int i = 0; i < n; ++i) {
    const Entry e = entry<FORM>(load(s + i * view.ld_s), load(t + i * view.ld_t), f, view.start + from + i);
    const Terms term = terms<KIND, CLIP, false>(e, c, o);
    float* dest = out + i * ld_out;
    store(dest, mine ? (term.a - term.p_s * S) * (e.slope * factor) : load(dest));
  }
}

template <typename Visit>
void with_form(const Transforms& f, Visit&& visit) {
  const int alike = f.student.inner != 0.0f ? kCapped : (f.bias_gap != nullptr ? kBiased : kScaled);
  const int form = f.student == f.teacher ? alike : kUnlike;
  switch (f.difference ? form + kDifference : form) {
    case kScaled:
      return visit.template operator()<kScaled>();
    case kBiased:
      return visit.template operator()<kBiased>();
    case kCapped:
      return visit.template operator()<kCapped>();
    case kUnlike:
      return visit.template operator()<kUnlike>();
    case kScaled + kDifference:
      return visit.template operator()<kScaled + kDifference>();
    case kBiased + kDifference:
      return visit.template operator()<kBiased + kDifference>();
    default:
      return visit.template operator()<kCapped + kDifference>();
  }
}

// Runs `visit<FORM, KIND, CLIP>(from, n, lane)` for every block, strip and kind of a row in it.
template <typename Visit>
void for_strips(const View& view, const Transforms& f, const Options& o, const Normalised& normalised, Visit&& visit) {
  with_form(f, [&]<int FORM>() {
    const auto with_clip = [&]<int KIND>(int64_t from, int n, int64_t lane) {
      if (o.has_clip)
        visit.template operator()<FORM, KIND, true>(from, n, lane);
      else
        visit.template operator()<FORM, KIND, false>(from, n, lane);
    };
    for (int64_t from = 0; from < view.steps; from += kBlock) {
      const int n = static_cast<int>(view.steps - from < kBlock ? view.steps - from : kBlock);
      for (int64_t lane = 0; lane < view.lanes; lane += W) {
        int kinds = 0;
        for (int l = 0; l < W; ++l) kinds |= 1 << normalised.kind[lane + l];
        if ((kinds & 1 << kForwardKL) != 0) with_clip.template operator()<kForwardKL>(from, n, lane);
        if ((kinds & 1 << kReverseKL) != 0) with_clip.template operator()<kReverseKL>(from, n, lane);
        if ((kinds & 1 << kJSD) != 0) with_clip.template operator()<kJSD>(from, n, lane);
      }
    }
  });
}

void statistics(const View& view, const Transforms& f, double* sums) {
  with_form(f, [&]<int FORM>() { statistics_form<FORM>(view, f, sums); });
}

void measure(const View& view, const Transforms& f, const Options& o, const Normalised& normalised, double* value,
             double* gradient, float* a, float* p_s) {
  for_strips(view, f, o, normalised, [&]<int FORM, int KIND, bool CLIP>(int64_t from, int n, int64_t lane) {
    measure_strip<FORM, KIND, CLIP>(view, from, n, lane, f, o, normalised, value, gradient, a, p_s);
  });
}

void gradient(const View& view, const Transforms& f, const Options& o, const Normalised& normalised, const float* scale,
              float* out, int64_t ld_out) {
  for_strips(view, f, o, normalised, [&]<int FORM, int KIND, bool CLIP>(int64_t from, int n, int64_t lane) {
    gradient_strip<FORM, KIND, CLIP>(view, from, n, lane, f, o, normalised, scale, out, ld_out);
  });
}

}  // namespace vigos::cpu::VIGOS_ISA
