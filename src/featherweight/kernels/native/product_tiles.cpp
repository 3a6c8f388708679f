// Products with packed operands, for one instruction set (FW_ISA). See product_layout.h for what lies where.
//
// A matrix-vector product is bound by memory if the codes of a step become a vector of bytes in very few instructions and
// each such vector feeds one dot-product instruction; all else happens once a segment. Several tiles are done at once, from
// distant parts of the matrix: each is a stream of its own, which keeps more cache lines under way and hides the latency
// of the sums. With more than a few tokens, codes are unpacked once a tile into the cache instead.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "product_kernels.h"
#include "product_lanes.h"
#include "product_layout.h"

#define FW_CONCAT_(a, b) a##b
#define FW_CONCAT(a, b) FW_CONCAT_(a, b)
#define FW_LAMBDA __attribute__((always_inline))

#if defined(__AVX512VBMI__)
#define FW_HAS_TRITS 1
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kGemmTiles = 2, kGemmTokens = 12;
#else
constexpr int kGemmTiles = 1, kGemmTokens = 4;
#endif
constexpr int kStreams = 2;        // tiles at once for one token
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

// ---- layouts: the codes of a step ----

template <int Bits>
struct Fields {
  static constexpr int kPlanes = 1;
  static constexpr bool kWide = Bits == 8;
  static constexpr int kUnit = unit_steps(Bits);
  static constexpr int kTwos = (Bits & 4) && Bits != 8 ? kUnit / 2 : 0;  // vectors before those of two bits
  static constexpr int kOnes = kTwos + (Bits & 2 ? kUnit / 4 : 0);

  // Step I of a unit.
  template <int I>
  static FW_INLINE Codes step(const uint8_t* unit) {
    if constexpr (Bits == 8) {
      return load_codes(unit);
    } else {
      Codes codes{};
      if constexpr (Bits & 4) codes = field<4 * (I % 2), 4, 0>(load_codes(unit + kStepBytes * (I / 2)));
      if constexpr (Bits & 2) {
        const Codes two = field<2 * (I % 4), 2, Bits & 4>(load_codes(unit + kStepBytes * (kTwos + I / 4)));
        codes = Bits & 4 ? either(codes, two) : two;
      }
      if constexpr (Bits & 1) {
        const Codes one = field<I, 1, Bits & 6>(load_codes(unit + kStepBytes * kOnes));
        codes = Bits & 6 ? either(codes, one) : one;
      }
      return codes;
    }
  }
};

// Bits & 4 is where two-bit parts go (0 or 4); Bits & 6 where one-bit parts go: 0, 2, 4 or 6.

template <int Bits, int Tiles>
FW_INLINE void accumulate_fields(const uint8_t* const (&codes)[Tiles], int64_t steps, const int8_t* x, Sums (&sum)[Tiles]) {
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

// ---- scales ----

FW_INLINE Floats load_scales(const fw_operand* operand, const uint8_t* scales, int64_t index) {
  switch (operand->scale_dtype) {
    case FW_LOG8:
      return log8(scales + 16 * index, kLog8Fractions, operand->scale_exponent);
    case FW_FLOAT16:
      return load_halves(reinterpret_cast<const uint16_t*>(scales) + 16 * index);
    case FW_BFLOAT16:
      return load_bfloats(reinterpret_cast<const uint16_t*>(scales) + 16 * index);
    default:
      return load_floats(reinterpret_cast<const float*>(scales) + 16 * index);
  }
}

// What belongs to a tile beside its codes.
struct TileScales {
  const uint8_t* scales;
  const uint8_t* zeros;  // or null
  FW_INLINE TileScales(const fw_operand* operand, int64_t tile)
      : scales(tile_scales(operand, tile)), zeros(operand->has_zeros ? tile_zeros(operand, tile) : nullptr) {}
};

// (sum - zero sum(x)) scale x_scale, added to `to`.
FW_INLINE void add_scaled(Floats& to, Sums sum, const uint8_t* zeros, int64_t group, Floats scale, float x_scale, int32_t x_sum,
                          int32_t offset) {
  const Sums zero = zeros ? times(load_bytes(zeros + 16 * group), spread(x_sum)) : spread(offset * x_sum);
  to = add(to, times(to_floats(subtract(sum, zero)), times(scale, spread(x_scale))));
}

FW_INLINE void put(const Output& out, int64_t rows, int64_t tile, int64_t token, Floats value) {
  float* to = out.values + token * out.stride + tile * kTileRows;
  const int64_t count = std::min<int64_t>(kTileRows, rows - tile * kTileRows);
  if (count == kTileRows) {
    store_floats(to, out.accumulate ? add(load_floats(to), value) : value);
    return;
  }
  alignas(64) float buffer[kTileRows];
  store_floats(buffer, value);
  for (int64_t r = 0; r < count; ++r) to[r] = out.accumulate ? to[r] + buffer[r] : buffer[r];
}

// ---- one token ----

// Steps through the segments of `Tiles` tiles, of which the first `live` count. Reader(x, sums) adds up one segment's
// integers: `Sets` sums at once, or, for FIELDS, those of one plane after the other.
template <int Sets, int Tiles, typename Reader>
FW_INLINE void one_token(const fw_operand* operand, const IntegerInput& x, const int64_t (&tiles)[Tiles], int live,
                         const Output& out, Reader& read) {
  const int planes = operand->tied ? 1 : operand->planes;
  Floats total[Tiles];
  for (Floats& f : total) f = zero_floats();
  const int8_t* at = x.codes;
  int64_t group = 0, left = operand->segments_per_group;
  for (int64_t segment = 0; segment < operand->segments; ++segment, at += 4 * operand->steps) {
    const Floats x_scale = spread(x.scales[segment]);
    const int32_t x_sum = x.sums[segment];
    for (int plane = 0; plane < planes; plane += Sets) {
      Sums sum[Sets][Tiles];
      for (int t = 0; t < Tiles; ++t)  // sums begin with what the zero points take away
        for (int p = 0; p < Sets; ++p)
          sum[p][t] = operand->has_zeros ? times(load_bytes(tile_zeros(operand, tiles[t]) + 16 * group), spread(-x_sum))
                                         : spread(-operand->offset * x_sum);
      read(at, sum);
      for (int t = 0; t < Tiles; ++t)
        for (int p = 0; p < Sets; ++p) {
          const Floats scale = load_scales(operand, tile_scales(operand, tiles[t]), group * planes + plane + p);
          total[t] = add(total[t], times(to_floats(sum[p][t]), times(scale, x_scale)));
        }
    }
    if (--left == 0) {
      ++group;
      left = operand->segments_per_group;
    }
  }
  for (int t = 0; t < live; ++t) put(out, operand->rows, tiles[t], 0, total[t]);
}

template <int Bits, int Tiles>
struct FieldsReader {
  const uint8_t* codes[Tiles];
  int64_t steps, bytes;
  FieldsReader(const fw_operand* operand, const int64_t (&tiles)[Tiles])
      : steps(operand->steps), bytes(operand->steps * kStepBytes * Bits / 8) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  FW_INLINE void operator()(const int8_t* x, Sums (&sum)[1][Tiles]) {
    accumulate_fields<Bits, Tiles>(codes, steps, x, sum[0]);
    for (int t = 0; t < Tiles; ++t) codes[t] += bytes;
  }
};

template <int Tiles>
struct QuartetReader {
  const uint8_t* codes[Tiles];
  int64_t steps;
  QuartetReader(const fw_operand* operand, const int64_t (&tiles)[Tiles]) : steps(operand->steps) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  FW_INLINE void operator()(const int8_t* x, Sums (&sum)[1][Tiles]) {
    accumulate_quartets<Tiles>(codes, steps, x, sum[0]);
    for (int t = 0; t < Tiles; ++t) codes[t] += steps * 10;
  }
};

#if defined(FW_HAS_TRITS)
// Sets: sums that are kept, one for each plane, or one for tied planes.
template <int Planes, int Sets, int Tiles, int Steps>
struct TritReader {
  const uint8_t* codes[Tiles];
  int64_t vectors;
  int phase = 0;
  TritTables tables[Planes];
  TritReader(const fw_operand* operand, const int64_t (&tiles)[Tiles]) : vectors(operand->steps / 5) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
    for (int p = 0; p < Planes; ++p) tables[p] = operand->tied ? weighted(operand->weights[p]) : kTritTables;
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
    phase = 0;
  }
  FW_INLINE void operator()(const int8_t* x, Sums (&sum)[Sets][Tiles]) {
    int64_t used = 0;
    if constexpr (Steps == 0) {
      used = accumulate_trits<Planes, Tiles, 0, 0, Sets>(codes, vectors, x, tables, sum);
    } else {
      switch (phase) {
        case 0: used = accumulate_trits<Planes, Tiles, Steps, 0, Sets>(codes, vectors, x, tables, sum); break;
        case 1: used = accumulate_trits<Planes, Tiles, Steps, 1, Sets>(codes, vectors, x, tables, sum); break;
        case 2: used = accumulate_trits<Planes, Tiles, Steps, 2, Sets>(codes, vectors, x, tables, sum); break;
        case 3: used = accumulate_trits<Planes, Tiles, Steps, 3, Sets>(codes, vectors, x, tables, sum); break;
        default: used = accumulate_trits<Planes, Tiles, Steps, 4, Sets>(codes, vectors, x, tables, sum); break;
      }
      phase = (phase + Steps) % 5;
    }
    for (int t = 0; t < Tiles; ++t) codes[t] += used;
  }
};
#endif

// Tiles [first, last) in streams: `Tiles` tiles at once, each from another stretch, then those that are left.
template <template <int> class Reader, int Sets, int Tiles>
void stream_tiles(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out) {
  if (first >= last) return;
  const int64_t stretch = (last - first) / Tiles, left = (last - first) % Tiles;
  int64_t tiles[Tiles];
  for (int t = 0; t < Tiles; ++t) tiles[t] = first;
  Reader<Tiles> read(operand, tiles);
  for (int64_t i = 0; i < stretch + (left > 0); ++i) {
    const int live = static_cast<int>(i < stretch ? Tiles : left);
    for (int t = 0; t < Tiles; ++t)
      tiles[t] = i < stretch ? first + t * stretch + i : std::min(first + Tiles * stretch + t, last - 1);
    read.move_to(operand, tiles);
    one_token<Sets, Tiles>(operand, x, tiles, live, out, read);
  }
}

template <int Bits>
struct FieldsOf {
  template <int Tiles>
  using Reader = FieldsReader<Bits, Tiles>;
};
#if defined(FW_HAS_TRITS)
template <int Planes, int Sets, int Steps>
struct TritsOf {
  template <int Tiles>
  using Reader = TritReader<Planes, Sets, Tiles, Steps>;
};

template <int Planes, int Sets, int Tiles>
void stream_trits(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out) {
  switch (packed_segments(operand->steps) ? operand->steps : 0) {
    case 8: return stream_tiles<TritsOf<Planes, Sets, 8>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    case 16: return stream_tiles<TritsOf<Planes, Sets, 16>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    case 32: return stream_tiles<TritsOf<Planes, Sets, 32>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    default: return stream_tiles<TritsOf<Planes, Sets, 0>::template Reader, Sets, Tiles>(operand, x, first, last, out);
  }
}
#endif

// ---- many tokens: unpacked codes ----

// All codes of a tile and plane as bytes, [segments * steps][64]; for tied trits the joint code.
template <int Bits>
void unpack_fields(const fw_operand* operand, int64_t tile, int plane, uint8_t* to) {
  constexpr int kUnit = unit_steps(Bits);
  const int64_t bytes = operand->steps * kStepBytes * Bits / 8;
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const uint8_t* from = tile_codes(operand, tile) + (segment * operand->planes + plane) * bytes;
    for (int64_t s = 0; s < operand->steps; s += kUnit, from += kUnit * kStepBytes * Bits / 8)
      each<kUnit>([&](auto i) FW_LAMBDA {
        store_codes(to, Fields<Bits>::template step<decltype(i)::value>(from));
        to += kStepBytes;
      });
  }
}

void unpack_quartets(const fw_operand* operand, int64_t tile, uint8_t* to) {
  const uint8_t* from = tile_codes(operand, tile);
  for (int64_t s = 0; s < operand->segments * operand->steps; s += 32, from += 5 * kStepBytes)
    each<32>([&](auto i) FW_LAMBDA {
      store_codes(to, quartet_step<decltype(i)::value>(from));
      to += kStepBytes;
    });
}

// The five digits of a byte of TRITS, for unpacking without VBMI and for what is not whole vectors.
FW_INLINE uint8_t trit_digit(uint8_t byte, int d) {
  static constexpr int kPower[3] = {1, 3, 9};
  const int r = byte < kEscape ? byte >> 3 : byte - kEscape, q = byte < kEscape ? byte & 7 : 8;
  return static_cast<uint8_t>(d < 3 ? r / kPower[d] % 3 : d == 3 ? 2 - q % 3 : 2 - q / 3);
}

FW_INLINE void unpack_trit_vector(const uint8_t* from, int count, uint8_t* to, int64_t weight, bool onto) {
#if defined(FW_HAS_TRITS)
  const TritVector v = trit_vector(from);
  each<5>([&](auto i) FW_LAMBDA {
    if (i >= count) return;
    Codes codes = digit<decltype(i)::value>(v, kTritTables);
    if (weight != 1) codes = times(codes, static_cast<int>(weight));
    store_codes(to + kStepBytes * i, onto ? add(load_codes(to + kStepBytes * i), codes) : codes);
  });
#else
  for (int d = 0; d < count; ++d)
    for (int j = 0; j < kStepBytes; ++j) {
      const int value = static_cast<int>(weight) * trit_digit(from[j], d);
      uint8_t& place = to[kStepBytes * d + j];
      place = static_cast<uint8_t>(onto ? place + value : value);
    }
#endif
}

void unpack_trits(const fw_operand* operand, int64_t tile, int plane, uint8_t* to, int64_t weight, bool onto) {
  const int64_t steps = operand->segments * operand->steps;
  const uint8_t* from = tile_codes(operand, tile) + kStepBytes * plane;
  for (int64_t s = 0; s < steps; s += 5, from += kStepBytes * operand->planes)
    unpack_trit_vector(from, static_cast<int>(std::min<int64_t>(5, steps - s)), to + s * kStepBytes, weight, onto);
}

// Planes that remain after unpacking: tied ones have become one.
FW_INLINE int unpacked_planes(const fw_operand* operand) { return operand->tied ? 1 : operand->planes; }

void unpack_tile(const fw_operand* operand, int64_t tile, int plane, uint8_t* to) {
  if (operand->layout == FW_QUARTETS) return unpack_quartets(operand, tile, to);
  if (operand->layout == FW_TRITS) {
    if (!operand->tied) return unpack_trits(operand, tile, plane, to, 1, false);
    for (int p = 0; p < operand->planes; ++p) unpack_trits(operand, tile, p, to, operand->weights[p], p > 0);
    return;
  }
  switch (operand->bits) {
    case 1: return unpack_fields<1>(operand, tile, plane, to);
    case 2: return unpack_fields<2>(operand, tile, plane, to);
    case 3: return unpack_fields<3>(operand, tile, plane, to);
    case 4: return unpack_fields<4>(operand, tile, plane, to);
    case 5: return unpack_fields<5>(operand, tile, plane, to);
    case 6: return unpack_fields<6>(operand, tile, plane, to);
    case 7: return unpack_fields<7>(operand, tile, plane, to);
    default: return unpack_fields<8>(operand, tile, plane, to);
  }
}

int64_t unpacked_bytes(const fw_operand* operand) { return operand->segments * operand->steps * kStepBytes; }

int64_t work_bytes(const fw_operand* operand, int64_t tokens) {
  (void)tokens;
  if (operand->layout == FW_PLAIN || operand->layout == FW_TABLES) return 64;
  return kGemmTiles * 3 * unpacked_bytes(operand) + 4096;
}

bool wide_codes(const fw_operand* operand) { return operand->layout == FW_FIELDS && operand->bits == 8; }

template <int Tokens>
struct TokenBlock {
  const int8_t* codes[Tokens];
  const float* scales[Tokens];
  const int32_t* sums[Tokens];
  int count;
  TokenBlock(const IntegerInput& x, int64_t first) : count(static_cast<int>(std::min<int64_t>(Tokens, x.tokens - first))) {
    for (int m = 0; m < Tokens; ++m) {
      const int64_t token = first + std::min(m, count - 1);
      codes[m] = x.codes + token * x.columns;
      scales[m] = x.scales + token * x.segments;
      sums[m] = x.sums + token * x.segments;
    }
  }
};

template <int Tiles, int Tokens, bool Wide>
void gemm_block(const fw_operand* operand, const IntegerInput& x, int64_t first_token, const int64_t (&tiles)[Tiles],
                const uint8_t* const (&codes)[Tiles][3], const Output& out) {
  const TokenBlock<Tokens> block(x, first_token);
  const int planes = unpacked_planes(operand);
  alignas(64) float totals[Tiles][Tokens][kTileRows] = {};
  const int64_t steps = operand->steps;
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const int64_t group = segment / operand->segments_per_group;
    for (int plane = 0; plane < planes; ++plane) {
      Sums sum[Tiles][Tokens];
      for (auto& tile : sum)
        for (Sums& s : tile) s = zero_sums();
      for (int64_t step = segment * steps; step < (segment + 1) * steps; ++step) {
        Codes now[Tiles];
        for (int t = 0; t < Tiles; ++t) now[t] = load_codes(codes[t][plane] + kStepBytes * step);
        for (int m = 0; m < Tokens; ++m)
          for (int t = 0; t < Tiles; ++t) sum[t][m] = dot<Wide>(sum[t][m], now[t], block.codes[m] + 4 * step);
      }
      for (int t = 0; t < Tiles; ++t) {
        const TileScales scales(operand, tiles[t]);
        const Floats scale = load_scales(operand, scales.scales, group * planes + plane);
        for (int m = 0; m < Tokens; ++m) {
          Floats total = load_floats(totals[t][m]);
          add_scaled(total, sum[t][m], scales.zeros, group, scale, block.scales[m][segment], block.sums[m][segment],
                     operand->offset);
          store_floats(totals[t][m], total);
        }
      }
    }
  }
  for (int t = 0; t < Tiles; ++t)
    for (int m = 0; m < block.count; ++m) put(out, operand->rows, tiles[t], first_token + m, load_floats(totals[t][m]));
}

template <int Tiles, bool Wide>
void many_tokens(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  const int64_t bytes = unpacked_bytes(operand);
  const int planes = unpacked_planes(operand);
  uint8_t* space = static_cast<uint8_t*>(work);
  for (int64_t tile = first; tile + Tiles <= last; tile += Tiles) {
    int64_t tiles[Tiles];
    const uint8_t* codes[Tiles][3] = {};
    for (int t = 0; t < Tiles; ++t) {
      tiles[t] = tile + t;
      for (int plane = 0; plane < planes; ++plane) {
        uint8_t* to = space + (3 * t + plane) * bytes;
        unpack_tile(operand, tile + t, plane, to);
        codes[t][plane] = to;
      }
    }
    int64_t token = 0;
    for (; x.tokens - token > 4; token += kGemmTokens) gemm_block<Tiles, kGemmTokens, Wide>(operand, x, token, tiles, codes, out);
    if (token < x.tokens) gemm_block<Tiles, 4, Wide>(operand, x, token, tiles, codes, out);
  }
}

template <bool Wide>
void many_tokens_of(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out,
                    void* work) {
  many_tokens<kGemmTiles, Wide>(operand, x, first, last, out, work);
  const int64_t left = (last - first) % kGemmTiles;
  if (left) many_tokens<1, Wide>(operand, x, last - left, last, out, work);
}

void integer_tiles(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out, void* work) {
#if !defined(FW_HAS_TRITS)
  const bool few = x.tokens == 1 && operand->layout != FW_TRITS;
#else
  const bool few = x.tokens == 1;
#endif
  if (!few) return wide_codes(operand) ? many_tokens_of<true>(operand, x, first, last, out, work)
                                       : many_tokens_of<false>(operand, x, first, last, out, work);
  if (operand->layout == FW_QUARTETS) return stream_tiles<QuartetReader, 1, kStreams>(operand, x, first, last, out);
#if defined(FW_HAS_TRITS)
  if (operand->layout == FW_TRITS) {
    switch (2 * operand->planes + operand->tied) {
      case 2:
      case 3: return stream_trits<1, 1, kStreams>(operand, x, first, last, out);
      case 4: return stream_trits<2, 2, kStreams>(operand, x, first, last, out);
      case 5: return stream_trits<2, 1, kStreams>(operand, x, first, last, out);
      case 6: return stream_trits<3, 3, kStreams>(operand, x, first, last, out);
      default: return stream_trits<3, 1, kStreams>(operand, x, first, last, out);
    }
  }
#endif
  switch (operand->bits) {
    case 1: return stream_tiles<FieldsOf<1>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 2: return stream_tiles<FieldsOf<2>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 3: return stream_tiles<FieldsOf<3>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 4: return stream_tiles<FieldsOf<4>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 5: return stream_tiles<FieldsOf<5>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 6: return stream_tiles<FieldsOf<6>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 7: return stream_tiles<FieldsOf<7>::Reader, 1, kStreams>(operand, x, first, last, out);
    default: return stream_tiles<FieldsOf<8>::Reader, 1, kStreams>(operand, x, first, last, out);
  }
}

// ---- exact activations ----

// Sums over the columns of a segment run in their order, row by row in the lanes.
template <int Tokens>
FW_INLINE void float_block(const fw_operand* operand, const FloatInput& x, int64_t first_token, int64_t tile,
                           const uint8_t* const (&codes)[3], const Output& out) {
  const int planes = unpacked_planes(operand);
  const TileScales scales(operand, tile);
  const int count = static_cast<int>(std::min<int64_t>(Tokens, x.tokens - first_token));
  Floats total[Tokens];
  for (Floats& f : total) f = zero_floats();
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const int64_t group = segment / operand->segments_per_group;
    const Floats zero = scales.zeros ? to_floats(load_bytes(scales.zeros + 16 * group)) : spread(static_cast<float>(operand->offset));
    for (int plane = 0; plane < planes; ++plane) {
      Floats sum[Tokens];
      for (Floats& f : sum) f = zero_floats();
      for (int64_t step = segment * operand->steps; step < (segment + 1) * operand->steps; ++step) {
        const Codes now = load_codes(codes[plane] + kStepBytes * step);
        each<4>([&](auto j) FW_LAMBDA {
          const Floats level = subtract(column<decltype(j)::value>(now), zero);
          for (int m = 0; m < Tokens; ++m) {
            const int64_t token = first_token + std::min(m, count - 1);
            sum[m] = add(sum[m], times(level, spread(x.values[token * x.columns + 4 * step + j])));
          }
        });
      }
      const Floats scale = load_scales(operand, scales.scales, group * planes + plane);
      for (int m = 0; m < Tokens; ++m) total[m] = add(total[m], times(sum[m], scale));
    }
  }
  for (int m = 0; m < count; ++m) put(out, operand->rows, tile, first_token + m, total[m]);
}

void float_tiles(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  uint8_t* space = static_cast<uint8_t*>(work);
  for (int64_t tile = first; tile < last; ++tile) {
    const uint8_t* codes[3] = {};
    for (int plane = 0; plane < unpacked_planes(operand); ++plane) {
      uint8_t* to = space + plane * unpacked_bytes(operand);
      unpack_tile(operand, tile, plane, to);
      codes[plane] = to;
    }
    int64_t token = 0;
    for (; token + 4 <= x.tokens; token += 4) float_block<4>(operand, x, token, tile, codes, out);
    for (; token < x.tokens; ++token) float_block<1>(operand, x, token, tile, codes, out);
  }
}

// ---- lanes are columns ----

// Sixteen partial sums are added in halves: the same bits everywhere.
FW_INLINE float total(Floats f) {
  alignas(64) float v[16];
  store_floats(v, f);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

FW_INLINE Floats load_values(const uint8_t* from, int32_t dtype, int64_t index) {
  switch (dtype) {
    case FW_FLOAT16: return load_halves(reinterpret_cast<const uint16_t*>(from) + index);
    case FW_BFLOAT16: return load_bfloats(reinterpret_cast<const uint16_t*>(from) + index);
    default: return load_floats(reinterpret_cast<const float*>(from) + index);
  }
}

template <int Rows, int Tokens, int Dtype>
FW_INLINE void plain_block(const fw_operand* operand, const FloatInput& x, int64_t token, int64_t row, const Output& out) {
  const int64_t width = padded_columns(operand), stride = operand->codes_per_tile / kTileRows;
  const uint8_t* from = tile_codes(operand, 0) + row * stride;
  Floats sum[Rows][Tokens];
  for (auto& r : sum)
    for (Floats& f : r) f = zero_floats();
  for (int64_t c = 0; c < width; c += 16) {
    Floats value[Tokens];
    for (int m = 0; m < Tokens; ++m) value[m] = load_floats(x.values + (token + m) * x.columns + c);
    for (int r = 0; r < Rows; ++r) {
      prefetch(from + r * stride + c * scale_bytes(Dtype) + 512);
      const Floats weight = load_values(from + r * stride, Dtype, c);
      for (int m = 0; m < Tokens; ++m) sum[r][m] = add(sum[r][m], times(weight, value[m]));
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int m = 0; m < Tokens; ++m) {
      float& to = out.values[(token + m) * out.stride + row + r];
      to = out.accumulate ? to + total(sum[r][m]) : total(sum[r][m]);
    }
}

template <int Dtype>
void plain_rows(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) {
    int64_t token = 0;
    for (; token + 4 <= x.tokens; token += 4) plain_block<4, 4, Dtype>(operand, x, token, row, out);
    for (; token < x.tokens; ++token) plain_block<4, 1, Dtype>(operand, x, token, row, out);
  }
  for (; row < last; ++row)
    for (int64_t token = 0; token < x.tokens; ++token) plain_block<1, 1, Dtype>(operand, x, token, row, out);
}

// Codes of 16 columns as bytes; `unit` of 16-byte vectors.
template <int Bits, int I>
FW_INLINE void row_step(const uint8_t* unit, uint8_t* to) {
  using Layout = Fields<Bits>;
  for (int j = 0; j < 16; ++j) {
    if constexpr (Bits == 8) {
      to[j] = unit[j];
    } else {
      int code = 0;
      if constexpr (Bits & 4) code |= unit[16 * (I / 2) + j] >> (4 * (I % 2)) & 15;
      if constexpr (Bits & 2) code |= (unit[16 * (Layout::kTwos + I / 4) + j] >> (2 * (I % 4)) & 3) << (Bits & 4);
      if constexpr (Bits & 1) code |= (unit[16 * Layout::kOnes + j] >> I & 1) << (Bits & 6);
      to[j] = static_cast<uint8_t>(code);
    }
  }
}

template <int Bits, int Tokens>
FW_INLINE void table_block(const fw_operand* operand, const FloatInput& x, int64_t token, int64_t row, const Output& out) {
  constexpr int kUnit = unit_steps(Bits);
  constexpr int64_t kUnitBytes = kUnit * 2 * Bits;
  const int64_t columns = operand->steps * 4;
  const uint8_t* codes = tile_codes(operand, 0) + row * (operand->codes_per_tile / kTileRows);
  const float* tables = reinterpret_cast<const float*>(tile_scales(operand, 0)) + row * operand->groups * (1 << Bits);
  Floats sum[Tokens];
  for (Floats& f : sum) f = zero_floats();
  alignas(64) float table[16] = {};
  alignas(16) uint8_t index[16];
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const float* entries = tables + segment / operand->segments_per_group * (1 << Bits);
    if (Bits <= 4) memcpy(table, entries, sizeof(float) * std::min(16, 1 << Bits));
    for (int64_t c = 0; c < columns; c += 16 * kUnit, codes += kUnitBytes)
      each<kUnit>([&](auto i) FW_LAMBDA {
        row_step<Bits, decltype(i)::value>(codes, index);
        Floats weight;
        if constexpr (Bits <= 4) {
          weight = look_up16(table, index);
        } else {
          alignas(64) float found[16];
          for (int j = 0; j < 16; ++j) found[j] = entries[index[j]];
          weight = load_floats(found);
        }
        for (int m = 0; m < Tokens; ++m)
          sum[m] = add(sum[m], times(weight, load_floats(x.values + (token + m) * x.columns + segment * columns + c + 16 * i)));
      });
  }
  for (int m = 0; m < Tokens; ++m) {
    float& to = out.values[(token + m) * out.stride + row];
    to = out.accumulate ? to + total(sum[m]) : total(sum[m]);
  }
}

template <int Bits>
void table_rows(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out) {
  for (int64_t row = first; row < last; ++row) {
    int64_t token = 0;
    for (; token + 4 <= x.tokens; token += 4) table_block<Bits, 4>(operand, x, token, row, out);
    for (; token < x.tokens; ++token) table_block<Bits, 1>(operand, x, token, row, out);
  }
}

void float_rows(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void*) {
  const int64_t begin = first * kTileRows, end = std::min(operand->rows, last * kTileRows);
  if (operand->layout == FW_PLAIN) {
    switch (operand->scale_dtype) {
      case FW_FLOAT16: return plain_rows<FW_FLOAT16>(operand, x, begin, end, out);
      case FW_BFLOAT16: return plain_rows<FW_BFLOAT16>(operand, x, begin, end, out);
      default: return plain_rows<FW_FLOAT32>(operand, x, begin, end, out);
    }
  }
  switch (operand->bits) {
    case 1: return table_rows<1>(operand, x, begin, end, out);
    case 2: return table_rows<2>(operand, x, begin, end, out);
    case 3: return table_rows<3>(operand, x, begin, end, out);
    case 4: return table_rows<4>(operand, x, begin, end, out);
    case 5: return table_rows<5>(operand, x, begin, end, out);
    case 6: return table_rows<6>(operand, x, begin, end, out);
    case 7: return table_rows<7>(operand, x, begin, end, out);
    default: return table_rows<8>(operand, x, begin, end, out);
  }
}

// ---- activations ----

void quantize(const float* x, int64_t count, int8_t* codes, float* scale, int32_t* sum) {
  float largest = 0.0F;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    finite &= size <= 3.402823466e38F;
    largest = size > largest ? size : largest;
  }
  const float step = largest / 127.0F;
  const float inverse = step > 1e-35F && finite ? 127.0F / largest : 0.0F;  // smaller ones have no finite inverse
  int32_t total_of_codes = 0;
  for (int64_t i = 0; i < count; ++i) {
    // Adding and taking away 1.5 2^23 rounds to the nearest integer, halves to even.
    const float rounded = (finite ? x[i] * inverse : 0.0F) + 12582912.0F;
    const int32_t code = static_cast<int32_t>(rounded - 12582912.0F);
    codes[i] = static_cast<int8_t>(code > 127 ? 127 : code < -127 ? -127 : code);
    total_of_codes += codes[i];
  }
  *scale = finite ? (inverse > 0.0F ? step : 0.0F) : std::nanf("");
  *sum = total_of_codes;
}

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

template <int Distance>
FW_INLINE void butterfly_within(F16* v, int64_t vectors) {
  const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const I16 partner = lane ^ Distance, upper = (lane & Distance) != 0;
  const I16 sign = upper & INT32_MIN;
  for (int64_t i = 0; i < vectors; ++i) {
    I16 bits;
    memcpy(&bits, &v[i], sizeof bits);
    bits ^= sign;
    F16 signed_value;
    memcpy(&signed_value, &bits, sizeof bits);
    v[i] = __builtin_shuffle(v[i], partner) + signed_value;  // lower lanes a + b, upper ones a - b
  }
}

// Butterflies of the Sylvester matrix over runs of `order` values, `order` a power of two.
void sylvester(float* x, int64_t order, int64_t count) {
  if (order >= 16) {
    F16* v = reinterpret_cast<F16*>(x);
    const int64_t vectors = count / 16;
    butterfly_within<1>(v, vectors);
    butterfly_within<2>(v, vectors);
    butterfly_within<4>(v, vectors);
    butterfly_within<8>(v, vectors);
    for (int64_t half = 1; half < order / 16; half *= 2)
      for (int64_t first = 0; first < vectors; first += 2 * half)
        for (int64_t i = first; i < first + half; ++i) {
          const F16 a = v[i], b = v[i + half];
          v[i] = a + b;
          v[i + half] = a - b;
        }
    return;
  }
  for (int64_t half = 1; half < order; half *= 2)
    for (int64_t first = 0; first < count; first += 2 * half)
      for (int64_t i = first; i < first + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

// Signs of the Paley matrices of order 12, 20 and 28 (codes/hadamard.py).
int paley_sign(int order, int i, int j) {
  const int prime = order == 28 ? 13 : order - 1;
  const auto character = [prime](int a) {
    a = (a % prime + prime) % prime;
    if (a == 0) return 0;
    for (int s = 1; s < prime; ++s)
      if (s * s % prime == a) return 1;
    return -1;
  };
  const auto core = [&](int r, int c) {
    if (r == 0) return c == 0 ? 0 : 1;
    if (c == 0) return order == 28 ? 1 : -1;
    return character(r - c);
  };
  if (order != 28) return (i == j) + core(i, j);
  static constexpr int kCore[2][2] = {{1, 1}, {1, -1}}, kUnit[2][2] = {{1, -1}, {-1, -1}};
  return core(i / 2, j / 2) * kCore[i % 2][j % 2] + (i / 2 == j / 2) * kUnit[i % 2][j % 2];
}

void hadamard(float* x, const float* signs, int64_t block, int64_t count) {
  if (signs)
    for (int64_t i = 0; i < count; ++i) x[i] *= signs[i];
  int64_t odd = block;
  while (odd % 2 == 0) odd /= 2;
  const int kernel = odd == 1 ? 1 : static_cast<int>(4 * odd);
  const int64_t order = block / kernel;
  sylvester(x, order, count);
  if (kernel > 1) {
    for (int64_t first = 0; first < count; first += block)
      for (int64_t i = 0; i < order; ++i) {
        float in[28], out[28];
        for (int k = 0; k < kernel; ++k) in[k] = x[first + k * order + i];
        for (int r = 0; r < kernel; ++r) {
          out[r] = 0.0F;
          for (int k = 0; k < kernel; ++k) out[r] += static_cast<float>(paley_sign(kernel, r, k)) * in[k];
        }
        for (int k = 0; k < kernel; ++k) x[first + k * order + i] = out[k];
      }
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

int64_t spin(int64_t rounds) {
  constexpr int kChains = 12;
  alignas(64) uint8_t codes[64];
  int8_t x[4 * kChains];
  memset(codes, 1, sizeof codes);
  memset(x, 1, sizeof x);
  Sums sum[kChains];
  for (Sums& s : sum) s = zero_sums();
  Codes c = load_codes(codes);
  for (int64_t r = 0; r < rounds; ++r) {
#if defined(__AVX512F__) || defined(__AVX2__)
    asm volatile("" ::: "memory");
#endif
    for (int k = 0; k < kChains; ++k) sum[k] = dot<false>(sum[k], c, x + 4 * k);
  }
  Sums all = sum[0];
  for (int k = 1; k < kChains; ++k) all = add(all, sum[k]);
  alignas(64) float v[16];
  store_floats(v, to_floats(all));
  return v[0] < -1.0F ? 0 : rounds * kChains * 64;
}

#define FW_STRING_(a) #a
#define FW_STRING(a) FW_STRING_(a)

#if defined(FW_HAS_TRITS)
constexpr int32_t kTritsFaster = 1;
#else
constexpr int32_t kTritsFaster = 0;
#endif

constexpr ProductKernels kKernels = {FW_STRING(FW_ISA), kTritsFaster, work_bytes, integer_tiles, float_tiles,
                                     float_rows,        quantize,     hadamard,   unpack_tile, spin};

}  // namespace

const ProductKernels* FW_CONCAT(product_kernels_, FW_ISA)() { return &kKernels; }
