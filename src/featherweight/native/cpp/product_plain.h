// Products with matrices of plain values (PLAIN): bfloat16, float16 or float32.
//
// Each result is one chain of fused multiply-adds down the columns, in their order, whatever the number of tokens, tiles at
// a time, or threads: a token's results do not depend on its neighbours. With AVX512-BF16 and inputs that may be rounded, a
// link of the chain is a pair of columns, multiplied in one instruction.
//
// Tokens go through a matrix in groups, whose values of one column lie side by side: a group's sums with kPlainTiles tiles
// fill the registers, and a vector of weights that is loaded once serves all of them.
#ifndef FEATHERWEIGHT_PRODUCT_PLAIN_H
#define FEATHERWEIGHT_PRODUCT_PLAIN_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

#include "product_codes.h"
#include "product_kernels.h"
#include "product_lanes.h"
#include "product_layout.h"
#include "product_scales.h"

namespace {  // compiled for several instruction sets

#if defined(FW_NEON)
constexpr int kPlainTiles = 1, kPlainTokens = 6;
#elif defined(__AVX512F__)
constexpr int kPlainTiles = 2, kPlainTokens = 12;
#elif defined(__AVX2__)
constexpr int kPlainTiles = 1, kPlainTokens = 6;
#else
constexpr int kPlainTiles = 1, kPlainTokens = 4;
#endif
constexpr int64_t kPlainTogether = 8;  // tiles whose columns of a block stay in the second cache for all tokens
constexpr int64_t kPlainBlock = 512;   // words of a token in a block of columns: a group's stay in the first cache
constexpr int kPlainStreams = 4;       // tiles at once for a single token, each from another stretch of the matrix

// What an operand holds, and how inputs are read with it.
enum class Plain { kFloat32, kHalf, kBfloat, kBfloatPairs };

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
FW_INLINE Floats dot_pairs(Floats to, Codes pairs, uint32_t x) {
  return {_mm512_dpbf16_ps(to.v, reinterpret_cast<__m512bh>(pairs.v), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x))))};
}
#else
constexpr bool kHasPairs = false;
FW_INLINE Floats dot_pairs(Floats to, const Codes&, uint32_t) { return to; }
#endif

// ---- inputs ----

// Column c of a token stands at [c or pair of columns][tokens of its group].
void plain_input(const PlainShape& shape, const float* x, int64_t token, int64_t tokens, void* to) {
  const int64_t first = token / kPlainTokens * kPlainTokens, group = std::min<int64_t>(kPlainTokens, tokens - first);
  const bool pairs = kHasPairs && shape.rounded;
  uint32_t* place = static_cast<uint32_t*>(to) + (pairs ? shape.columns / 2 : shape.columns) * first + (token - first);
  for (int64_t c = 0; c < shape.columns; c += kPlainPadding) {
    alignas(64) float part[kPlainPadding] = {};
    alignas(64) uint32_t words[kPlainPadding];
    memcpy(part, x + c, static_cast<size_t>(std::min(kPlainPadding, shape.cols - c)) * sizeof(float));
    memcpy(words, part, sizeof words);
    if (shape.rounded)
      for (int i = 0; i < kPlainPadding; ++i) words[i] = bfloat_bits(part[i]) << 16;
    if (pairs)
      for (int i = 0; i < kPlainPadding / 2; ++i, place += group) *place = words[2 * i] >> 16 | words[2 * i + 1];
    else
      for (int i = 0; i < kPlainPadding; ++i, place += group) *place = words[i];
  }
}

// ---- products ----

// Columns of a step, bytes of a tile's step, and words of one token's step.
template <Plain Kind>
struct PlainStep {
  static constexpr int kColumns = Kind == Plain::kBfloat || Kind == Plain::kBfloatPairs ? 2 : 1;
  static constexpr int64_t kBytes = Kind == Plain::kHalf ? 32 : 64;
  static constexpr int kWords = Kind == Plain::kBfloat ? 2 : 1;
};

// Column J of a step as floats.
template <Plain Kind, int J>
FW_INLINE Floats plain_values(const uint8_t* step) {
  if constexpr (Kind == Plain::kFloat32)
    return load_floats(reinterpret_cast<const float*>(step));
  else if constexpr (Kind == Plain::kHalf)
    return load_halves(reinterpret_cast<const uint16_t*>(step));
  else
    return J == 0 ? even_bfloats(step) : odd_bfloats(step);
}

// sum[tile][token] over `steps` steps; words of one column are `group` apart from those of the next.
template <Plain Kind, int Tiles, int Tokens>
FW_INLINE void plain_steps(const uint8_t* const (&codes)[Tiles], int64_t steps, const uint32_t* x, int64_t group,
                           Floats (&sum)[Tiles][Tokens]) {
  using Step = PlainStep<Kind>;
  for (int64_t s = 0; s < steps; ++s, x += Step::kWords * group) {
    const int64_t at = s * Step::kBytes;
    if constexpr (Tokens == 1)
      for (int t = 0; t < Tiles; ++t) prefetch(codes[t] + at + kAhead);
    if constexpr (Kind == Plain::kBfloatPairs) {
      Codes pairs[Tiles];
      for (int t = 0; t < Tiles; ++t) pairs[t] = load_codes(codes[t] + at);
#pragma GCC unroll 16
      for (int m = 0; m < Tokens; ++m)
#pragma GCC unroll 4
        for (int t = 0; t < Tiles; ++t) sum[t][m] = dot_pairs(sum[t][m], pairs[t], x[m]);
    } else {
      each<Step::kColumns>([&](auto j) FW_LAMBDA {
        Floats values[Tiles];
        for (int t = 0; t < Tiles; ++t) values[t] = plain_values<Kind, decltype(j)::value>(codes[t] + at);
#pragma GCC unroll 16
        for (int m = 0; m < Tokens; ++m) {
          float value;
          memcpy(&value, x + j * group + m, sizeof value);
          const Floats same = spread(value);
#pragma GCC unroll 4
          for (int t = 0; t < Tiles; ++t) sum[t][m] = multiply_add(sum[t][m], values[t], same);
        }
      });
    }
  }
}

// One block of columns of all tokens with some tiles.
struct PlainBlock {
  const fw_operand* operand;
  const uint32_t* x;      // the group's first word of the block
  int64_t group, token;   // tokens of the group, and its first
  int64_t first, steps;   // of the block
  bool begins, ends;      // whether it is the first, the last of the matrix
  float* totals;          // [tokens][kPlainTogether][16], between blocks
  const Output& out;
};

template <Plain Kind, int Tiles, int Tokens>
void plain_part(const PlainBlock& b, int64_t tile, int64_t within, int64_t m) {
  const uint8_t* codes[Tiles];
  Floats sum[Tiles][Tokens];
  float* totals = b.totals + ((b.token + m) * kPlainTogether + within) * kTileRows;
  for (int t = 0; t < Tiles; ++t) {
    codes[t] = tile_codes(b.operand, tile + t) + b.first * PlainStep<Kind>::kBytes;
    for (int i = 0; i < Tokens; ++i)
      sum[t][i] = b.begins ? zero_floats() : load_floats(totals + (i * kPlainTogether + t) * kTileRows);
  }
  plain_steps<Kind, Tiles, Tokens>(codes, b.steps, b.x + m, b.group, sum);
  for (int t = 0; t < Tiles; ++t)
    for (int i = 0; i < Tokens; ++i)
      if (b.ends)
        put(b.out, b.operand->rows, tile + t, b.token + m + i, sum[t][i]);
      else
        store_floats(totals + (i * kPlainTogether + t) * kTileRows, sum[t][i]);
}

template <Plain Kind, int Tiles>
FW_INLINE void plain_group(const PlainBlock& b, int64_t tile, int64_t within) {
  int64_t m = 0;
  for (; m + kPlainTokens <= b.group; m += kPlainTokens) plain_part<Kind, Tiles, kPlainTokens>(b, tile, within, m);
  for (; m + 4 <= b.group; m += 4) plain_part<Kind, Tiles, 4>(b, tile, within, m);
  for (; m + 2 <= b.group; m += 2) plain_part<Kind, Tiles, 2>(b, tile, within, m);
  for (; m < b.group; ++m) plain_part<Kind, Tiles, 1>(b, tile, within, m);
}

template <Plain Kind>
void plain_many_tokens(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  using Step = PlainStep<Kind>;
  const int64_t steps = padded_columns(operand) / Step::kColumns;
  const int64_t block = kPlainBlock / Step::kWords;
  for (int64_t tile = first; tile < last; tile += kPlainTogether) {
    const int64_t end = std::min(last, tile + kPlainTogether);
    for (int64_t step = 0; step < steps; step += block) {
      const int64_t count = std::min(block, steps - step);
      for (int64_t token = 0; token < x.tokens; token += kPlainTokens) {
        const int64_t group = std::min<int64_t>(kPlainTokens, x.tokens - token);
        const uint32_t* words = static_cast<const uint32_t*>(x.values) + Step::kWords * (steps * token + step * group);
        const PlainBlock b = {operand, words, group, token, step, count, step == 0, step + count == steps,
                              static_cast<float*>(work), out};
        int64_t t = tile;
        for (; t + kPlainTiles <= end; t += kPlainTiles) plain_group<Kind, kPlainTiles>(b, t, t - tile);
        for (; t < end; ++t) plain_group<Kind, 1>(b, t, t - tile);
      }
    }
  }
}

// As stream_tiles of product_one_token.h.
template <Plain Kind>
void plain_one_token(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out) {
  constexpr int kTiles = kPlainStreams;
  const int64_t steps = padded_columns(operand) / PlainStep<Kind>::kColumns;
  const int64_t stretch = (last - first) / kTiles, left = (last - first) % kTiles;
  for (int64_t i = 0; i < stretch + (left > 0); ++i) {
    int64_t tiles[kTiles];
    const uint8_t* codes[kTiles];
    Floats sum[kTiles][1];
    for (int t = 0; t < kTiles; ++t) {
      tiles[t] = i < stretch ? first + t * stretch + i : std::min(first + kTiles * stretch + t, last - 1);
      codes[t] = tile_codes(operand, tiles[t]);
      sum[t][0] = zero_floats();
    }
    plain_steps<Kind, kTiles, 1>(codes, steps, static_cast<const uint32_t*>(x.values), 1, sum);
    for (int t = 0; t < (i < stretch ? kTiles : left); ++t) put(out, operand->rows, tiles[t], 0, sum[t][0]);
  }
}

template <Plain Kind>
void plain_product(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  if (first >= last) return;
  if (x.tokens == 1) return plain_one_token<Kind>(operand, x, first, last, out);
  plain_many_tokens<Kind>(operand, x, first, last, out, work);
}

void plain_tiles(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  switch (operand->scale_dtype) {
    case FW_FLOAT16: return plain_product<Plain::kHalf>(operand, x, first, last, out, work);
    case FW_FLOAT32: return plain_product<Plain::kFloat32>(operand, x, first, last, out, work);
    default: break;
  }
  if constexpr (kHasPairs)
    if (x.rounded) return plain_product<Plain::kBfloatPairs>(operand, x, first, last, out, work);
  plain_product<Plain::kBfloat>(operand, x, first, last, out, work);
}

inline int64_t plain_work_bytes(int64_t tokens) { return tokens * kPlainTogether * kTileRows * 4 + 64; }

// Multiply-adds of about `rounds` steps whose operands stay in the first cache: the limit of `plain_tiles`.
int64_t plain_spin(int64_t rounds) {
  constexpr Plain kKind = kHasPairs ? Plain::kBfloatPairs : Plain::kBfloat;
  constexpr int64_t kSteps = 64;
  alignas(64) uint8_t codes[kPlainTiles][64 * kSteps] = {};
  uint32_t x[2 * kPlainTokens * kSteps] = {};
  const uint8_t* places[kPlainTiles];
  for (int t = 0; t < kPlainTiles; ++t) places[t] = codes[t];
  Floats sum[kPlainTiles][kPlainTokens];
  for (auto& row : sum)
    for (Floats& f : row) f = zero_floats();
  for (int64_t r = 0; r < rounds; r += kSteps) {
    asm volatile("" ::"r"(codes), "r"(x) : "memory");  // the values are not known to the compiler
    plain_steps<kKind, kPlainTiles, kPlainTokens>(places, kSteps, x, kPlainTokens, sum);
  }
  Floats all = zero_floats();
  for (auto& row : sum)
    for (Floats& f : row) all = add(all, f);
  alignas(64) float v[16];
  store_floats(v, all);
  return *std::min_element(v, v + 16) < 0.0F ? 0 : rounds * kPlainTiles * kPlainTokens * 32;
}

}  // namespace

#endif
