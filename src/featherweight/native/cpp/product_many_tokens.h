// Matrix-matrix products with integer activations: the codes of a few tiles are unpacked to bytes, which stay in the cache
// while all tokens go by.
#ifndef FEATHERWEIGHT_PRODUCT_MANY_TOKENS_H
#define FEATHERWEIGHT_PRODUCT_MANY_TOKENS_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "product_codes.h"
#include "product_kernels.h"
#include "product_offsets.h"
#include "product_plain.h"
#include "product_scales.h"

namespace {  // compiled for several instruction sets

#if defined(__AVX512F__)
constexpr int kGemmTiles = 2, kGemmTokens = 12;
#else
constexpr int kGemmTiles = 1, kGemmTokens = 4;
#endif

// All codes of a tile and plane as bytes, [segments * steps][64]; for tied trits the joint code. A short last segment is filled
// up with zeros.
template <int Bits>
void unpack_fields(const fw_operand* operand, int64_t tile, int plane, uint8_t* to) {
  constexpr int kUnit = unit_steps(Bits);
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const int64_t count = segment_steps(operand, segment);
    const uint8_t* from =
        tile_codes(operand, tile) + (segment * operand->planes * operand->steps + plane * count) * kStepBytes * Bits / 8;
    for (int64_t s = 0; s < count; s += kUnit, from += kUnit * kStepBytes * Bits / 8)
      each<kUnit>([&](auto i) FW_LAMBDA {
        store_codes(to, Fields<Bits>::template step<decltype(i)::value>(from));
        to += kStepBytes;
      });
    if (count < operand->steps) memset(to, 0, static_cast<size_t>((operand->steps - count) * kStepBytes));
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

// Four tokens' codes of some steps, a word of four codes each, from one token after the other to one step after the other.
FW_INLINE void interleave_four(const int8_t* const (&from)[4], int64_t steps, uint8_t* to, int64_t stride) {
  typedef int32_t Words __attribute__((vector_size(16)));
  int64_t s = 0;
  for (; s + 4 <= steps; s += 4, to += 4 * stride) {
    Words in[4], out[4];
    for (int i = 0; i < 4; ++i) memcpy(&in[i], from[i] + 4 * s, sizeof in[i]);
    for (int i = 0; i < 4; ++i) out[i] = Words{in[0][i], in[1][i], in[2][i], in[3][i]};
    for (int i = 0; i < 4; ++i) memcpy(to + i * stride, &out[i], sizeof out[i]);
  }
  for (; s < steps; ++s, to += stride)
    for (int i = 0; i < 4; ++i) memcpy(to + 4 * i, from[i] + 4 * s, 4);
}

// Some tokens side by side, so that what a step needs of them lies in one piece: [steps][Tokens][4] codes, then
// [segments][Tokens] scales and the values that sums start from: minus the sum of the activations' codes, times the offset of
// the weights' codes if all have the same. Tokens that are missing repeat the last one.
template <int Tokens>
struct TokenBlock {
  static_assert(Tokens % 4 == 0, "tokens are interleaved four by four");
  const int8_t* codes;
  const float* scales;
  const int32_t* starts;
  int count;

  static int64_t bytes(const fw_operand* operand) {
    return Tokens * operand->segments * (4 * operand->steps + 2 * static_cast<int64_t>(sizeof(int32_t)));
  }
  TokenBlock(const fw_operand* operand, const uint8_t* place, int64_t tokens) : count(static_cast<int>(tokens)) {
    const int64_t segments = Tokens * operand->segments;
    codes = reinterpret_cast<const int8_t*>(place);
    scales = reinterpret_cast<const float*>(place + 4 * segments * operand->steps);
    starts = reinterpret_cast<const int32_t*>(scales + segments);
  }
  static void fill(const fw_operand* operand, const IntegerInput& x, int64_t first, uint8_t* place) {
    const int64_t segments = operand->segments, steps = segments * operand->steps;
    const int32_t offset = operand->has_zeros ? 1 : operand->offset;
    uint8_t *scales = place + 4 * Tokens * steps, *starts = scales + 4 * Tokens * segments;
    for (int m = 0; m < Tokens; m += 4) {
      const int8_t* from[4];
      for (int i = 0; i < 4; ++i) from[i] = x.codes + std::min(first + m + i, x.tokens - 1) * x.columns;
      interleave_four(from, steps, place + 4 * m, 4 * Tokens);
    }
    for (int m = 0; m < Tokens; ++m) {
      const int64_t token = std::min(first + m, x.tokens - 1);
      for (int64_t s = 0; s < segments; ++s) {
        const int32_t start = -offset * x.sums[token * segments + s];
        memcpy(scales + 4 * (s * Tokens + m), x.scales + token * segments + s, 4);
        memcpy(starts + 4 * (s * Tokens + m), &start, 4);
      }
    }
  }
};

// What a tile becomes once for all tokens: codes as bytes and scales as floats, [group][plane][16].
struct UnpackedTile {
  int64_t tile;
  const uint8_t* codes[3];  // of each plane
  const float* scales;
  const uint8_t* zeros;

  static int64_t bytes(const fw_operand* operand) {
    return unpacked_planes(operand) * (unpacked_bytes(operand) + operand->groups * kTileRows * 4);
  }
  UnpackedTile(const fw_operand* operand, int64_t which, uint8_t* place)
      : tile(which), codes(), zeros(operand->has_zeros ? tile_zeros(operand, which) : nullptr) {
    const int planes = unpacked_planes(operand);
    for (int plane = 0; plane < planes; ++plane, place += unpacked_bytes(operand)) {
      unpack_tile(operand, tile, plane, place);
      codes[plane] = place;
    }
    float* to = reinterpret_cast<float*>(place);
    scales = to;
    for (int64_t i = 0; i < operand->groups * planes; ++i)
      store_floats(to + kTileRows * i, load_scales(operand, tile_scales(operand, tile), i));
  }
  UnpackedTile as(int64_t other) const {  // the same under another number
    UnpackedTile found = *this;
    found.tile = other;
    return found;
  }
};

#if defined(FW_HAS_PAIRS)
// Sums of pairs over steps [first, last), with x those of the first.
template <int Tiles, int Tokens>
FW_INLINE void gemm_pairs(const uint8_t* const (&codes)[Tiles], const int8_t* x, int64_t first, int64_t last,
                          Pairs (&pairs)[Tiles][Tokens]) {
  each<Tiles>([&](auto t) FW_LAMBDA { each<Tokens>([&](auto m) FW_LAMBDA { pairs[t][m] = zero_pairs(); }); });
#pragma GCC unroll 8
  for (int64_t s = first; s < last; ++s, x += 4 * Tokens)
    each<Tiles>([&](auto t) FW_LAMBDA {
      const Codes now = load_codes(codes[t] + kStepBytes * s);
      each<Tokens>([&](auto m) FW_LAMBDA { pairs[t][m] = dot_pairs(pairs[t][m], now, x + 4 * m); });
    });
}
#endif

// sum[tile][token] over `steps` steps; of kNarrow codes, for which sums of pairs hold `chunk` steps, they begin with
// start(tile, token). Indices are known where the code is written (`each`): else GCC keeps sums in memory.
template <int Tiles, int Tokens, Range Of, typename Start>
FW_INLINE void gemm_steps(const uint8_t* const (&codes)[Tiles], const int8_t* x, int64_t steps, [[maybe_unused]] int64_t chunk,
                          [[maybe_unused]] const Start& start, Sums (&sum)[Tiles][Tokens]) {
#if defined(FW_HAS_PAIRS)
  if constexpr (Of == Range::kNarrow) {
    // Sums begin behind the first pairs: there is no room in registers for both.
    Pairs pairs[Tiles][Tokens];
    gemm_pairs<Tiles, Tokens>(codes, x, 0, std::min(steps, chunk), pairs);
    each<Tokens>([&](auto m) FW_LAMBDA { each<Tiles>([&](auto t) FW_LAMBDA { sum[t][m] = add(start(t, m), pairs[t][m]); }); });
    for (int64_t s = chunk; s < steps; s += chunk) {
      gemm_pairs<Tiles, Tokens>(codes, x + 4 * Tokens * s, s, std::min(steps, s + chunk), pairs);
      each<Tiles>([&](auto t) FW_LAMBDA { each<Tokens>([&](auto m) FW_LAMBDA { sum[t][m] = add(sum[t][m], pairs[t][m]); }); });
    }
    return;
  }
#endif
  for (int64_t s = 0; s < steps; ++s, x += 4 * Tokens) {
    Codes now[Tiles];
    each<Tiles>([&](auto t) FW_LAMBDA { now[t] = load_codes(codes[t] + kStepBytes * s); });
    each<Tokens>([&](auto m) FW_LAMBDA {
      each<Tiles>([&](auto t) FW_LAMBDA { sum[t][m] = dot<Of == Range::kWide>(sum[t][m], now[t], x + 4 * m); });
    });
  }
}

// One segment of one plane: the sums, and their addition to `totals`. Sums start from what their zero points take off, and
// what is a token's is spread once for all tiles: where segments are short, much of the time goes here.
template <int Tiles, int Tokens, Range Of, bool Zeros>
FW_INLINE void gemm_segment(const fw_operand* operand, const TokenBlock<Tokens>& block, int64_t segment, int plane, int planes,
                            int64_t chunk, const UnpackedTile* tiles, float (&totals)[Tokens][Tiles][kTileRows]) {
  const int64_t steps = operand->steps, group = segment / operand->segments_per_group, at = segment * Tokens;
  const int32_t* starts = block.starts + at;
  const float* x_scales = block.scales + at;
  const uint8_t* from[Tiles];
  Floats scale[Tiles];
  Sums zeros[Tiles], sum[Tiles][Tokens];
  each<Tiles>([&](auto t) FW_LAMBDA {
    from[t] = tiles[t].codes[plane] + kStepBytes * segment * steps;
    scale[t] = load_floats(tiles[t].scales + kTileRows * (group * planes + plane));
    zeros[t] = Zeros ? load_bytes(tiles[t].zeros + kTileRows * group) : zero_sums();
  });
  if constexpr (Of != Range::kNarrow)
    each<Tokens>([&](auto m) FW_LAMBDA {
      const Sums one = spread(starts[m]);
      each<Tiles>([&](auto t) FW_LAMBDA { sum[t][m] = Zeros ? times(zeros[t], one) : one; });
    });
  const auto start = [&](auto t, auto m) FW_LAMBDA { return Zeros ? times(zeros[t], spread(starts[m])) : spread(starts[m]); };
  // The zeros that fill up a short last segment cost vectors of 512 bits less than asking for it: in short segments 3 to 7 %.
  const int64_t count = kPairs ? segment_steps(operand, segment) : steps;
  gemm_steps<Tiles, Tokens, Of>(from, block.codes + 4 * at * steps, count, chunk, start, sum);
  each<Tokens>([&](auto m) FW_LAMBDA {
    const Floats x_scale = spread(x_scales[m]);
    each<Tiles>([&](auto t) FW_LAMBDA {
      const Floats part = times(to_floats(sum[t][m]), times(scale[t], x_scale));
      store_floats(totals[m][t], add(load_floats(totals[m][t]), part));
    });
  });
}

// Not inlined: GCC 12 then keeps fewer of the sums' surroundings in registers, and is a twentieth slower.
template <int Tiles, int Tokens, Range Of>
__attribute__((noinline)) void gemm_block(const fw_operand* operand, const TokenBlock<Tokens>& block, int64_t first_token,
                                          const UnpackedTile* tiles, const Output& out) {
  const int planes = unpacked_planes(operand);
  const int64_t chunk = Of == Range::kNarrow ? narrow_steps(operand) : 0;
  // Results go to as many pages as there are tokens: asked for now, their lines have come when the sums are done.
  for (int m = 0; m < block.count; ++m)
    for (int t = 0; t < Tiles; ++t) prefetch(out.values + (first_token + m) * out.stride + kTileRows * tiles[t].tile);
  alignas(64) float totals[Tokens][Tiles][kTileRows] = {};
  for (int64_t segment = 0; segment < operand->segments; ++segment)
    for (int plane = 0; plane < planes; ++plane) {
      if (operand->has_zeros)
        gemm_segment<Tiles, Tokens, Of, true>(operand, block, segment, plane, planes, chunk, tiles, totals);
      else
        gemm_segment<Tiles, Tokens, Of, false>(operand, block, segment, plane, planes, chunk, tiles, totals);
    }
  for (int m = 0; m < block.count; ++m)
    for (int t = 0; t < Tiles; ++t) put(out, operand->rows, tiles[t].tile, first_token + m, load_floats(totals[m][t]));
}

// The same with what offsets add, for tokens whose sums of groups are at `group_sums`: the products first go aside, to `aside`
// tiles 0, 1, ... of a block's own, so that gemm_block has nothing to do with offsets, which took 2 to 5 % of its speed.
template <int Tiles, int Tokens, Range Of>
__attribute__((noinline)) void gemm_block_with_offsets(const fw_operand* operand, const TokenBlock<Tokens>& block,
                                                       const float* group_sums, int64_t first_token, const UnpackedTile* tiles,
                                                       const UnpackedTile* aside, const Output& out) {
  alignas(64) float products[Tokens][Tiles][kTileRows] = {};
  gemm_block<Tiles, Tokens, Of>(operand, block, 0, aside, {products[0][0], Tiles * kTileRows, 0});
  for (int t = 0; t < Tiles; ++t) {
    Floats part[Tokens];
    offset_parts(operand, tiles[t].tile, group_sums + first_token * operand->groups, block.count, part);
    for (int m = 0; m < block.count; ++m)
      put(out, operand->rows, tiles[t].tile, first_token + m, add(load_floats(products[m][t]), part[m]));
  }
}

template <int Tiles, int Tokens, Range Of>
void gemm(const fw_operand* operand, const TokenBlock<Tokens>& block, const float* group_sums, int64_t first_token,
          const UnpackedTile* tiles, const UnpackedTile* aside, const Output& out) {
  if (group_sums)
    gemm_block_with_offsets<Tiles, Tokens, Of>(operand, block, group_sums, first_token, tiles, aside, out);
  else
    gemm_block<Tiles, Tokens, Of>(operand, block, first_token, tiles, out);
}

constexpr int kGemmTail = 4;  // so many tokens or fewer at the end are a block of their own size

// Bytes of all tokens in blocks.
int64_t blocks_bytes(const fw_operand* operand, int64_t tokens) {
  return (tokens / kGemmTokens + 1) * TokenBlock<kGemmTokens>::bytes(operand) + TokenBlock<kGemmTail>::bytes(operand);
}

int64_t work_bytes(const fw_operand* operand, int64_t tokens) {
  if (operand->layout == FW_PLAIN) return plain_work_bytes(tokens);
  if (operand->layout == FW_TABLES) return 64;
  return kGemmTiles * UnpackedTile::bytes(operand) + blocks_bytes(operand, tokens) + 4096;
}

template <int Tiles, Range Of, int... T>
void many_tokens(const fw_operand* operand, const IntegerInput& x, const uint8_t* blocks, int64_t first, int64_t last,
                 const Output& out, uint8_t* space, std::integer_sequence<int, T...>) {
  const int64_t tokens = x.tokens;
  for (int64_t tile = first; tile + Tiles <= last; tile += Tiles) {
    const UnpackedTile tiles[Tiles] = {UnpackedTile(operand, tile + T, space + T * UnpackedTile::bytes(operand))...};
    const UnpackedTile aside[Tiles] = {tiles[T].as(T)...};
    const uint8_t* block = blocks;
    int64_t token = 0;
    for (; tokens - token > kGemmTail; token += kGemmTokens, block += TokenBlock<kGemmTokens>::bytes(operand)) {
      const TokenBlock<kGemmTokens> some(operand, block, std::min<int64_t>(kGemmTokens, tokens - token));
      gemm<Tiles, kGemmTokens, Of>(operand, some, x.group_sums, token, tiles, aside, out);
    }
    if (token < tokens) {
      const TokenBlock<kGemmTail> some(operand, block, tokens - token);
      gemm<Tiles, kGemmTail, Of>(operand, some, x.group_sums, token, tiles, aside, out);
    }
  }
}

template <Range Of>
void many_tokens_of(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out,
                    void* work) {
  uint8_t* space = static_cast<uint8_t*>(work);
  uint8_t* blocks = space + kGemmTiles * UnpackedTile::bytes(operand);
  uint8_t* block = blocks;
  int64_t token = 0;
  for (; x.tokens - token > kGemmTail; token += kGemmTokens, block += TokenBlock<kGemmTokens>::bytes(operand))
    TokenBlock<kGemmTokens>::fill(operand, x, token, block);
  if (token < x.tokens) TokenBlock<kGemmTail>::fill(operand, x, token, block);
  many_tokens<kGemmTiles, Of>(operand, x, blocks, first, last, out, space, std::make_integer_sequence<int, kGemmTiles>());
  const int64_t left = (last - first) % kGemmTiles;
  if (left)
    many_tokens<1, Of>(operand, x, blocks, last - left, last, out, space, std::integer_sequence<int, 0>());
}

}  // namespace

#endif
