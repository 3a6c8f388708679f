// What the kernels of second moments share: packing, and adding a block of sums to what is there. AVX-512.
#ifndef FEATHERWEIGHT_MOMENTS_LANES_H
#define FEATHERWEIGHT_MOMENTS_LANES_H

#include <immintrin.h>
#include <stdint.h>

#include <algorithm>

#include "moments.h"

namespace {

constexpr int64_t kHalf = 16;  // columns of a register

inline __mmask16 mask_of(int64_t count) {
  return static_cast<__mmask16>(count >= kHalf ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Rows become columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

void pack_strip(const MomentStrip& s) {
  uint32_t* to = s.to;
  for (int64_t token = 0; token < s.tokens; token += kBlockTokens) {
    for (int64_t column = 0; column < kStrip; column += kHalf, to += kBlockWords / 2) {
      const __mmask16 there = mask_of(s.columns - column);
      __m512i pairs[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t at = token + 2 * i;
        const uint16_t* from = s.values + at * s.stride + column;
        const __m256i even = at < s.tokens ? _mm256_maskz_loadu_epi16(there, from) : _mm256_setzero_si256();
        const __m256i odd = at + 1 < s.tokens ? _mm256_maskz_loadu_epi16(there, from + s.stride) : _mm256_setzero_si256();
        pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      if (s.first) transpose(pairs);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + 16 * i, pairs[i]);
    }
  }
}

// One row of a block: 16 sums from column `column` on.
inline void add_sums(const MomentBlock& b, int64_t row, int64_t column, __m512 sums) {
  const __mmask16 there = mask_of(b.columns - column);
  float* place = b.sums + row * b.stride + column;
  __m512 total = _mm512_mul_ps(sums, _mm512_set1_ps(b.added));
  if (b.kept != 0) total = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, place), _mm512_set1_ps(b.kept), total);
  _mm512_mask_storeu_ps(place, there, total);
}

}  // namespace

#endif
