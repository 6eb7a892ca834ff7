// Float32 matrix products for one instruction set, in the two shapes the divergence needs.
//
// A product is computed in pieces of at most kDepth along k, each summed from zero in registers and then added to c:
// the sum over a vocabulary does not lose digits to its own size. An element's result depends on its row of a and its
// column of b alone, not on how many others there are or where it stands among them; vendor libraries do not promise
// that.
#pragma once

#include "divergence.h"
#include "simd.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vigos::cpu::VIGOS_ISA {

constexpr int kRows = VIGOS_TILE_ROWS;        // rows of a register tile
constexpr int kVectors = VIGOS_TILE_VECTORS;  // vectors across it
constexpr int kPanel = kVectors * W;

template <int ROWS, int VECTORS, bool TILED>
inline void tile(const float* a, int64_t ld, const float* b, int64_t k, float* c, int64_t ld_c, bool add) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    // The last product's rows of c lie far apart and were last seen a whole visit of them ago.
    for (int j = 0; TILED && j < VECTORS * W; j += 16) __builtin_prefetch(c + i * ld_c + j, 1, 3);
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = vf{};
  }
  for (int64_t p = 0; p < k; ++p) {
    vf right[VECTORS];
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) right[j] = load(b + p * (VECTORS * W) + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const vf left = splat(TILED ? a[p * kRows + i] : a[i * ld + p]);
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) {
      float* dest = c + i * ld_c + j * W;
      store(dest, add ? load(dest) + sum[i][j] : sum[i][j]);
    }
  }
}

// Rows that do not fill a tile: one tile of as many.
template <int ROWS, int VECTORS, bool TILED>
inline void last_tile(int64_t rows, const float* a, int64_t ld, const float* b, int64_t k, float* c, int64_t ld_c,
                      bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return tile<ROWS, VECTORS, TILED>(a, ld, b, k, c, ld_c, add);
    last_tile<ROWS - 1, VECTORS, TILED>(rows, a, ld, b, k, c, ld_c, add);
  }
}

template <int VECTORS, bool TILED>
void strip_of_tiles(const float* a, int64_t ld, const float* b, int64_t m, int64_t k, float* c, int64_t ld_c,
                    bool add) {
  for (int64_t i = 0; i < m; i += kRows) {
    const float* left = a + (TILED ? i * k : i * ld);
    if (m - i >= kRows)
      tile<kRows, VECTORS, TILED>(left, ld, b, k, c + i * ld_c, ld_c, add);
    else
      last_tile<kRows - 1, VECTORS, TILED>(m - i, left, ld, b, k, c + i * ld_c, ld_c, add);
  }
}

template <bool TILED>
void panel_product(const float* a, int64_t ld, const float* b, int vectors, int64_t m, int64_t k, float* c,
                   int64_t ld_c, bool add) {
  static_assert(kVectors <= 4);
  switch (vectors) {
    case 1:
      return strip_of_tiles<1, TILED>(a, ld, b, m, k, c, ld_c, add);
    case 2:
      return strip_of_tiles<2, TILED>(a, ld, b, m, k, c, ld_c, add);
    case 3:
      return strip_of_tiles<3, TILED>(a, ld, b, m, k, c, ld_c, add);
    default:
      return strip_of_tiles<4, TILED>(a, ld, b, m, k, c, ld_c, add);
  }
}

// One panel of columns.
template <bool TILED>
void panel_columns(const float* a, int64_t ld, const float* b, int64_t m, int64_t columns, int64_t k, float* c,
                   int64_t ld_c, bool add) {
  const int vectors = static_cast<int>((columns + W - 1) / W);
  if (columns % W == 0) return panel_product<TILED>(a, ld, b, vectors, m, k, c, ld_c, add);
  float edge[kRows * kPanel];  // columns that do not fill a vector
  for (int64_t i = 0; i < m; i += kRows) {
    const int64_t rows = m - i < kRows ? m - i : kRows;
    panel_product<TILED>(a + (TILED ? i * k : i * ld), ld, b, vectors, rows, k, edge, vectors * W, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* dest = c + (i + r) * ld_c;
      for (int64_t q = 0; q < columns; ++q) dest[q] = (add ? dest[q] : 0.0f) + edge[r * vectors * W + q];
    }
  }
}

void multiply(const float* a, int64_t ld, const float* packed, int64_t m, int64_t n, int64_t k, float* c, int64_t ld_c,
              bool add, const Prefetch& next) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const char* row = next.data;
  int64_t fetched = 0, line = 0;
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t columns = n - j < kPanel ? n - j : kPanel, panel = j / kPanel;
    // This panel's share of the lines to come, a tile's share at a time.
    const int64_t lines = next.rows * next.lines, first = lines * panel / panels;
    const int64_t share = lines * (panel + 1) / panels - first;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = m - i < kRows ? m - i : kRows;
      for (const int64_t until = first + share * (i + rows) / m; fetched < until; ++fetched) {
        __builtin_prefetch(row + line * 64, 0, 2);
        if (++line == next.lines) line = 0, row += next.stride;
      }
      if (ld == 0)
        panel_columns<true>(a + i * k, 0, packed + j * k, rows, columns, k, c + i * ld_c + j, ld_c, add);
      else
        panel_columns<false>(a + i * ld, ld, packed + j * k, rows, columns, k, c + i * ld_c + j, ld_c, add);
    }
  }
}

// W entries of any dtype from x on.
template <Dtype DTYPE>
inline vf load_as(const char* x) {
  if constexpr (DTYPE == Dtype::kFloat32) return load(reinterpret_cast<const float*>(x));
  if constexpr (DTYPE == Dtype::kBFloat16) {
    typedef uint16_t vh __attribute__((vector_size(W * 2)));
    vh half;
    __builtin_memcpy(&half, x, sizeof half);
    return from_bits(__builtin_convertvector(half, vi) << 16);
  }
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  vf out;
  for (int l = 0; l < W; ++l) {
    _Float16 value;
    __builtin_memcpy(&value, x + 2 * l, sizeof value);
    out[l] = static_cast<float>(value);
  }
  return out;
#endif
}

// n entries to float32; `dest` may be written up to a whole vector, with zeros.
template <Dtype DTYPE>
inline void widen_as(const char* x, int64_t n, float* dest, bool to_vector) {
  constexpr int64_t kSize = DTYPE == Dtype::kFloat32 ? 4 : 2;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dest + i, load_as<DTYPE>(x + i * kSize));
  if (i == n) return;
  alignas(64) char rest[W * kSize] = {};
  for (int64_t b = 0; b < (n - i) * kSize; ++b) rest[b] = x[i * kSize + b];
  const vf last = load_as<DTYPE>(rest);
  if (to_vector) return store(dest + i, last);
  for (int l = 0; i + l < n; ++l) dest[i + l] = last[l];
}

template <typename F>
inline void with_dtype(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32) return f.template operator()<Dtype::kFloat32>();
  if (dtype == Dtype::kBFloat16) return f.template operator()<Dtype::kBFloat16>();
  f.template operator()<Dtype::kFloat16>();
}

void widen(const void* from, Dtype dtype, int64_t n, float* dest) {
  with_dtype(dtype, [&]<Dtype DTYPE>() { widen_as<DTYPE>(static_cast<const char*>(from), n, dest, false); });
}

void narrow(const float* from, int64_t n, void* dest, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(dest, from, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {  // to nearest, ties to even
    uint16_t* half = static_cast<uint16_t*>(dest);
    for (int64_t i = 0; i < n; ++i) {
      uint32_t word;
      __builtin_memcpy(&word, from + i, sizeof word);
      const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
      half[i] = static_cast<uint16_t>(nan ? (word >> 16) | 0x40u : (word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const _Float16 value = static_cast<_Float16>(from[i]);
      __builtin_memcpy(static_cast<uint16_t*>(dest) + i, &value, sizeof value);
    }
  }
}

void pack_rows(const float* x, int64_t ld, int64_t k, int64_t n, float* dest) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t columns = n - j < kPanel ? n - j : kPanel;
    const int64_t width = (columns + W - 1) / W * W;
    float* panel = dest + j * k;
    for (int64_t q = 0; q < width; ++q) {
      for (int64_t p = 0; p < k; ++p) panel[p * width + q] = q < columns ? x[(j + q) * ld + p] : 0.0f;
    }
  }
}

void pack_columns(const void* x, Dtype dtype, int64_t ld, int64_t k, int64_t n, float* dest) {
  with_dtype(dtype, [&]<Dtype DTYPE>() {
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t columns = n - j < kPanel ? n - j : kPanel, width = (columns + W - 1) / W * W;
      const char* row = static_cast<const char*>(x) + j * item_size(DTYPE);
      float* panel = dest + j * k;
      for (int64_t p = 0; p < k; ++p, row += ld * item_size(DTYPE), panel += width) {
        if (columns < kPanel) {
          widen_as<DTYPE>(row, columns, panel, true);
        } else {
          for (int q = 0; q < kPanel; q += W) store(panel + q, load_as<DTYPE>(row + q * item_size(DTYPE)));
        }
      }
    }
  });
}

void gradient_row(const Slopes& g, int64_t v, float* dest) {
  const float *a = g.a + v * g.ld, *p_s = g.p_s + v * g.ld;
  // Two loops: p_s S is rounded before it is taken off, as on machines without a fused multiply-add.
  if (g.n == g.width) {
    for (int64_t j = 0; j < g.width; j += W) store(dest + j, load(p_s + j) * load(g.mean_slope + j));
    for (int64_t j = 0; j < g.width; j += W) store(dest + j, load(a + j) - load(dest + j));
  } else {
    for (int64_t j = 0; j < g.n; ++j) dest[j] = p_s[g.live[j]] * g.mean_slope[g.live[j]];
    for (int64_t j = 0; j < g.n; ++j) dest[j] = a[g.live[j]] - dest[j];
  }
}

void pack_tiles(const Slopes& g, int64_t v, int64_t k, float* rows, float* dest) {
  for (int64_t start = 0; start < k; start += kGradientRows) {
    const int64_t end = start + kGradientRows < k ? start + kGradientRows : k;
    for (int64_t p = start; p < end; ++p) gradient_row(g, v + p, rows + (p - start) * g.width);
    for (int64_t i = 0; i < g.n; i += kRows) {
      const int64_t height = g.n - i < kRows ? g.n - i : kRows;
      for (int64_t p = start; p < end; ++p) {
        const float* row = rows + (p - start) * g.width + i;
        float* tile = dest + i * k + p * kRows;
        if (height == kRows) {
          __builtin_memcpy(tile, row, kRows * sizeof(float));
        } else {
          for (int64_t r = 0; r < height; ++r) tile[r] = row[r];
        }
      }
    }
  }
}

int64_t multiply_add(int64_t n, float x) {
  vf sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = splat(x * static_cast<float>(i * kVectors + j));
  }
  const vf left = splat(x), right = splat(1.0f - x);
  for (int64_t p = 0; p < n; ++p) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sum[i][j] = sum[i][j] * left + right;
    }
  }
  vf all{};
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) all += sum[i][j];
  }
  return all[0] > 0.0f ? n * 2 * kRows * kPanel : 0;  // the sums are used
}

void evaluate(int function, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += W) {
    float in[W] = {}, out[W];
    const int64_t count = n - i < W ? n - i : W;
    for (int64_t l = 0; l < count; ++l) in[l] = x[i + l];
    const vf v = load(in);
    store(out, function == 0 ? exp_(v) : function == 1 ? fall(v).e : function == 2 ? log1p_(v) : tanh_(v));
    for (int64_t l = 0; l < count; ++l) y[i + l] = out[l];
  }
}

}  // namespace vigos::cpu::VIGOS_ISA
