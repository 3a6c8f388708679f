// The starts of the PTQTP loop, as normal equations of the trits after (or, for the greedy one, before) iteration 1.
#ifndef FEATHERWEIGHT_TRIT_START_H
#define FEATHERWEIGHT_TRIT_START_H

#include "trit_lanes.h"

namespace {

// The closed form of iteration 1 in lexicographic order, for the batch whose signed weights are in tile.lanes. With
// x_i = [w > T_i] for the 2K thresholds in descending order, t_k = x_2k + x_2k+1 - 1; sums of products of the x_i are counts.
template <int K>
void lexicographic_start(const SortedTile& tile, int64_t batch, GroupState<K>* states, int count) {
  alignas(64) double threshold[2 * K][kLanes], counts[2 * K][kLanes], sums[2 * K + 1][kLanes];
  const double n = static_cast<double>(tile.shape.n);
  const double* total = tile.prefix_batch(batch) + tile.shape.n * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const double a = total[lane] / (K * n);
    for (int k = 0; k < K; ++k) {
      const double centre = (K - 1 - 2 * k) * a;
      threshold[2 * k][lane] = centre + a / 2;
      threshold[2 * k + 1][lane] = centre - a / 2;
    }
  }
  for (int c = 0; c < kLanes; c += kHalf) {
    Double above[2 * K] = {}, all = {}, limit[2 * K];
    Long number[2 * K] = {};
    for (int i = 0; i < 2 * K; ++i) limit[i] = load<Double>(threshold[i] + c);
    for (int64_t row = 0; row < tile.shape.n; ++row) {
      const Double w = widen(load<FloatHalf>(tile.lanes + row * kLanes + c));
      all += w;
      for (int i = 0; i < 2 * K; ++i) {
        const Long more = (Long)(w > limit[i]);
        above[i] += (Double)((Long)w & more);
        number[i] -= more;
      }
    }
    for (int i = 0; i < 2 * K; ++i) {
      store(counts[i] + c, __builtin_convertvector(number[i], Double));
      store(sums[i] + c, above[i]);
    }
    store(sums[2 * K] + c, all);
  }
  for (int lane = 0; lane < count; ++lane) {
    GroupState<K>& state = states[lane];
    state.scale = total[lane] / (K * n);
    for (int k = 0, entry = 0; k < K; ++k) {
      state.normal.right[k] = sums[2 * k][lane] + sums[2 * k + 1][lane] - sums[2 * K][lane];
      const double own = counts[2 * k][lane] + counts[2 * k + 1][lane];
      state.normal.gram[entry++] = counts[2 * k][lane] + n - counts[2 * k + 1][lane];
      for (int other = k + 1; other < K; ++other)
        state.normal.gram[entry++] = own - counts[2 * other][lane] - counts[2 * other + 1][lane] + n;
    }
  }
}

// The same in paired order: plane k takes the magnitudes above (K - 1 - k + 1/2) a.
template <int K>
void paired_start(const SortedTile& tile, int64_t batch, GroupState<K>* states, int count) {
  const int64_t n = tile.shape.n;
  for (int lane = 0; lane < count; ++lane) {
    const double* prefix = tile.prefix_batch(batch) + lane;
    const int32_t* sorted = tile.sorted_batch(batch) + lane;
    GroupState<K>& state = states[lane];
    state.scale = prefix[n * kLanes] / static_cast<double>(K * n);
    double counts[K];
    for (int k = 0; k < K; ++k) {
      const double edge = (K - 1 - k + 0.5) * state.scale;
      int64_t low = 0, high = n;  // magnitudes before `low` are at most the edge, those from `high` on above
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        float value;
        memcpy(&value, sorted + middle * kLanes, sizeof value);
        if (static_cast<double>(value) <= edge)
          low = middle + 1;
        else
          high = middle;
      }
      counts[k] = static_cast<double>(n - low);
      state.normal.right[k] = prefix[n * kLanes] - prefix[low * kLanes];
    }
    for (int k = 0, entry = 0; k < K; ++k)  // the planes are nested: a product of two is the smaller one
      for (int other = k; other < K; ++other) state.normal.gram[entry++] = counts[k];
  }
}

}  // namespace

#endif
