// The sweep for one scale a group, on sorted groups: of 65 roundings to integers the one with the least squared error.
#ifndef FEATHERWEIGHT_TIED_LANES_H
#define FEATHERWEIGHT_TIED_LANES_H

#include "sorted_tile.h"
#include "trit_levels.h"

namespace {

constexpr int kSweep = 65;

struct TiedResult {
  double scale;     // least squares scale to return
  double rounding;  // scale the codes were rounded with
};

// With T_c = (c - 1/2) s, codes are the number of T_c not above |w|; sum of code |w| is the sum over c of what lies above T_c,
// and sum of code^2 that of (2c - 1) times its count.
template <int Levels>
void sweep(const SortedTile& tile, int64_t batch, TiedResult* results, int count) {
  const int64_t n = tile.shape.n;
  const int32_t stride = static_cast<int32_t>(tile.shape.stride);
  const int32_t* sorted = tile.sorted_batch(batch);
  const double* prefix = tile.prefix_batch(batch);
  alignas(64) double best[kLanes], scale[kLanes], rounding[kLanes], largest[kLanes];
  alignas(64) double product[kLanes], norm[kLanes], trial[kLanes];
  alignas(64) int32_t lane_index[kLanes], threshold[kLanes], position[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    best[lane] = -1;
    scale[lane] = rounding[lane] = 0;
    lane_index[lane] = lane;
    largest[lane] = static_cast<double>(load<float>(sorted + (n - 1) * kLanes + lane));
  }
  for (int step = 0; step < kSweep; ++step) {
    const double divisor = (3.25 + step / 32.0) * Levels / 4;
    for (int lane = 0; lane < kLanes; ++lane) {
      product[lane] = norm[lane] = 0;
      trial[lane] = largest[lane] / divisor;
    }
    for (int level = 1; level <= Levels; ++level) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double limit = (level - 0.5) * trial[lane];
        const float nearest = static_cast<float>(limit);
        threshold[lane] = bits_of(nearest) + (static_cast<double>(nearest) < limit);
      }
      for (int c = 0; c < kLanes; c += kWidth) {
        const Int limit = load<Int>(threshold + c), at = load<Int>(lane_index + c);
        Int block = {};
        for (int p = 1; p <= kPivots; ++p) block -= load<Int>(sorted + (p * stride - 1) * kLanes + c) < limit;
        Int place = block * stride;
        for (int32_t jump = stride / 2; jump >= 1; jump /= 2) {
          const Int value = gather(sorted, at + (place + (jump - 1)) * kLanes);
          place += (value < limit) & jump;
        }
        store(position + c, place);
      }
      const double odd = 2 * level - 1;
      for (int c = 0; c < kLanes; c += kHalf) {
        const IntHalf place = load<IntHalf>(position + c);
        const Double below = gather(prefix, load<IntHalf>(lane_index + c) + place * kLanes);
        const Double above = load<Double>(prefix + n * kLanes + c) - below;
        store(product + c, load<Double>(product + c) + above);
        const Double number = static_cast<double>(n) - widen(place);
        store(norm + c, load<Double>(norm + c) + odd * number);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const double gain = product[lane] * product[lane] / norm[lane];
      const bool better = gain > best[lane];
      best[lane] = better ? gain : best[lane];
      scale[lane] = better ? product[lane] / norm[lane] : scale[lane];
      rounding[lane] = better ? trial[lane] : rounding[lane];
    }
  }
  for (int lane = 0; lane < count; ++lane) {
    const bool zero = largest[lane] == 0;
    results[lane] = {zero ? 0 : scale[lane], zero ? 0 : rounding[lane]};
  }
}

}  // namespace

#endif
