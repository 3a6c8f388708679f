// The codes of a step as a vector of bytes, for each layout whose lanes are rows (product_layout.h), and sums of products with
// them over one segment.
#ifndef FEATHERWEIGHT_PRODUCT_CODES_H
#define FEATHERWEIGHT_PRODUCT_CODES_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "product_lanes.h"
#include "product_layout.h"

#define FW_LAMBDA __attribute__((always_inline))

#if defined(__AVX512VBMI__)
#define FW_HAS_TRITS 1  // TRITS is the faster layout: it needs permutes of bytes
#endif

namespace {  // compiled for several instruction sets

constexpr int64_t kAhead = 4096;  // bytes that codes are fetched ahead: of those tried, the best for all layouts

template <typename Body, int... I>
FW_INLINE void each_of(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}
// body(0), ..., body(N - 1) with numbers known to the compiler.
template <int N, typename Body>
FW_INLINE void each(const Body& body) {
  each_of(body, std::make_integer_sequence<int, N>());
}

template <int Bits>
struct Fields {
  static constexpr int kPlanes = 1;
  static constexpr bool kWide = Bits == 8;
  static constexpr int kUnit = unit_steps(Bits);
  static constexpr FieldParts kParts = field_parts(Bits);

  // Step I of a unit.
  template <int I>
  static FW_INLINE Codes step(const uint8_t* unit) {
    if constexpr (Bits == 8) return load_codes(unit);
    Codes codes{};
    each<kParts.count>([&](auto n) FW_LAMBDA {
      constexpr FieldPart part = kParts.part[decltype(n)::value];
      if constexpr (part.step == I) {
        const Codes bits = field<part.to, part.count, part.from>(load_codes(unit + kStepBytes * part.vector));
        codes = part.from ? either(codes, bits) : bits;
      }
    });
    return codes;
  }
};

// How large unpacked codes may be: so that sums of pairs hold some steps of them, up to 127, or up to 255.
enum class Range { kNarrow, kSevenBits, kWide };

inline int largest_code(const fw_operand* operand) {
  const bool trits = operand->bits == 2 && operand->offset == 1 && !operand->has_zeros;
  return operand->tied || operand->layout != FW_FIELDS || trits ? 2 * operand->offset : (1 << operand->bits) - 1;
}

#if defined(FW_HAS_PAIRS)

constexpr bool kPairs = true;
constexpr int64_t kFewestPairSteps = 4;

inline Range code_range(const fw_operand* operand) {
  const int largest = largest_code(operand);
  return largest > 127 ? Range::kWide : pair_steps(largest) < kFewestPairSteps ? Range::kSevenBits : Range::kNarrow;
}

inline int64_t narrow_steps(const fw_operand* operand) { return pair_steps(largest_code(operand)); }

// Steps of FIELDS, in whole units, whose products of pairs are added up in 16 bits.
inline int64_t chunk_steps(const fw_operand* operand) {
  const int64_t unit = unit_steps(operand->bits), largest = largest_code(operand);
  // Of two bits every other step is one of codes up to 4 largest.
  return std::max(unit, (operand->bits == 2 ? 2 * pair_steps(4 * largest) : pair_steps(largest)) / unit * unit);
}

// Trits and other codes of two bits. Those of every other step stay where they are, as four times their value: their products
// are added up apart, and one shift of that sum does for all. `chunk`: steps whose products fit.
template <int Tiles>
FW_INLINE void accumulate_two_bits(const uint8_t* const (&codes)[Tiles], int64_t steps, int64_t chunk, const int8_t* x,
                                   Sums (&sum)[Tiles]) {
  for (int64_t first = 0; first < steps;) {
    Pairs once[Tiles], fourfold[Tiles];
    for (int t = 0; t < Tiles; ++t) once[t] = fourfold[t] = zero_pairs();
    for (const int64_t end = std::min(steps, first + chunk); first < end; first += 4)
      for (int t = 0; t < Tiles; ++t) {
        const uint8_t* unit = codes[t] + first * (kStepBytes / 4);
        prefetch(unit + kAhead);
        const Codes low = load_codes(unit), high = upper_halves(low);
        once[t] = dot_pairs(once[t], masked(low, 3), x + 4 * first);
        fourfold[t] = dot_pairs(fourfold[t], masked(low, 12), x + 4 * first + 4);
        once[t] = dot_pairs(once[t], masked(high, 3), x + 4 * first + 8);
        fourfold[t] = dot_pairs(fourfold[t], masked(high, 12), x + 4 * first + 12);
      }
    for (int t = 0; t < Tiles; ++t) sum[t] = add(sum[t], add_quarter(once[t], fourfold[t]));
  }
}

template <int Bits, int Tiles>
FW_INLINE void accumulate_pairs(const uint8_t* const (&codes)[Tiles], int64_t steps, int64_t chunk, const int8_t* x,
                                Sums (&sum)[Tiles]) {
  using Layout = Fields<Bits>;
  // Steps of a unit whose products fit.
  constexpr int kWithin = static_cast<int>(std::min<int64_t>(Layout::kUnit, pair_steps((1 << Bits) - 1)));
  for (int64_t first = 0; first < steps;) {
    Pairs pairs[Tiles];
    for (Pairs& p : pairs) p = zero_pairs();
    for (const int64_t end = std::min(steps, first + chunk); first < end; first += Layout::kUnit)
      for (int t = 0; t < Tiles; ++t) {
        const uint8_t* unit = codes[t] + first * (kStepBytes * Bits / 8);
        for (int v = 0; v < Layout::kUnit * Bits / 8; ++v) prefetch(unit + kAhead + kStepBytes * v);
        each<Layout::kUnit>([&](auto i) FW_LAMBDA {
          constexpr int kStep = decltype(i)::value;
          pairs[t] = dot_pairs(pairs[t], Layout::template step<kStep>(unit), x + 4 * (first + kStep));
          if constexpr (kWithin < Layout::kUnit && (kStep + 1) % kWithin == 0) {
            sum[t] = add(sum[t], pairs[t]);
            pairs[t] = zero_pairs();
          }
        });
      }
    if constexpr (kWithin == Layout::kUnit)
      for (int t = 0; t < Tiles; ++t) sum[t] = add(sum[t], pairs[t]);
  }
}

#else

constexpr bool kPairs = false;  // then narrow codes are no special case
inline Range code_range(const fw_operand* operand) { return largest_code(operand) > 127 ? Range::kWide : Range::kSevenBits; }
inline int64_t narrow_steps(const fw_operand*) { return 0; }
inline int64_t chunk_steps(const fw_operand*) { return 0; }  // there are no sums in 16 bits

#endif

// `chunk`: steps whose products fit 16 bits, where these are added up first.
template <int Bits, int Tiles>
FW_INLINE void accumulate_fields(const uint8_t* const (&codes)[Tiles], int64_t steps, [[maybe_unused]] int64_t chunk,
                                 const int8_t* x, Sums (&sum)[Tiles]) {
#if defined(FW_HAS_PAIRS)
  if constexpr (Bits == 2) return accumulate_two_bits(codes, steps, chunk, x, sum);
  if constexpr (Bits < 7) return accumulate_pairs<Bits, Tiles>(codes, steps, chunk, x, sum);
#endif
  using Layout = Fields<Bits>;
  Sums odd[Tiles];  // of every other step: two chains of sums a tile
  for (Sums& s : odd) s = zero_sums();
  for (int64_t first = 0; first < steps; first += Layout::kUnit) {
    const int64_t at = first * (kStepBytes * Bits / 8);
    for (int t = 0; t < Tiles; ++t)
      for (int v = 0; v < Layout::kUnit * Bits / 8; ++v) prefetch(codes[t] + at + kAhead + kStepBytes * v);
    each<Layout::kUnit>([&](auto i) FW_LAMBDA {
      for (int t = 0; t < Tiles; ++t) {
        Sums& to = decltype(i)::value % 2 ? odd[t] : sum[t];
        to = dot<Layout::kWide>(to, Layout::template step<decltype(i)::value>(codes[t] + at), x + 4 * (first + i));
      }
    });
  }
  if (Layout::kUnit > 1)
    for (int t = 0; t < Tiles; ++t) sum[t] = add(sum[t], odd[t]);
}

#if defined(FW_HAS_TRITS)

struct alignas(64) TritTables {
  uint8_t digit[5][64];
};

constexpr TritTables trit_tables() {
  TritTables tables{};
  for (int i = 0; i < 64; ++i) {
    const int r = i & 31, q = i & 7;
    tables.digit[0][i] = static_cast<uint8_t>(r % 3);
    tables.digit[1][i] = static_cast<uint8_t>(r / 3 % 3);
    tables.digit[2][i] = static_cast<uint8_t>(r / 9 % 3);
    tables.digit[3][i] = static_cast<uint8_t>(2 - q % 3);
    tables.digit[4][i] = static_cast<uint8_t>(2 - q / 3);
  }
  return tables;
}

alignas(64) constexpr TritTables kTritTables = trit_tables();

// A vector of five steps, ready to be looked up.
struct TritVector {
  __m512i index, byte;
  __mmask64 regular;
};

FW_INLINE TritVector trit_vector(const uint8_t* from) {
  const __m512i byte = _mm512_loadu_si512(from);
  const __mmask64 regular = _mm512_cmplt_epu8_mask(byte, _mm512_set1_epi8(static_cast<char>(kEscape)));
  // The upper five bits: a linear map of the byte's bits, one instruction instead of a shift and a mask.
  const __m512i upper = _mm512_gf2p8affine_epi64_epi8(byte, _mm512_set1_epi64(0x0810204080000000), 0);
  // From the escape on the distance is the index.
  const __m512i index = _mm512_mask_sub_epi8(upper, ~regular, byte, _mm512_set1_epi8(static_cast<char>(kEscape)));
  return {index, byte, regular};
}

template <int Digit>
FW_INLINE Codes digit(const TritVector& v, const TritTables& tables) {
  const __m512i table = _mm512_load_si512(tables.digit[Digit]);
  if constexpr (Digit < 3) return {_mm512_permutexvar_epi8(v.index, table)};
  return {_mm512_maskz_permutexvar_epi8(v.regular, v.byte, table)};
}

// Digits times a weight: with these, tied planes are added up as bytes, and one dot product does for all of them.
FW_INLINE TritTables weighted(int weight) {
  TritTables tables;
  for (int d = 0; d < 5; ++d) store_codes(tables.digit[d], times(load_codes(kTritTables.digit[d]), weight));
  return tables;
}

// One segment from step `Phase` of the vector at codes[t]; Steps is 0 for segments of whole vectors, whose number then is
// `vectors`. Returns the vectors that were used up.
template <int Planes, int Tiles, int Steps, int Phase, int Sets>
FW_INLINE int64_t accumulate_trits(const uint8_t* const (&codes)[Tiles], int64_t vectors, const int8_t* x,
                                   const TritTables (&tables)[Planes], Sums (&sum)[Sets][Tiles]) {
  constexpr int kHead = Steps ? std::min((5 - Phase) % 5, Steps) : 0;
  constexpr int kTail = Steps ? (Steps - kHead) % 5 : 0;
  constexpr int64_t kVector = kStepBytes * Planes;
  const int64_t whole = Steps ? (Steps - kHead) / 5 : vectors;
  Sums odd[Tiles];  // of every other digit: two chains of sums a tile
  for (Sums& s : odd) s = zero_sums();
  const auto add_digit = [&](const TritVector (&v)[Planes][Tiles], auto d, int64_t step) FW_LAMBDA {
    for (int t = 0; t < Tiles; ++t) {
      Codes joint = digit<decltype(d)::value>(v[0][t], tables[0]);
      for (int p = 1; p < Planes; ++p) {
        const Codes next = digit<decltype(d)::value>(v[p][t], tables[p]);
        if constexpr (Sets == 1)
          joint = add(joint, next);
        else
          sum[p][t] = dot<false>(sum[p][t], next, x + 4 * step);
      }
      Sums& to = decltype(d)::value % 2 ? odd[t] : sum[0][t];
      to = dot<false>(to, joint, x + 4 * step);
    }
  };
  const auto load = [&](TritVector(&v)[Planes][Tiles], int64_t at) FW_LAMBDA {
    for (int t = 0; t < Tiles; ++t)
      for (int p = 0; p < Planes; ++p) {
        prefetch(codes[t] + at + kAhead + kStepBytes * p);
        v[p][t] = trit_vector(codes[t] + at + kStepBytes * p);
      }
  };
  TritVector v[Planes][Tiles];
  int64_t at = 0;
  if constexpr (kHead > 0) {
    load(v, at);
    each<kHead>([&](auto i) FW_LAMBDA { add_digit(v, std::integral_constant<int, Phase + i>(), i); });
    if (Phase + kHead == 5) at += kVector;
  }
  for (int64_t w = 0; w < whole; ++w, at += kVector) {
    load(v, at);
    each<5>([&](auto i) FW_LAMBDA { add_digit(v, i, kHead + 5 * w + i); });
  }
  if constexpr (kTail > 0) {
    load(v, at);
    each<kTail>([&](auto i) FW_LAMBDA { add_digit(v, i, kHead + 5 * whole + i); });
  }
  for (int t = 0; t < Tiles; ++t) sum[0][t] = add(sum[0][t], odd[t]);
  return at;
}

#endif

// ---- quartets ----

struct QuartetTable {
  uint32_t word[32];  // four digits t + 1, first column in the lowest byte
};

constexpr QuartetTable quartet_table() {
  QuartetTable table{};
  for (int code = 0; code < 32; ++code) {
    const int first = code & 16 ? -1 : 1, zero = code >> 2 & 3;
    const int kept[3] = {first, code & 1 ? -first : first, code & 2 ? -first : first};
    for (int lane = 0, next = 0; lane < 4; ++lane) {
      const int trit = lane == zero ? 0 : kept[next++];
      table.word[code] |= static_cast<uint32_t>(trit + 1) << (8 * lane);
    }
  }
  return table;
}

alignas(64) constexpr QuartetTable kQuartets = quartet_table();

template <int I>
FW_INLINE Codes quartet_step(const uint8_t* unit) {
  constexpr int kWord = 5 * I / 32, kShift = 5 * I % 32;
#if defined(__AVX512F__) && !defined(FW_NEON)
  __m512i index = _mm512_srli_epi32(_mm512_loadu_si512(unit + kStepBytes * kWord), kShift);
  if constexpr (kShift > 27)
    index = _mm512_or_si512(index, _mm512_slli_epi32(_mm512_loadu_si512(unit + kStepBytes * (kWord + 1)), 32 - kShift));
  return {_mm512_permutex2var_epi32(_mm512_load_si512(kQuartets.word), index, _mm512_load_si512(kQuartets.word + 16))};
#elif defined(FW_NEON)
  return look_up32<kShift>(kQuartets.word, unit + kStepBytes * kWord);
#else
  alignas(64) uint32_t words[16];
  for (int r = 0; r < 16; ++r) {
    uint32_t low;
    memcpy(&low, unit + kStepBytes * kWord + 4 * r, sizeof low);
    uint32_t index = low >> kShift;
    if constexpr (kShift > 27) {
      uint32_t high;
      memcpy(&high, unit + kStepBytes * (kWord + 1) + 4 * r, sizeof high);
      index |= high << (32 - kShift);
    }
    words[r] = kQuartets.word[index & 31];
  }
  return load_codes(reinterpret_cast<const uint8_t*>(words));
#endif
}

template <int Tiles>
FW_INLINE void accumulate_quartets(const uint8_t* const (&codes)[Tiles], int64_t steps, const int8_t* x, Sums (&sum)[Tiles]) {
  for (int64_t first = 0; first < steps; first += 32) {
    const int64_t at = first * 10;
    for (int t = 0; t < Tiles; ++t)
      for (int v = 0; v < 5; ++v) prefetch(codes[t] + at + kAhead + kStepBytes * v);
    each<32>([&](auto i) FW_LAMBDA {
      for (int t = 0; t < Tiles; ++t)
        sum[t] = dot<false>(sum[t], quartet_step<decltype(i)::value>(codes[t] + at), x + 4 * (first + i));
    });
  }
}

}  // namespace

#endif
