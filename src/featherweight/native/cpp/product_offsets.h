// Offsets of groups: what they add to a product, beside what the codes and scales do. W = scale code + offset, so a group adds
// its offset times the sum of its activations (sum_groups), once for all its columns.
#ifndef FEATHERWEIGHT_PRODUCT_OFFSETS_H
#define FEATHERWEIGHT_PRODUCT_OFFSETS_H

#include <stdint.h>

#include <algorithm>

#include "product_kernels.h"
#include "product_lanes.h"
#include "product_layout.h"
#include "product_scales.h"

namespace {  // compiled for several instruction sets

// The part of a tile's offsets in the products of `count` tokens, whose sums [count, groups] are at `sums`: groups in their
// order. Tokens that are missing repeat the last one.
template <int Tokens>
FW_INLINE void offset_parts(const fw_operand* operand, int64_t tile, const float* sums, int count, Floats (&part)[Tokens]) {
  const uint8_t* offsets = tile_zeros(operand, tile);
  const float* of[Tokens];
  for (int m = 0; m < Tokens; ++m) {
    of[m] = sums + std::min(m, count - 1) * operand->groups;
    part[m] = zero_floats();
  }
  for (int64_t group = 0; group < operand->groups; ++group) {
    const Floats offset = load_scales(operand, offsets, group);
    for (int m = 0; m < Tokens; ++m) part[m] = add(part[m], times(offset, spread(of[m][group])));
  }
}

// The same for one token and several tiles, added to `total`: their sums do not wait for each other.
template <int Tiles>
FW_INLINE void add_offsets(const fw_operand* operand, const int64_t (&tiles)[Tiles], const float* sums, Floats (&total)[Tiles]) {
  Floats part[Tiles], offset[Tiles];
  const uint8_t* offsets[Tiles];
  for (int t = 0; t < Tiles; ++t) {
    part[t] = zero_floats();
    offsets[t] = tile_zeros(operand, tiles[t]);
  }
  for (int64_t group = 0; group < operand->groups; ++group) {
    for (int t = 0; t < Tiles; ++t) offset[t] = load_scales(operand, offsets[t], group);
    for (int t = 0; t < Tiles; ++t) part[t] = add(part[t], times(offset[t], spread(sums[group])));
  }
  for (int t = 0; t < Tiles; ++t) total[t] = add(total[t], part[t]);
}

}  // namespace

#endif
