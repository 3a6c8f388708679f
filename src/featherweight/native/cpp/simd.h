// Vectors as wide as the instruction set's registers, by the vector extension of GCC and Clang. Sixteen groups are solved
// side by side, one in each lane; a loop over the lanes takes kLanes / kWidth steps of int32, twice as many of double.
#ifndef FEATHERWEIGHT_SIMD_H
#define FEATHERWEIGHT_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {  // compiled for several instruction sets: nothing here may be shared between them

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kHalf = kWidth / 2;

typedef int32_t Int __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntHalf __attribute__((vector_size(kWidth * 2)));
typedef float FloatHalf __attribute__((vector_size(kWidth * 2)));
typedef int64_t Long __attribute__((vector_size(kWidth * 4)));
typedef double Double __attribute__((vector_size(kWidth * 4)));

// Also reads a single value of another type with the same bits.
template <typename Vector, typename Element>
inline Vector load(const Element* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename Vector, typename Element>
inline void store(Element* to, Vector value) {
  memcpy(to, &value, sizeof value);
}

inline Int min_of(Int a, Int b) { return a < b ? a : b; }
inline Int max_of(Int a, Int b) { return a < b ? b : a; }
inline Double absolute(Double a) { return (Double)((Long)a & INT64_MAX); }

// GCC 12 splits these conversions in two without the intrinsics.
#if defined(__AVX512F__)
inline Double widen(FloatHalf a) { return (Double)_mm512_cvtps_pd((__m256)a); }
inline Double widen(IntHalf a) { return (Double)_mm512_cvtepi32_pd((__m256i)a); }
inline FloatHalf narrow(Double a) { return (FloatHalf)_mm512_cvtpd_ps((__m512d)a); }
inline IntHalf narrow(Long a) { return (IntHalf)_mm512_cvtepi64_epi32((__m512i)a); }
#else
inline Double widen(FloatHalf a) { return __builtin_convertvector(a, Double); }
inline Double widen(IntHalf a) { return __builtin_convertvector(a, Double); }
inline FloatHalf narrow(Double a) { return __builtin_convertvector(a, FloatHalf); }
inline IntHalf narrow(Long a) { return __builtin_convertvector(a, IntHalf); }
#endif

inline bool any(Long mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int64_t bits = 0;
  for (int i = 0; i < kHalf; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

inline Int gather(const int32_t* base, Int index) {
#if defined(__AVX512F__)
  return (Int)_mm512_i32gather_epi32((__m512i)index, base, 4);
#elif defined(__AVX2__)
  return (Int)_mm256_i32gather_epi32(base, (__m256i)index, 4);
#else
  Int value;
  for (int i = 0; i < kWidth; ++i) value[i] = base[index[i]];
  return value;
#endif
}

inline Double gather(const double* base, IntHalf index) {
#if defined(__AVX512F__)
  return (Double)_mm512_i32gather_pd((__m256i)index, base, 8);
#elif defined(__AVX2__)
  return (Double)_mm256_i32gather_pd(base, (__m128i)index, 8);
#else
  Double value;
  for (int i = 0; i < kHalf; ++i) value[i] = base[index[i]];
  return value;
#endif
}

}  // namespace

#endif
