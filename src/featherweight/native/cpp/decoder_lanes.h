// Vectors of the decoder's loops: half precision, bytes and floats become vectors of floats, and their exponential. Included
// by decoder_loops.cpp alone, once for every instruction set: code with internal linkage.
#ifndef FEATHERWEIGHT_DECODER_LANES_H
#define FEATHERWEIGHT_DECODER_LANES_H

#include <math.h>
#include <string.h>

#include "decoder_loops.h"
#include "simd.h"

namespace {

typedef float Float __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Word __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Half __attribute__((vector_size(kWidth * 2)));
typedef int8_t Byte __attribute__((vector_size(kWidth)));

inline Float splat(float value) { return value - Float{}; }

// Sums over lanes are of sixteen, in this order, whatever the width of a vector: kParts vectors side by side.
constexpr int kParts = kPadding / kWidth;

inline float sum_of(const Float (&parts)[kParts]) {
  float lanes[kPadding];
  for (int part = 0; part < kParts; ++part) store(lanes + part * kWidth, parts[part]);
  float total = lanes[0];
  for (int i = 1; i < kPadding; ++i) total += lanes[i];
  return total;
}

// ---- half precision ----

inline Float from_half(Half bits) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Float)_mm256_cvtph_ps((__m128i)bits);
#else
  // The fraction and exponent moved to their places give the value over 2^112, subnormal numbers included.
  const Word wide = __builtin_convertvector(bits, Word);
  const Word magnitude = (wide & 0x7fffU) << 13, sign = (wide & 0x8000U) << 16;
  const Word infinite = (Word)((wide & 0x7c00U) == 0x7c00U) & 0x7f800000U;
  return (Float)((Word)((Float)magnitude * 0x1p112F) | infinite | sign);
#endif
}

// To the nearest, ties to even; what is too large for half precision becomes its largest value.
inline uint16_t to_half(float value) {
  value = value > 65504.0F ? 65504.0F : value < -65504.0F ? -65504.0F : value;
#if defined(__F16C__)
  return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT), 0);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000U;
  bits &= 0x7fffffffU;
  if (bits > 0x7f800000U) return (uint16_t)(sign | 0x7e00U);
  if (bits < 0x38800000U) {  // subnormal: the addition rounds at 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5F;
    memcpy(&bits, &magnitude, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3f000000U));
  }
  bits += 0xfffU + (bits >> 13 & 1U);
  return (uint16_t)(sign | ((bits >> 13) - (112U << 10)));
#endif
}

inline Float values_at(const float* from) { return load<Float>(from); }
inline Float values_at(const uint16_t* from) { return from_half(load<Half>(from)); }
inline Float values_at(const int8_t* from) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (Float)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(load<Byte>(from), Float);
#endif
}

// ---- exponential ----

// e^x within 2 units in the last place; 0 below -87, e^88 above 88.
inline Float exp_of(Float x) {
  const Float bounded = x > 88.0F ? splat(88.0F) : x;
  const Float magic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer, which then is in the low bits
  const Float shifted = bounded * 1.44269504F + magic;
  const Float n = shifted - magic;
  const Float r = (bounded - n * 0.693359375F) - n * -2.12194440e-4F;
  Float p = splat(1.38888889e-3F);
  p = p * r + 8.33333333e-3F;
  p = p * r + 4.16666667e-2F;
  p = p * r + 1.66666667e-1F;
  p = p * r + 0.5F;
  p = (p * r) * r + r + 1.0F;
  const Float scale = (Float)(((Word)shifted << 23) + 0x3f800000U);  // of no meaning below -87, so without signs to overflow
  return x < -87.0F ? Float{} : p * scale;
}

}  // namespace

#endif
