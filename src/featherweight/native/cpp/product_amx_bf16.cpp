// Products with matrices of bfloat16 by the tile registers of AMX, where inputs may be rounded: sixteen tokens by sixteen rows
// by 32 columns an instruction. A tile of PLAIN is in the order that AMX reads its second factor in. A result is one chain of
// such instructions, of however many tokens: a single one, too, is done by tile registers, of one row.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "product_amx.h"
#include "product_lanes.h"
#include "product_layout.h"
#include "product_scales.h"

namespace {

constexpr int64_t kTokens = 16;    // of a tile register
constexpr int64_t kColumns = 32;   // of one instruction
constexpr int64_t kWords = kColumns / 2;
constexpr int64_t kBlock = 1024;   // bytes of the weights of one instruction
constexpr int64_t kTiles = 4;      // whose weights stay in the second cache for all tokens
constexpr int64_t kFetched = 8192;  // bytes that weights are fetched ahead for few tokens, which find them in memory

struct Block {  // up to 32 tokens by 32 rows
  const uint32_t* x[2];
  const uint8_t* codes[2];
  int64_t group;  // tokens of a register
  int tokens, tiles;  // registers of tokens and of rows, one or two
};

void multiply(const Block& b, int64_t blocks, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < blocks; ++i) {
    if (b.group < kTokens)
      for (int t = 0; t < b.tiles; ++t)
        for (int64_t line = 0; line < kBlock; line += 64) prefetch(b.codes[t] + i * kBlock + kFetched + line);
    _tile_loadd(4, b.x[0] + i * kWords * b.group, 64);
    _tile_loadd(6, b.codes[0] + i * kBlock, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (b.tiles > 1) {
      _tile_loadd(7, b.codes[1] + i * kBlock, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (b.tokens > 1) {
      _tile_loadd(5, b.x[1] + i * kWords * b.group, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (b.tiles > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (b.tiles > 1) _tile_stored(1, sums + 256, 64);
  if (b.tokens > 1) _tile_stored(2, sums + 512, 64);
  if (b.tokens > 1 && b.tiles > 1) _tile_stored(3, sums + 768, 64);
}

// Tokens [token, token + group * registers) with tiles [first, last).
void multiply_tokens(const fw_operand* operand, const PlainInput& x, int64_t token, int64_t group, int registers, int64_t first,
                     int64_t last, const Output& out) {
  alignas(64) float sums[1024];
  const int64_t words = padded_columns(operand) / 2;
  Block b = {};
  b.group = group;
  b.tokens = registers;
  for (int r = 0; r < registers; ++r) b.x[r] = static_cast<const uint32_t*>(x.values) + words * (token + r * group);
  for (int64_t tile = first; tile < last; tile += 2) {
    b.tiles = static_cast<int>(std::min<int64_t>(2, last - tile));
    for (int t = 0; t < b.tiles; ++t) b.codes[t] = tile_codes(operand, tile + t);
    multiply(b, words / kWords, sums);
    for (int r = 0; r < registers; ++r)
      for (int t = 0; t < b.tiles; ++t)
        for (int64_t m = 0; m < group; ++m)
          put(out, operand->rows, tile + t, token + r * group + m, load_floats(sums + 512 * r + 256 * t + 16 * m));
  }
}

}  // namespace

// Tokens in groups of up to sixteen: [blocks of 32 columns][tokens][pairs], a tile register being one run of memory.
void amx_plain_input(const PlainShape& shape, const float* x, int64_t token, int64_t tokens, void* to) {
  if (!shape.rounded) return product_kernels_vbmi()->plain_input(shape, x, token, tokens, to);
  const int64_t first = token / kTokens * kTokens, group = std::min(kTokens, tokens - first);
  uint32_t* place = static_cast<uint32_t*>(to) + shape.columns / 2 * first + (token - first) * kWords;
  for (int64_t c = 0; c < shape.columns; c += kColumns, place += group * kWords) {
    alignas(64) float part[kColumns] = {};
    if (c < shape.cols) memcpy(part, x + c, static_cast<size_t>(std::min(kColumns, shape.cols - c)) * sizeof(float));
    for (int64_t i = 0; i < kWords; ++i) place[i] = bfloat_bits(part[2 * i]) | bfloat_bits(part[2 * i + 1]) << 16;
  }
}

void amx_plain_tiles(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  if (!x.rounded) return product_kernels_vbmi()->plain_tiles(operand, x, first, last, out, work);
  const int64_t left = x.tokens % kTokens, whole = x.tokens - left;
  for (int64_t tile = first; tile < last; tile += kTiles) {
    const int64_t end = std::min(last, tile + kTiles);
    if (whole) configure_tiles(kTokens, 64, kWords);
    for (int64_t token = 0; token < whole; token += 2 * kTokens)
      multiply_tokens(operand, x, token, kTokens, whole - token > kTokens ? 2 : 1, tile, end, out);
    if (!left) continue;
    configure_tiles(left, 64, kWords);
    multiply_tokens(operand, x, whole, left, 1, tile, end, out);
  }
  if (first < last) _tile_release();
}
