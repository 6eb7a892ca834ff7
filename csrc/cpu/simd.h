// Vectors and the few functions the row kernels need, for one instruction set.
//
// Included by one source per instruction set, which defines VIGOS_ISA (a namespace, so that the linker never mixes
// them) and VIGOS_LANES. GCC's and Clang's vector extensions do the rest. Relative errors, measured by
// tests/test_csrc.py: exp_ 1 ulp, fall().e and log1p_ 2 ulp, tanh_ 3 ulp.
#pragma once

#include <cstdint>

namespace vigos::cpu::VIGOS_ISA {

constexpr int W = VIGOS_LANES;
typedef float vf __attribute__((vector_size(VIGOS_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(VIGOS_LANES * 4)));

constexpr float kInf = __builtin_inff();

inline vf splat(float x) { return x - vf{}; }  // x + 0 would be an addition: -0 + 0 is 0
inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vi load(const int32_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vi bits(vf v) { return (vi)v; }
inline vf from_bits(vi v) { return (vf)v; }
inline vf max_(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
inline vf min_(vf a, vf b) { return a < b ? a : b; }
inline vf abs_(vf a) { return from_bits(bits(a) & 0x7fffffff); }

// exp(r) - 1 - r for |r| <= log(2) / 2: r^2 times a Chebyshev fit of degree 5, relative error 3e-9.
inline vf exp_tail(vf r) {
  const vf r2 = r * r;  // Estrin's scheme: a loop of these waits for results more than for room to compute
  const vf q0 = 1.666666668e-01f * r + 5.000000014e-01f, q1 = 8.333310845e-03f * r + 4.166646420e-02f;
  const vf q2 = 1.989108044e-04f * r + 1.393373071e-03f;
  return r2 * ((q2 * r2 + q1) * r2 + q0);
}

struct Reduced {
  vf r;      // x - n log 2
  vi shift;  // n << 23
};

// n = round(x / log 2), by adding a number whose last bit is worth 1; for |x| < 2^21.
inline Reduced reduce(vf x) {
  const vf t = x * 1.44269504f + 12582912.0f;
  const vf n = t - 12582912.0f;
  const vf r = (x - n * 0.693145752f) - n * 1.42860677e-06f;
  return {r, bits(t) << 23};
}

// exp(x) for x <= 80; 0 below -87.3, where the result would be denormal. NaN stays NaN.
inline vf exp_(vf x) {
  const Reduced a = reduce(x);
  const vf two_n = from_bits(a.shift + 0x3f800000);
  return x < -87.3f ? vf{} : (a.r + exp_tail(a.r)) * two_n + two_n;
}

// What falling by a >= 0 does to a probability, each to rounding for small a as well.
struct Fall {
  vf e;   // exp(-a) - 1
  vf ex;  // exp(-a)
  vf h;   // exp(-a) - 1 + a
};

inline Fall fall(vf a) {
  const Reduced x = reduce(max_(-a, splat(-87.0f)));
  const vf tail = exp_tail(x.r);
  const vi unscaled = x.shift == 0;
  const vf ex = from_bits(bits(1.0f + (x.r + tail)) + x.shift);
  const vf far = a > 87.0f ? vf{} : ex;
  const vf e = unscaled ? x.r + tail : far - 1.0f;
  return {e, far, unscaled ? tail : e + a};
}

// log(1 + u) for finite u > -1.
inline vf log1p_(vf u) {
  const vf w = 1.0f + u;
  const vi k = (bits(w) - 0x3f3504f3) >> 23;  // w = 2^k m, m in [sqrt(1/2), sqrt(2))
  const vf f = k == 0 ? u : from_bits(bits(w) - (k << 23)) - 1.0f;
  const vf s = f / (2.0f + f), z = s * s, half = 0.5f * f * f;
  vf series = z * 0.181818182f + 0.222222222f;
  series = series * z + 0.285714286f;
  series = series * z + 0.4f;
  series = series * z + 0.666666667f;
  const vf n = __builtin_convertvector(k, vf);
  const vf lost = k == 0 ? vf{} : (u - (w - 1.0f)) / w;  // what rounding 1 + u lost
  return n * 0.693145752f + (f - (half - (s * (half + z * series) + (n * 1.42860677e-06f + lost))));
}

inline vf tanh_(vf y) {
  const vf e = fall(2.0f * abs_(y)).e;
  const vf t = -e / (2.0f + e);
  return y != y ? y : from_bits(bits(t) | (bits(y) & (int32_t)0x80000000));
}

}  // namespace vigos::cpu::VIGOS_ISA
