// Products with many tokens by the tile registers of AMX: sixteen tokens by sixteen rows by up to sixteen steps an
// instruction, about twenty times the rate of dot products of vectors. The unpacked codes of product_tiles.cpp are in the
// order that AMX reads its second factor in: rows of 64 bytes, four columns of sixteen outputs. All else, few tokens
// included, is that of the vbmi kernels, and results are the same to the bit.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "product_amx.h"
#include "product_kernels.h"
#include "product_lanes.h"
#include "product_layout.h"
#include "product_offsets.h"

namespace {

constexpr int kTiles = 4;        // unpacked at once: activations are then read from far away only once in 64 rows
constexpr int64_t kTokens = 16;  // of a tile register
constexpr int64_t kFewest = 8;   // below, the padding to sixteen tokens costs more than it gains

// Steps that one instruction takes: the largest divisor of a segment's that fits.
int64_t block_steps(int64_t steps) {
  int64_t block = 16;
  while (steps % block != 0) --block;
  return block;
}

int planes_of(const fw_operand* operand) { return operand->tied ? 1 : operand->planes; }

struct Work {
  uint8_t* codes;   // [tile][plane][segments * steps][64]
  float* scales;    // [tile][segment's group][plane][16]
  int8_t* x;        // activations [tokens / 16][blocks of steps][16][4 block]: a tile register is one run of memory
  int32_t* sums;    // twice four registers: [tokens' half][tile][16][16]
  float* totals;    // likewise
  float* x_scales;  // [segment][32 tokens]
  int32_t* x_sums;
};

int64_t code_bytes(const fw_operand* o) { return o->segments * o->steps * kStepBytes; }
int64_t scale_count(const fw_operand* o) { return o->groups * planes_of(o) * kTileRows; }

int64_t work_bytes(const fw_operand* operand, int64_t tokens) {
  const int64_t others = product_kernels_vbmi()->work_bytes(operand, tokens);
  if (operand->layout == FW_PLAIN || operand->layout == FW_TABLES) return others;
  const int64_t own = kTiles * (planes_of(operand) * code_bytes(operand) + scale_count(operand) * 4) +
                      round_up(tokens, 2 * kTokens) * padded_columns(operand) + 12 * 1024 + 2 * 32 * 4 * operand->segments + 1024;
  return std::max(others, own);
}

Work divide(const fw_operand* operand, int64_t tokens, void* memory) {
  uint8_t* at = static_cast<uint8_t*>(memory);
  const auto take = [&at](int64_t bytes) {
    uint8_t* place = at;
    at += round_up(bytes, 64);
    return place;
  };
  Work w;
  w.codes = take(kTiles * planes_of(operand) * code_bytes(operand));
  w.scales = reinterpret_cast<float*>(take(kTiles * scale_count(operand) * 4));
  w.x = reinterpret_cast<int8_t*>(take(round_up(tokens, 2 * kTokens) * padded_columns(operand)));
  w.sums = reinterpret_cast<int32_t*>(take(8 * 1024));
  w.totals = reinterpret_cast<float*>(take(4 * 1024));
  w.x_scales = reinterpret_cast<float*>(take(32 * 4 * operand->segments));
  w.x_sums = reinterpret_cast<int32_t*>(take(32 * 4 * operand->segments));
  return w;
}

Floats one_scale(const fw_operand* operand, int64_t tile, int64_t index) {
  const uint8_t* scales = tile_scales(operand, tile);
  switch (operand->scale_dtype) {
    case FW_LOG8: return log8(scales + 16 * index, kLog8Fractions, operand->scale_exponent);
    case FW_FLOAT16: return load_halves(reinterpret_cast<const uint16_t*>(scales) + 16 * index);
    case FW_BFLOAT16: return load_bfloats(reinterpret_cast<const uint16_t*>(scales) + 16 * index);
    default: return load_floats(reinterpret_cast<const float*>(scales) + 16 * index);
  }
}

struct Block {  // 32 tokens by 32 rows
  const int8_t* x[2];  // as packed
  const uint8_t* codes[2];
  const float* scales[2];
  const uint8_t* zeros[2];
  int tokens, tiles;      // of the two
};

// What is common to all groups is taken off the codes once, which then are signed and need no correction of their sums; zero
// points and offsets of groups leave them unsigned.
#define FW_TILE_PRODUCT(to, x, codes) \
  if constexpr (Signed)               \
    _tile_dpbssd(to, x, codes);       \
  else                                \
    _tile_dpbsud(to, x, codes)

// The integer products of one segment and plane, left in `sums`.
template <bool Signed>
FW_INLINE void multiply(const Block& b, int64_t first, int64_t steps, int64_t block, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const size_t stride = static_cast<size_t>(4 * block);
  for (int64_t s = first; s < first + steps; s += block) {
    _tile_loadd(4, b.x[0] + 4 * kTokens * s, stride);
    _tile_loadd(6, b.codes[0] + kStepBytes * s, kStepBytes);
    FW_TILE_PRODUCT(0, 4, 6);
    if (b.tiles > 1) {
      _tile_loadd(7, b.codes[1] + kStepBytes * s, kStepBytes);
      FW_TILE_PRODUCT(1, 4, 7);
    }
    if (b.tokens > kTokens) {
      _tile_loadd(5, b.x[1] + 4 * kTokens * s, stride);
      FW_TILE_PRODUCT(2, 5, 6);
      if (b.tiles > 1) {
        FW_TILE_PRODUCT(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  if (b.tiles > 1) _tile_stored(1, sums + 256, 64);
  if (b.tokens > kTokens) _tile_stored(2, sums + 512, 64);
  if (b.tokens > kTokens && b.tiles > 1) _tile_stored(3, sums + 768, 64);
}

// totals (+)= (sums - zero x_sum) scale x_scale for one register's sixteen tokens and rows.
template <bool Zeros, bool First>
FW_INLINE void add_register(const int32_t* sums, Sums zero, Floats scale, const float* x_scales, const int32_t* x_sums,
                            float* totals) {
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
    Sums sum = {_mm512_load_si512(sums + 16 * m)};
    if constexpr (Zeros) sum = subtract(sum, times(zero, spread(x_sums[m])));
    const Floats product = times(to_floats(sum), times(scale, spread(x_scales[m])));
    // Beginning with 0 + product, as the other kernels do: the sign of a zero is the same.
    store_floats(totals + 16 * m, add(First ? zero_floats() : load_floats(totals + 16 * m), product));
  }
}

void add_sums(const Block& b, const Work& work, const int32_t* all, int64_t segment, int64_t scale_index, int64_t group, bool first) {
  for (int t = 0; t < b.tiles; ++t) {
    const Floats scale = load_floats(b.scales[t] + kTileRows * scale_index);
    const Sums zero = b.zeros[t] ? load_bytes(b.zeros[t] + kTileRows * group) : zero_sums();
    for (int half = 0; half * kTokens < b.tokens; ++half) {
      const int32_t* sums = all + (2 * half + t) * 256;
      float* totals = work.totals + (2 * half + t) * 256;
      const float* x_scales = work.x_scales + 32 * segment + 16 * half;
      const int32_t* x_sums = work.x_sums + 32 * segment + 16 * half;
      if (b.zeros[t]) {
        first ? add_register<true, true>(sums, zero, scale, x_scales, x_sums, totals)
              : add_register<true, false>(sums, zero, scale, x_scales, x_sums, totals);
      } else {
        first ? add_register<false, true>(sums, zero, scale, x_scales, x_sums, totals)
              : add_register<false, false>(sums, zero, scale, x_scales, x_sums, totals);
      }
    }
  }
}

// What offsets add to the totals of a block, whose tokens' sums of groups are at `group_sums`.
void add_offsets(const fw_operand* operand, const Block& b, int64_t tile, const float* group_sums, float* totals) {
  for (int t = 0; t < b.tiles; ++t)
    for (int first = 0; first < b.tokens; first += 8) {
      const int count = std::min(8, b.tokens - first);
      Floats part[8];
      offset_parts(operand, tile + t, group_sums + first * operand->groups, count, part);
      float* to = totals + (first / kTokens * 2 + t) * 256 + first % kTokens * 16;
      for (int m = 0; m < count; ++m) store_floats(to + 16 * m, add(load_floats(to + 16 * m), part[m]));
    }
}

void put_block(const fw_operand* operand, const Block& b, int64_t token, int64_t tile, const float* totals, const Output& out) {
  for (int m = 0; m < b.tokens; ++m)
    for (int t = 0; t < b.tiles; ++t) {
      const int64_t row = (tile + t) * kTileRows, count = std::min(kTileRows, operand->rows - row);
      float* to = out.values + (token + m) * out.stride + row;
      const float* from = totals + (m / kTokens * 2 + t) * 256 + m % kTokens * 16;
      if (count == kTileRows && !out.accumulate) {
        store_floats(to, load_floats(from));
        continue;
      }
      for (int64_t r = 0; r < count; ++r) to[r] = out.accumulate ? to[r] + from[r] : from[r];
    }
}

// Scales and sums of a block's tokens, those of a segment side by side.
void transpose_tokens(const IntegerInput& x, int64_t token, int tokens, const Work& work) {
  for (int m = 0; m < 32; ++m)
    for (int64_t g = 0; g < x.segments; ++g) {
      const int64_t at = (token + std::min(m, tokens - 1)) * x.segments + g;
      work.x_scales[32 * g + m] = x.scales[at];
      work.x_sums[32 * g + m] = x.sums[at];
    }
}

void pack_tokens(const IntegerInput& x, int64_t block, int8_t* to) {
  const size_t run = static_cast<size_t>(4 * block);
  for (int64_t first = 0; first < round_up(x.tokens, 2 * kTokens); first += kTokens)
    for (int64_t column = 0; column < x.columns; column += 4 * block)
      for (int64_t token = first; token < first + kTokens; ++token, to += run) {
        if (token < x.tokens)
          memcpy(to, x.codes + token * x.columns + column, run);
        else
          memset(to, 0, run);
      }
}

void take_off(int32_t offset, uint8_t* codes, int64_t bytes) {
  const __m512i same = _mm512_set1_epi8(static_cast<char>(offset));
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(codes + i, _mm512_sub_epi8(_mm512_loadu_si512(codes + i), same));
}

void many_tokens(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out, void* memory) {
  const Work work = divide(operand, x.tokens, memory);
  const int planes = planes_of(operand);
  const bool unsigned_codes = operand->has_zeros || operand->has_offsets;
  const int64_t steps = operand->steps, block = block_steps(steps), bytes = code_bytes(operand), scales = scale_count(operand);
  configure_tiles(kTokens, 4 * block, block);
  pack_tokens(x, block, work.x);
  for (int64_t tile = first; tile < last; tile += kTiles) {
    const int64_t tiles = std::min<int64_t>(kTiles, last - tile);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int p = 0; p < planes; ++p) {
        uint8_t* codes = work.codes + (t * planes + p) * bytes;
        product_kernels_vbmi()->unpack(operand, tile + t, p, codes);
        if (!unsigned_codes) take_off(operand->offset, codes, bytes);
      }
      for (int64_t i = 0; i < operand->groups * planes; ++i)
        store_floats(work.scales + t * scales + i * kTileRows, one_scale(operand, tile + t, i));
    }
    for (int64_t token = 0; token < x.tokens; token += 2 * kTokens) {
      Block b;
      b.tokens = static_cast<int>(std::min<int64_t>(2 * kTokens, x.tokens - token));
      b.x[0] = work.x + token * x.columns;
      b.x[1] = b.x[0] + kTokens * x.columns;
      transpose_tokens(x, token, b.tokens, work);
      for (int64_t pair = 0; pair < tiles; pair += 2) {
        b.tiles = static_cast<int>(std::min<int64_t>(2, tiles - pair));
        for (int t = 0; t < b.tiles; ++t) {
          b.scales[t] = work.scales + (pair + t) * scales;
          b.zeros[t] = operand->has_zeros ? tile_zeros(operand, tile + pair + t) : nullptr;
        }
        // Sums are turned into floats one product later: what a tile register just stored cannot be loaded without delay.
        const int64_t products = operand->segments * planes;
        for (int64_t i = 0; i <= products; ++i) {
          if (i < products) {
            for (int t = 0; t < b.tiles; ++t) b.codes[t] = work.codes + ((pair + t) * planes + i % planes) * bytes;
            int32_t* sums = work.sums + i % 2 * 1024;
            if (unsigned_codes)
              multiply<false>(b, i / planes * steps, steps, block, sums);
            else
              multiply<true>(b, i / planes * steps, steps, block, sums);
          }
          if (i == 0) continue;
          const int64_t last_segment = (i - 1) / planes, group = last_segment / operand->segments_per_group;
          add_sums(b, work, work.sums + (i - 1) % 2 * 1024, last_segment, group * planes + (i - 1) % planes, group, i == 1);
        }
        if (x.group_sums) add_offsets(operand, b, tile + pair, x.group_sums + token * operand->groups, work.totals);
        put_block(operand, b, token, tile + pair, work.totals, out);
      }
    }
  }
  _tile_release();
}

void integer_tiles(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  if (x.tokens < kFewest) return product_kernels_vbmi()->integer_tiles(operand, x, first, last, out, work);
  if (first < last) many_tokens(operand, x, first, last, out, work);
}

}  // namespace

const ProductKernels* product_kernels_amx() {
  static const ProductKernels kernels = [] {
    ProductKernels k = *product_kernels_vbmi();
    k.name = "amx";
    k.work_bytes = work_bytes;
    k.integer_tiles = integer_tiles;
    k.plain_input = amx_plain_input;
    k.plain_tiles = amx_plain_tiles;
    return k;
  }();
  return &kernels;
}

bool amx_allowed() {
#if defined(__linux__) && defined(__x86_64__)
  uint32_t a = 7, b = 0, c = 0, d = 0;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (!(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;  // for the whole process, threads to come included
#else
  return false;
#endif
}
