// The vectors of product_tiles.cpp for each instruction set: 64 codes (16 rows by 4 columns), 16 sums, 16 floats.
//
// dot() adds to each lane the products of its four codes (unsigned) and four activations (signed), exactly. Products and sums
// of floats are kept apart (no fused multiply-add), so that every instruction set gives the same bits; multiply_add() alone,
// for matrices of plain values, is fused where there is an instruction for it.
#ifndef FEATHERWEIGHT_PRODUCT_LANES_H
#define FEATHERWEIGHT_PRODUCT_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FW_INLINE inline __attribute__((always_inline))

#if defined(FW_NEON)
#include "product_lanes_neon.h"
#endif

namespace {  // compiled for several instruction sets: nothing here may be shared between them

FW_INLINE int32_t load_word(const int8_t* from) {
  int32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

// To the nearest bfloat16, ties to even; a NaN stays one.
FW_INLINE uint32_t bfloat_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fffU + (bits >> 16 & 1U);
  return ((bits & 0x7fffffffU) > 0x7f800000U ? bits | 0x400000U : rounded) >> 16;
}

#if defined(FW_NEON)

#elif defined(__AVX512F__)

struct Codes {
  __m512i v;
};
struct Sums {
  __m512i v;
};
struct Floats {
  __m512 v;
};

FW_INLINE void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }
FW_INLINE Codes load_codes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
FW_INLINE void store_codes(uint8_t* to, Codes a) { _mm512_storeu_si512(to, a.v); }
FW_INLINE Codes add(Codes a, Codes b) { return {_mm512_add_epi8(a.v, b.v)}; }
FW_INLINE Codes either(Codes a, Codes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Bits [From, From + Count) of each byte, moved to bit To.
template <int From, int Count, int To>
FW_INLINE Codes field(Codes a) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << Count) - 1) << To));
  if constexpr (From > To)
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, From - To), mask)};
  else if constexpr (From < To)
    return {_mm512_and_si512(_mm512_slli_epi16(a.v, To - From), mask)};
  else
    return {_mm512_and_si512(a.v, mask)};
}
FW_INLINE Codes times(Codes a, int by) {  // codes small enough for the product to fit a byte
  const __m512i low = _mm512_set1_epi16(0xff), factor = _mm512_set1_epi16(static_cast<short>(by));
  const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(a.v, low), factor);
  const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(a.v, 8), factor);
  return {_mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16(odd, 8))};
}

FW_INLINE Sums zero_sums() { return {_mm512_setzero_si512()}; }
FW_INLINE Sums spread(int32_t a) { return {_mm512_set1_epi32(a)}; }
template <bool Wide>
FW_INLINE Sums dot(Sums to, Codes codes, const int8_t* x) {
  return {_mm512_dpbusd_epi32(to.v, codes.v, _mm512_set1_epi32(load_word(x)))};
}
FW_INLINE Sums subtract(Sums a, Sums b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FW_INLINE Sums add(Sums a, Sums b) { return {_mm512_add_epi32(a.v, b.v)}; }
FW_INLINE Sums times(Sums a, Sums b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
FW_INLINE Sums load_bytes(const uint8_t* from) {  // 16 bytes to 16 integers
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
// Code j of each lane's four.
template <int J>
FW_INLINE Floats column(Codes a) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * J), _mm512_set1_epi32(255)))};
}

FW_INLINE Floats zero_floats() { return {_mm512_setzero_ps()}; }
FW_INLINE Floats spread(float a) { return {_mm512_set1_ps(a)}; }
FW_INLINE Floats to_floats(Sums a) { return {_mm512_cvtepi32_ps(a.v)}; }
FW_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
FW_INLINE Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
FW_INLINE Floats times(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
FW_INLINE Floats multiply_add(Floats to, Floats a, Floats b) { return {_mm512_fmadd_ps(a.v, b.v, to.v)}; }
FW_INLINE Floats load_floats(const float* from) { return {_mm512_loadu_ps(from)}; }
FW_INLINE void store_floats(float* to, Floats a) { _mm512_storeu_ps(to, a.v); }
FW_INLINE Floats load_halves(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
FW_INLINE Floats load_bfloats(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
// The first and the second bfloat16 of each lane's pair.
FW_INLINE Floats even_bfloats(const uint8_t* from) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16))};
}
FW_INLINE Floats odd_bfloats(const uint8_t* from) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(static_cast<int>(0xffff0000U))))};
}
// Entries of a table of 16 floats, or 32 (Large), by 16 bytes.
FW_INLINE Floats look_up16(const float* table, const uint8_t* index) {
  return {_mm512_permutexvar_ps(load_bytes(index).v, _mm512_loadu_ps(table))};
}
FW_INLINE Floats log8(const uint8_t* from, const float* fractions, int exponent) {
  const __m512i code = load_bytes(from).v;
  const __m512 fraction = _mm512_permutex2var_ps(_mm512_loadu_ps(fractions), code, _mm512_loadu_ps(fractions + 16));
  const __m512i power = _mm512_sub_epi32(_mm512_set1_epi32(exponent), _mm512_srli_epi32(code, 5));
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(fraction), _mm512_slli_epi32(power, 23));
  return {_mm512_castsi512_ps(_mm512_maskz_mov_epi32(_mm512_cmpneq_epi32_mask(code, _mm512_set1_epi32(255)), bits))};
}

#elif defined(__AVX2__)

struct Codes {
  __m256i a, b;
};
struct Sums {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};

FW_INLINE const __m256i* at256(const void* from) { return static_cast<const __m256i*>(from); }
FW_INLINE void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }
FW_INLINE Codes load_codes(const uint8_t* p) { return {_mm256_loadu_si256(at256(p)), _mm256_loadu_si256(at256(p + 32))}; }
FW_INLINE void store_codes(uint8_t* to, Codes c) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), c.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), c.b);
}
FW_INLINE Codes add(Codes x, Codes y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
FW_INLINE Codes either(Codes x, Codes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int From, int Count, int To>
FW_INLINE __m256i field256(__m256i v) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>(((1 << Count) - 1) << To));
  if constexpr (From > To)
    return _mm256_and_si256(_mm256_srli_epi16(v, From - To), mask);
  else if constexpr (From < To)
    return _mm256_and_si256(_mm256_slli_epi16(v, To - From), mask);
  else
    return _mm256_and_si256(v, mask);
}
template <int From, int Count, int To>
FW_INLINE Codes field(Codes c) {
  return {field256<From, Count, To>(c.a), field256<From, Count, To>(c.b)};
}
FW_INLINE __m256i times256(__m256i v, int by) {
  const __m256i low = _mm256_set1_epi16(0xff), factor = _mm256_set1_epi16(static_cast<short>(by));
  const __m256i even = _mm256_mullo_epi16(_mm256_and_si256(v, low), factor);
  const __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(v, 8), factor);
  return _mm256_or_si256(_mm256_and_si256(even, low), _mm256_slli_epi16(odd, 8));
}
FW_INLINE Codes times(Codes c, int by) { return {times256(c.a, by), times256(c.b, by)}; }

FW_INLINE Sums zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FW_INLINE Sums spread(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }

#if defined(__AVXVNNI__)
template <bool Wide>
FW_INLINE Sums dot(Sums to, Codes codes, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(load_word(x));
  return {_mm256_dpbusd_avx_epi32(to.a, codes.a, four), _mm256_dpbusd_avx_epi32(to.b, codes.b, four)};
}
#else
// Pairs of products are added in 16 bits, which saturate only for codes above 127: of those the top bit goes apart.
template <bool Wide>
FW_INLINE __m256i dot256(__m256i to, __m256i codes, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (!Wide) return _mm256_add_epi32(to, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(127));
  const __m256i top = _mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1));
  const __m256i tops = _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), ones);
  return _mm256_add_epi32(_mm256_add_epi32(to, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones)),
                          _mm256_slli_epi32(tops, 7));
}
template <bool Wide>
FW_INLINE Sums dot(Sums to, Codes codes, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(load_word(x));
  return {dot256<Wide>(to.a, codes.a, four), dot256<Wide>(to.b, codes.b, four)};
}

// Products of pairs may be added up in 16 bits for some steps before they are widened to sums, which saves one instruction
// of three: of codes up to `largest` two products are within 2 x 128 x largest, and all together stay below 2^15.
#define FW_HAS_PAIRS 1
constexpr int64_t pair_steps(int64_t largest) { return 128 / largest; }
struct Pairs {
  __m256i a, b;
};
FW_INLINE Pairs zero_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FW_INLINE Pairs dot_pairs(Pairs to, Codes codes, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(load_word(x));
  return {_mm256_add_epi16(to.a, _mm256_maddubs_epi16(codes.a, four)),
          _mm256_add_epi16(to.b, _mm256_maddubs_epi16(codes.b, four))};
}
FW_INLINE Sums add(Sums to, Pairs pairs) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(to.a, _mm256_madd_epi16(pairs.a, ones)), _mm256_add_epi32(to.b, _mm256_madd_epi16(pairs.b, ones))};
}
// x + y / 4, y a multiple of four.
FW_INLINE Pairs add_quarter(Pairs x, Pairs y) {
  return {_mm256_add_epi16(x.a, _mm256_srai_epi16(y.a, 2)), _mm256_add_epi16(x.b, _mm256_srai_epi16(y.b, 2))};
}
FW_INLINE Codes masked(Codes c, int mask) {
  const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(c.a, m), _mm256_and_si256(c.b, m)};
}
FW_INLINE Codes upper_halves(Codes c) {  // of bytes, with other bits above them
  return {_mm256_srli_epi16(c.a, 4), _mm256_srli_epi16(c.b, 4)};
}
#endif
FW_INLINE Sums subtract(Sums x, Sums y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
FW_INLINE Sums add(Sums x, Sums y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FW_INLINE Sums times(Sums x, Sums y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
FW_INLINE Sums load_bytes(const uint8_t* from) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
template <int J>
FW_INLINE Floats column(Codes c) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.a, 8 * J), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(c.b, 8 * J), mask))};
}

FW_INLINE Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FW_INLINE Floats spread(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FW_INLINE Floats to_floats(Sums s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
FW_INLINE Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FW_INLINE Floats subtract(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FW_INLINE Floats times(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FW_INLINE Floats multiply_add(Floats to, Floats x, Floats y) {
  return {_mm256_fmadd_ps(x.a, y.a, to.a), _mm256_fmadd_ps(x.b, y.b, to.b)};
}
FW_INLINE Floats load_floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
FW_INLINE void store_floats(float* to, Floats f) {
  _mm256_storeu_ps(to, f.a);
  _mm256_storeu_ps(to + 8, f.b);
}
FW_INLINE Floats load_halves(const uint16_t* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)))};
}
FW_INLINE __m256 bfloats256(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FW_INLINE Floats load_bfloats(const uint16_t* from) { return {bfloats256(from), bfloats256(from + 8)}; }
FW_INLINE Floats even_bfloats(const uint8_t* from) {
  const Codes c = load_codes(from);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(c.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(c.b, 16))};
}
FW_INLINE Floats odd_bfloats(const uint8_t* from) {
  const Codes c = load_codes(from);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000U));
  return {_mm256_castsi256_ps(_mm256_and_si256(c.a, upper)), _mm256_castsi256_ps(_mm256_and_si256(c.b, upper))};
}
FW_INLINE __m256 look_up256(const float* table, __m256i index) {  // 16 entries: two permutes, chosen between by bit 3
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
FW_INLINE Floats look_up16(const float* table, const uint8_t* index) {
  const Sums i = load_bytes(index);
  return {look_up256(table, i.a), look_up256(table, i.b)};
}
FW_INLINE __m256 log8_256(__m256i code, const float* fractions, int exponent) {
  const __m256i low = _mm256_and_si256(code, _mm256_set1_epi32(31));
  const __m256 fraction = _mm256_i32gather_ps(fractions, low, 4);
  const __m256i power = _mm256_sub_epi32(_mm256_set1_epi32(exponent), _mm256_srli_epi32(code, 5));
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(fraction), _mm256_slli_epi32(power, 23));
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(code, _mm256_set1_epi32(255)), bits));
}
FW_INLINE Floats log8(const uint8_t* from, const float* fractions, int exponent) {
  const Sums code = load_bytes(from);
  return {log8_256(code.a, fractions, exponent), log8_256(code.b, fractions, exponent)};
}

#else  // portable: the compiler's vectors, or its loops

struct Codes {
  uint8_t v[64];
};
struct Sums {
  int32_t v[16];
};
struct Floats {
  float v[16];
};

template <typename To, typename Rule>
FW_INLINE To made(int count, const Rule& rule) {
  To to;
  for (int i = 0; i < count; ++i) to.v[i] = rule(i);
  return to;
}
FW_INLINE void prefetch(const void*) {}
FW_INLINE Codes load_codes(const uint8_t* from) {
  Codes c;
  memcpy(c.v, from, sizeof c.v);
  return c;
}
FW_INLINE void store_codes(uint8_t* to, const Codes& c) { memcpy(to, c.v, sizeof c.v); }
FW_INLINE Codes add(const Codes& a, const Codes& b) {
  return made<Codes>(64, [&](int i) { return static_cast<uint8_t>(a.v[i] + b.v[i]); });
}
FW_INLINE Codes either(const Codes& a, const Codes& b) {
  return made<Codes>(64, [&](int i) { return static_cast<uint8_t>(a.v[i] | b.v[i]); });
}
template <int From, int Count, int To>
FW_INLINE Codes field(const Codes& a) {
  return made<Codes>(64, [&](int i) { return static_cast<uint8_t>((a.v[i] >> From & ((1 << Count) - 1)) << To); });
}
FW_INLINE Codes times(const Codes& a, int by) {
  return made<Codes>(64, [&](int i) { return static_cast<uint8_t>(a.v[i] * by); });
}
FW_INLINE Sums spread(int32_t a) {
  return made<Sums>(16, [&](int) { return a; });
}
FW_INLINE Sums zero_sums() { return spread(0); }
template <bool Wide>
FW_INLINE Sums dot(const Sums& to, const Codes& codes, const int8_t* x) {
  return made<Sums>(16, [&](int i) {
    const uint8_t* c = codes.v + 4 * i;
    return to.v[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
  });
}
// Wrap around like the vectors of the other instruction sets: intermediate values may leave the range, results do not.
FW_INLINE int32_t wrapped(uint32_t a) { return static_cast<int32_t>(a); }
FW_INLINE Sums subtract(const Sums& a, const Sums& b) {
  return made<Sums>(16, [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])); });
}
FW_INLINE Sums add(const Sums& a, const Sums& b) {
  return made<Sums>(16, [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); });
}
FW_INLINE Sums times(const Sums& a, const Sums& b) {
  return made<Sums>(16, [&](int i) { return wrapped(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i])); });
}
FW_INLINE Sums load_bytes(const uint8_t* from) {
  return made<Sums>(16, [&](int i) { return static_cast<int32_t>(from[i]); });
}
template <int J>
FW_INLINE Floats column(const Codes& c) {
  return made<Floats>(16, [&](int i) { return static_cast<float>(c.v[4 * i + J]); });
}
FW_INLINE Floats spread(float a) {
  return made<Floats>(16, [&](int) { return a; });
}
FW_INLINE Floats zero_floats() { return spread(0.0F); }
FW_INLINE Floats to_floats(const Sums& s) {
  return made<Floats>(16, [&](int i) { return static_cast<float>(s.v[i]); });
}
FW_INLINE Floats add(const Floats& a, const Floats& b) {
  return made<Floats>(16, [&](int i) { return a.v[i] + b.v[i]; });
}
FW_INLINE Floats subtract(const Floats& a, const Floats& b) {
  return made<Floats>(16, [&](int i) { return a.v[i] - b.v[i]; });
}
FW_INLINE Floats times(const Floats& a, const Floats& b) {
  return made<Floats>(16, [&](int i) { return a.v[i] * b.v[i]; });
}
// Rounded twice: without hardware for it a fused one would take a call for every element.
FW_INLINE Floats multiply_add(const Floats& to, const Floats& a, const Floats& b) {
  return made<Floats>(16, [&](int i) { return to.v[i] + a.v[i] * b.v[i]; });
}
FW_INLINE Floats load_floats(const float* from) {
  Floats f;
  memcpy(f.v, from, sizeof f.v);
  return f;
}
FW_INLINE void store_floats(float* to, const Floats& f) { memcpy(to, f.v, sizeof f.v); }
FW_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FW_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16, exponent = half >> 10 & 0x1fU, fraction = half & 0x3ffU;
  if (exponent == 0x1f) return float_of_bits(sign | 0x7f800000U | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
  return sign ? -magnitude : magnitude;
}
FW_INLINE Floats load_halves(const uint16_t* from) {
  return made<Floats>(16, [&](int i) { return float_of_half(from[i]); });
}
FW_INLINE Floats load_bfloats(const uint16_t* from) {
  return made<Floats>(16, [&](int i) { return float_of_bits(static_cast<uint32_t>(from[i]) << 16); });
}
FW_INLINE uint32_t pair_of(const uint8_t* from, int lane) {
  uint32_t pair;
  memcpy(&pair, from + 4 * lane, sizeof pair);
  return pair;
}
FW_INLINE Floats even_bfloats(const uint8_t* from) {
  return made<Floats>(16, [&](int i) { return float_of_bits(pair_of(from, i) << 16); });
}
FW_INLINE Floats odd_bfloats(const uint8_t* from) {
  return made<Floats>(16, [&](int i) { return float_of_bits(pair_of(from, i) & 0xffff0000U); });
}
FW_INLINE Floats look_up16(const float* table, const uint8_t* index) {
  return made<Floats>(16, [&](int i) { return table[index[i]]; });
}
FW_INLINE Floats log8(const uint8_t* from, const float* fractions, int exponent) {
  return made<Floats>(16, [&](int i) { return from[i] == 255 ? 0.0F : ldexpf(fractions[from[i] & 31], exponent - (from[i] >> 5)); });
}

#endif

}  // namespace

#endif
