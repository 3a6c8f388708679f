// Scales of one byte (FW_LOG8) to floats by shuffles of bytes, for AVX2.
#ifndef FEATHERWEIGHT_PRODUCT_LOG8_AVX2_H
#define FEATHERWEIGHT_PRODUCT_LOG8_AVX2_H

#include <immintrin.h>
#include <stdint.h>

#include "product_lanes.h"
#include "product_layout.h"

namespace {  // compiled for several instruction sets

struct alignas(16) Log8Bytes {
  uint8_t v[3][2][16];  // of the significands, without their first bit
};
constexpr Log8Bytes log8_bytes() {
  Log8Bytes bytes{};
  for (int i = 0; i < 32; ++i) {
    const float scaled = (i ? 2 * kLog8Fractions[i] : 1.0F) - 1.0F;
    const uint32_t significand = static_cast<uint32_t>(scaled * 8388608.0F);
    for (int k = 0; k < 3; ++k) bytes.v[k][i / 16][i % 16] = static_cast<uint8_t>(significand >> (8 * k));
  }
  return bytes;
}
constexpr Log8Bytes kLog8Bytes = log8_bytes();

FW_INLINE __m256i load_twice(const void* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
// All bytes the same. Such constants come from memory: as a single value GCC 12 makes them anew each time, by three instructions.
FW_INLINE __m256i spread_word(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

// Two times sixteen at once, byte by byte of the floats and without gathers: a single token takes them as it goes, and where
// groups are short they are much of its work.
FW_INLINE void log8_two(const uint8_t* first, const uint8_t* second, int exponent, Floats (&to)[2]) {
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first))),
                                               _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), 1);
  // Rows 0 to 3 and 8 to 11 of both in the lower half, the others in the upper one: so the last unpacking leaves whole vectors.
  const __m256i code = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  const __m256i none = _mm256_cmpeq_epi8(code, _mm256_set1_epi8(-1));
  // The exponent falls by code / 32 rounded up: all fractions but the first are below 1.
  const __m256i raised = _mm256_srli_epi16(_mm256_avg_epu8(code, spread_word(kLog8Words[0])), 4);
  const __m256i fall = _mm256_and_si256(raised, spread_word(kLog8Words[1]));
  const __m256i highest = spread_word(0x01010101U * static_cast<uint32_t>(exponent + 127));
  const __m256i power = _mm256_andnot_si256(none, _mm256_sub_epi8(highest, fall));
  const __m256i index = _mm256_add_epi8(_mm256_and_si256(code, spread_word(kLog8Words[2])), spread_word(kLog8Words[3]));
  const __m256i low = _mm256_or_si256(index, none);
  const __m256i high = _mm256_or_si256(_mm256_xor_si256(index, spread_word(kLog8Words[4])), none);
  __m256i byte[3];  // indices with a top bit give zero
  for (int k = 0; k < 3; ++k)
    byte[k] = _mm256_or_si256(_mm256_shuffle_epi8(load_twice(kLog8Bytes.v[k][0]), low),
                              _mm256_shuffle_epi8(load_twice(kLog8Bytes.v[k][1]), high));
  byte[2] = _mm256_or_si256(byte[2], _mm256_and_si256(_mm256_slli_epi16(power, 7), spread_word(kLog8Words[4])));
  const __m256i top = _mm256_and_si256(_mm256_srli_epi16(power, 1), spread_word(kLog8Words[5]));
  const auto joined = [](__m256i lower, __m256i upper) {
    return Floats{_mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper)),
                  _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper))};
  };
  to[0] = joined(_mm256_unpacklo_epi8(byte[0], byte[1]), _mm256_unpacklo_epi8(byte[2], top));
  to[1] = joined(_mm256_unpackhi_epi8(byte[0], byte[1]), _mm256_unpackhi_epi8(byte[2], top));
}

}  // namespace

#endif
