// Float32 matrix products for one instruction set, in the two shapes the divergence needs.
//
// A product is computed in pieces of kDepth along k, each summed from zero in registers and then added to c: the sum
// over a vocabulary does not lose digits to its own size. An element's result depends on its row of a and its column of
// b alone, not on how many others there are or where it stands among them; vendor libraries do not promise that.
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
constexpr int64_t kDepth = 256;

template <int ROWS, int VECTORS, bool TILED>
inline void tile(const float* a, int64_t ld, const float* b, int64_t k, float* c, int64_t ld_c, bool add) {
  vf sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
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

// One panel of columns, over a depth of at most kDepth.
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
              bool add) {
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = k - p < kDepth ? k - p : kDepth;
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t columns = n - j < kPanel ? n - j : kPanel, width = (columns + W - 1) / W * W;
      panel_columns<false>(a + p, ld, packed + j * k + p * width, m, columns, depth, c + j, ld_c, add || p > 0);
    }
  }
}

void multiply_tiles(const float* tiles, const float* packed, int64_t m, int64_t n, int64_t k, float* c, int64_t ld_c,
                    bool add, const Prefetch& next) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t columns = n - j < kPanel ? n - j : kPanel, panel = j / kPanel;
    // This panel's share of the lines to come, a tile's share at a time.
    const int64_t lines = next.rows * next.lines, first = lines * panel / panels;
    const int64_t share = lines * (panel + 1) / panels - first;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = m - i < kRows ? m - i : kRows;
      for (int64_t line = first + share * i / m; line < first + share * (i + rows) / m; ++line) {
        __builtin_prefetch(next.data + line / next.lines * next.stride + line % next.lines * 64, 0, 2);
      }
      panel_columns<true>(tiles + i * k, 0, packed + j * k, rows, columns, k, c + i * ld_c + j, ld_c, add);
    }
  }
}

void widen(const void* from, Dtype dtype, int64_t n, float* dest) {
  if (dtype == Dtype::kFloat32) {
    __builtin_memcpy(dest, from, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t word = static_cast<uint32_t>(half[i]) << 16;
      __builtin_memcpy(dest + i, &word, sizeof word);
    }
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i));
      _mm512_storeu_ps(dest + i, _mm512_maskz_cvtph_ps(0xffff, word));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(dest + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
    }
#endif
    for (; i < n; ++i) {
      _Float16 value;
      __builtin_memcpy(&value, half + i, sizeof value);
      dest[i] = static_cast<float>(value);
    }
  }
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
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  for (int64_t p = 0; p < k; ++p) {
    const char* row = static_cast<const char*>(x) + p * ld * size;
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t columns = n - j < kPanel ? n - j : kPanel, width = (columns + W - 1) / W * W;
      float* panel = dest + j * k + p * width;
      widen(row + j * size, dtype, columns, panel);
      for (int64_t q = columns; q < width; ++q) panel[q] = 0.0f;
    }
  }
}

void pack_tiles(const float* x, int64_t ld, int64_t k, int64_t m, float* dest) {
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = m - i < kRows ? m - i : kRows;
      float* tile = dest + i * k + p * kRows;
      if (rows == kRows) {
        __builtin_memcpy(tile, x + p * ld + i, kRows * sizeof(float));
      } else {
        for (int64_t r = 0; r < rows; ++r) tile[r] = x[p * ld + i + r];
      }
    }
  }
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
