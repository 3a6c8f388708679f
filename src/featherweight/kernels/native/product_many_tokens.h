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
#include "product_plain.h"
#include "product_scales.h"

namespace {  // compiled for several instruction sets

#if defined(__AVX512F__)
constexpr int kGemmTiles = 2, kGemmTokens = 12;
#else
constexpr int kGemmTiles = 1, kGemmTokens = 4;
#endif

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
  if (operand->layout == FW_PLAIN) return plain_work_bytes(tokens);
  if (operand->layout == FW_TABLES) return 64;
  return kGemmTiles * 3 * unpacked_bytes(operand) + 4096;
}

// Whether unpacked codes may be above 127: bytes, and joint codes of tied trits with large weights, whose largest is twice
// the offset.
bool wide_codes(const fw_operand* operand) {
  return (operand->layout == FW_FIELDS && operand->bits == 8) || (operand->tied && operand->offset > 63);
}

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

}  // namespace

#endif
