// Scales, zero points and results of a tile.
#ifndef FEATHERWEIGHT_PRODUCT_SCALES_H
#define FEATHERWEIGHT_PRODUCT_SCALES_H

#include <stdint.h>

#include <algorithm>

#include "product_kernels.h"
#include "product_lanes.h"
#include "product_layout.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "product_log8_avx2.h"
#define FW_HAS_LOG8_TWO 1
#endif

namespace {  // compiled for several instruction sets

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

// Those of several tiles.
template <int Tiles>
FW_INLINE void load_scales(const fw_operand* operand, const int64_t (&tiles)[Tiles], int64_t index, Floats (&scale)[Tiles]) {
#if defined(FW_HAS_LOG8_TWO)
  if constexpr (Tiles == 2)
    if (operand->scale_dtype == FW_LOG8)
      return log8_two(tile_scales(operand, tiles[0]) + 16 * index, tile_scales(operand, tiles[1]) + 16 * index,
                      operand->scale_exponent, scale);
#endif
  for (int t = 0; t < Tiles; ++t) scale[t] = load_scales(operand, tile_scales(operand, tiles[t]), index);
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

}  // namespace

#endif
