// Compiled once for every instruction set, with FW_ISA naming it. Only C headers and code with internal linkage: an inline
// function of the standard library compiled here with AVX-512 could be the copy the linker keeps for everyone.
#include "kernels.h"

#include "packing.h"
#include "tied_lanes.h"
#include "trit_start.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(kernels_, isa)
#define FW_TEXT(name) #name
#define FW_QUOTE(name) FW_TEXT(name)

namespace {

constexpr int64_t kMostGroups = 256;

void to_double(const float* w, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(w[i]);
}

void solve_general(const TritTile& tile, const SortedTile& sorted, int64_t group) {
  to_double(tile.w[group], tile.n, sorted.group);
  *tile.steps[group] = static_cast<uint8_t>(solve_trit_group(sorted.group, tile.n, *tile.job, sorted.group_work,
                                                             tile.codes[group], tile.scales[group], tile.moving));
}

template <int K>
void begin(const SortedTile& sorted, int64_t batch, int order, GroupState<K>* states, int count) {
  if (order == 0)
    lexicographic_start<K>(sorted, batch, states, count);
  else
    paired_start<K>(sorted, batch, states, count);
}

template <int K>
void greedy_start(const TritTile& tile, const SortedTile& sorted, GroupState<K>* states) {
  for (int64_t group = 0; group < tile.groups; ++group) {
    GroupState<K>& state = states[group];
    state.scale = 0;
    if (state.general) continue;
    if constexpr (K <= 2) {
      greedy_start_sorted<K>(sorted, group / kLanes, static_cast<int>(group % kLanes), state.normal);
    } else {
      to_double(tile.w[group], tile.n, sorted.group);
      greedy_normal_equations(sorted.group, tile.n, K, sorted.group_work, state.normal.gram, state.normal.right);
    }
  }
}

template <int K>
void write_group(const TritTile& tile, const SortedTile& sorted, const GroupState<K>& state, int64_t group) {
  Levels<K> levels;
  if (state.general || !levels.order(state.level_scales)) return solve_general(tile, sorted, group);
  const Canonical<K> canonical(state.scales, tile.job->canonical != 0);
  Ladder<Levels<K>::kCount> ladder;
  ladder.set(levels, canonical);
  ladder.assign(tile.w[group], tile.n, tile.codes[group]);
  if (tile.job->canonical)
    canonical.apply(state.scales, tile.scales[group]);
  else
    memcpy(tile.scales[group], state.scales, sizeof state.scales);
  *tile.steps[group] = static_cast<uint8_t>(state.steps);
}

template <int K>
int64_t solve_free(const TritTile& tile) {
  const SortedTile sorted(tile.work, tile.n, tile.groups);
  const TritJob& job = *tile.job;
  GroupState<K> states[kMostGroups];
  for (int64_t batch = 0; batch < sorted.batches; ++batch) {
    if (!sorted.fill(tile, batch)) return batch * kLanes;
    GroupState<K>* part = states + batch * kLanes;
    begin<K>(sorted, batch, job.tie_order, part, SortedTile::lanes_in(tile, batch));
    for (int lane = 0; lane < SortedTile::lanes_in(tile, batch); ++lane) {
      part[lane].general = job.cap < 2;  // iteration 1 is not a nearest assignment to scales
      part[lane].energy = part[lane].error = 0;
      for (int64_t i = 0; job.starts > 1 && i < tile.n; ++i) {
        const double w = static_cast<double>(sorted.lanes[i * kLanes + lane]);
        part[lane].energy += w * w;
      }
    }
  }
  Lanes<K> lanes(sorted, job, tile.moving);
  lanes.run(states, tile.groups, 2, true);
  if (job.starts > 1) {
    greedy_start<K>(tile, sorted, states);
    lanes.run(states, tile.groups, 1, false);
  }
  if (job.starts > 2) {
    for (int64_t batch = 0; batch < sorted.batches; ++batch) {
      if (job.tie_order != 0) sorted.reload(tile, batch);
      begin<K>(sorted, batch, 1 - job.tie_order, states + batch * kLanes, SortedTile::lanes_in(tile, batch));
    }
    lanes.run(states, tile.groups, 2, false);
  }
  for (int64_t group = 0; group < tile.groups; ++group) write_group<K>(tile, sorted, states[group], group);
  return -1;
}

template <int Count>
int64_t solve_tied(const TritTile& tile) {
  const SortedTile sorted(tile.work, tile.n, tile.groups);
  for (int64_t batch = 0; batch < sorted.batches; ++batch) {
    if (!sorted.fill(tile, batch)) return batch * kLanes;
    TiedResult results[kLanes];
    sweep<Count>(sorted, batch, results, SortedTile::lanes_in(tile, batch));
    for (int lane = 0; lane < SortedTile::lanes_in(tile, batch); ++lane) {
      const int64_t group = batch * kLanes + lane;
      Ladder<Count> ladder;
      ladder.set_tied(results[lane].rounding);
      ladder.assign(tile.w[group], tile.n, tile.codes[group]);
      tile.scales[group][0] = results[lane].scale;
      *tile.steps[group] = 0;
    }
  }
  return -1;
}

int64_t solve(const TritTile& tile) {
  if (tile.job->tied) return tile.job->planes == 2 ? solve_tied<4>(tile) : solve_tied<13>(tile);
  if (tile.job->planes == 1) return solve_free<1>(tile);
  return tile.job->planes == 2 ? solve_free<2>(tile) : solve_free<3>(tile);
}

template <int K>
void assign_free(const TritTile& tile, int64_t group, double* general) {
  Levels<K> levels;
  if (!levels.order(tile.scales[group]) || has_tie(levels, tile.w[group], tile.n)) {
    to_double(tile.w[group], tile.n, general);
    return assign_trit_group(general, tile.n, *tile.job, tile.scales[group], tile.codes[group]);
  }
  Ladder<Levels<K>::kCount> ladder;
  ladder.set(levels, Canonical<K>(tile.scales[group], false));
  ladder.assign(tile.w[group], tile.n, tile.codes[group]);
}

template <int Count>
void assign_tied(const TritTile& tile, int64_t group) {
  Ladder<Count> ladder;
  ladder.set_tied(tile.scales[group][0]);
  ladder.assign(tile.w[group], tile.n, tile.codes[group]);
}

void assign(const TritTile& tile) {
  double* general = static_cast<double*>(tile.work);
  for (int64_t group = 0; group < tile.groups; ++group) {
    if (tile.job->tied)
      tile.job->planes == 2 ? assign_tied<4>(tile, group) : assign_tied<13>(tile, group);
    else if (tile.job->planes == 1)
      assign_free<1>(tile, group, general);
    else
      tile.job->planes == 2 ? assign_free<2>(tile, group, general) : assign_free<3>(tile, group, general);
  }
}

void combine(const int8_t* const* trits, const float* scales, int planes, int tied, int64_t n, float* out) {
  const int8_t *a = trits[0], *b = planes > 1 ? trits[1] : a, *c = planes > 2 ? trits[2] : a;
  const float s = scales[0], t = scales[1], u = scales[2];
  if (planes == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = s * static_cast<float>(a[i]);
  } else if (planes == 2 && tied) {
    for (int64_t i = 0; i < n; ++i) out[i] = s * static_cast<float>(3 * a[i] + b[i]);
  } else if (planes == 2) {
    for (int64_t i = 0; i < n; ++i) out[i] = s * static_cast<float>(a[i]) + t * static_cast<float>(b[i]);
  } else if (tied) {
    for (int64_t i = 0; i < n; ++i) out[i] = s * static_cast<float>(9 * a[i] + 3 * b[i] + c[i]);
  } else {
    for (int64_t i = 0; i < n; ++i)
      out[i] = (s * static_cast<float>(a[i]) + t * static_cast<float>(b[i])) + u * static_cast<float>(c[i]);
  }
}

void squared_sums(const float* a, const float* b, int64_t n, double* missed, double* total) {
  double far[16] = {}, all[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const double value = static_cast<double>(a[i + lane]), gap = value - static_cast<double>(b[i + lane]);
      far[lane] += gap * gap;
      all[lane] += value * value;
    }
  for (int lane = 0; i + lane < n; ++lane) {
    const double value = static_cast<double>(a[i + lane]), gap = value - static_cast<double>(b[i + lane]);
    far[lane] += gap * gap;
    all[lane] += value * value;
  }
  *missed = *total = 0;
  for (int lane = 0; lane < 16; ++lane) {
    *missed += far[lane];
    *total += all[lane];
  }
}

void widen_values(const uint16_t* values, int half, int64_t n, float* out) {
  int64_t i = 0;
  if (half) {
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i))));
#endif
    for (; i < n; ++i) out[i] = float_from_half(values[i]);
  } else {
    for (; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(values[i]) << 16;
      memcpy(out + i, &bits, sizeof bits);
    }
  }
}

constexpr Kernels kKernels = {FW_QUOTE(FW_ISA), solve, assign, combine, squared_sums, widen_values};

}  // namespace

const Kernels* FW_NAME(FW_ISA)() { return &kKernels; }
