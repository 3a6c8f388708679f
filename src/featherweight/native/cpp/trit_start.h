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

// The best ternary plane so far of a sequence of magnitudes in descending order: of the first m with sum S_m, the m with the
// largest S_m^2 / m. Equal magnitudes stay together.
struct BestPlane {
  double sum = 0, gain = -2, best_sum = 0;
  int64_t count = 0, best = 0;

  void add(double magnitude) {
    sum += magnitude;
    ++count;
  }
  // After a magnitude that the next one differs from. True if these are the best so far.
  bool end() {
    const double now = sum * sum / static_cast<double>(count);
    if (!(now > gain)) return false;
    gain = now;
    best = count;
    best_sum = sum;
    return true;
  }
};

// The greedy residual start for one or two planes. What plane 1 leaves of sorted magnitudes are three sorted runs: those it
// left alone, and those it took that are larger and smaller than its scale; plane 2 takes the top of their merge.
template <int K>
void greedy_start_sorted(const SortedTile& tile, int64_t batch, int lane, Normal<K>& normal) {
  static_assert(K <= 2, "a third plane has more runs to merge");
  const int64_t n = tile.shape.n;
  const int32_t* sorted = tile.sorted_batch(batch) + lane;
  const double* prefix = tile.prefix_batch(batch) + lane;
  const auto magnitude = [&](int64_t i) { return static_cast<double>(load<float>(sorted + i * kLanes)); };
  const auto sum_of = [&](int64_t begin, int64_t end) { return prefix[end * kLanes] - prefix[begin * kLanes]; };

  BestPlane first;
  for (int64_t i = n - 1; i >= 0; --i) {
    first.sum = sum_of(i, n);
    ++first.count;
    if (i == 0 || sorted[i * kLanes] != sorted[(i - 1) * kLanes]) first.end();
  }
  const int64_t kept = n - first.best;  // rows from here on are taken
  const double scale = first.best_sum / static_cast<double>(first.best);
  normal.gram[0] = static_cast<double>(first.best);
  normal.right[0] = sum_of(kept, n);
  if constexpr (K == 2) {
    int64_t alone = kept - 1, large = n - 1, small = kept;  // the next of each run
    int64_t taken_alone = 0, taken_large = 0, taken_small = 0;
    BestPlane second;
    double previous = -1;
    while (second.count < n) {
      const double a = alone >= 0 ? magnitude(alone) : -1;
      const double b = large >= kept && magnitude(large) >= scale ? magnitude(large) - scale : -1;
      const double c = small < n && magnitude(small) < scale ? scale - magnitude(small) : -1;
      const double next = a >= b ? (a >= c ? a : c) : (b >= c ? b : c);
      if (second.count > 0 && next != previous && second.end()) {
        taken_alone = kept - 1 - alone;
        taken_large = n - 1 - large;
        taken_small = small - kept;
      }
      if (next == a)
        --alone;
      else if (next == b)
        --large;
      else
        ++small;
      second.add(next);
      previous = next;
    }
    if (second.end()) {
      taken_alone = kept;
      taken_large = n - 1 - large;
      taken_small = small - kept;
    }
    while (taken_alone > 0 && sorted[(kept - taken_alone) * kLanes] == 0) --taken_alone;  // zeros have no sign
    while (taken_large > 0 && magnitude(n - taken_large) == scale) --taken_large;
    normal.gram[1] = static_cast<double>(taken_large - taken_small);
    normal.gram[2] = static_cast<double>(taken_alone + taken_large + taken_small);
    normal.right[1] = sum_of(kept - taken_alone, kept) + sum_of(n - taken_large, n) - sum_of(kept, kept + taken_small);
  }
}

}  // namespace

#endif
