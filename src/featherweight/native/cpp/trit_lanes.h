// The PTQTP loop on sorted groups, sixteen at a time. A lane whose group reaches its fixed point takes the next group.
#ifndef FEATHERWEIGHT_TRIT_LANES_H
#define FEATHERWEIGHT_TRIT_LANES_H

#include "sorted_tile.h"
#include "trit_levels.h"

namespace {

// Where the loop begins for a group, and what it found.
template <int K>
struct GroupState {
  Normal<K> normal;       // of the trits after iteration `first - 1`
  double scale;           // all scales of iteration 1, if first is 2
  double energy;          // sum of w^2, when several starts compete
  double error;           // squared error of the best start so far
  double level_scales[K]; // scales the trits are nearest to
  double scales[K];       // scales to return
  int steps;
  bool general;           // left to trit_group.h
};

template <int K>
class Lanes {
 public:
  Lanes(const SortedTile& tile, const TritJob& job, uint8_t* moving)
      : tile_(tile), job_(job), limits_{job.ridge_max, job.condition_threshold}, moving_(moving) {
    for (int lane = 0; lane < kLanes; ++lane) {
      slot_[lane] = -1;
      iteration_[lane] = 0;
      for (int i = 0; i < kCount; ++i)
        for (int k = 0; k < K; ++k) code_[i][k][lane] = kPatterns<K>.trits[i][k];
      place(lane, 0);
      for (int i = 0; i < kGram; ++i) gram_[i][lane] = 1 + i;
      for (int k = 0; k < K; ++k) right_[k][lane] = scale_[k][lane] = 0;
      ridge_[lane] = 1;
    }
  }

  // Run the loop for all groups from iteration `first` on.
  void run(GroupState<K>* states, int64_t count, int first, bool first_start) {
    states_ = states;
    count_ = count;
    next_ = 0;
    first_ = first;
    first_start_ = first_start;
    int busy = 0;
    for (int lane = 0; lane < kLanes; ++lane) busy += take(lane);
    while (busy > 0) {
      solve_scales();
      const bool doubtful = find_thresholds();
      search();
      if (doubtful) check_ties();
      sum_between();
      busy -= finish();
    }
  }

 private:
  static constexpr int kCount = Patterns<K>::kCount;
  static constexpr int kGram = Normal<K>::kGram;

  // Point the lane at the sorted data of a slot.
  void place(int lane, int64_t slot) {
    const int64_t batch = slot / kLanes, column = slot % kLanes;
    sorted_at_[lane] = static_cast<int32_t>(batch * tile_.shape.sorted_size() + column);
    prefix_at_[lane] = static_cast<int32_t>(batch * tile_.shape.prefix_size() + column);
    total_[lane] = tile_.prefix[prefix_at_[lane] + tile_.shape.n * kLanes];
    for (int64_t i = 0; i < kPivots; ++i)
      pivot_[i][lane] = tile_.sorted[sorted_at_[lane] + ((i + 1) * tile_.shape.stride - 1) * kLanes];
  }

  // Give the lane the next group. 0 if there is none.
  int take(int lane) {
    while (next_ < count_ && states_[next_].general) ++next_;
    if (next_ == count_) {
      slot_[lane] = -1;
      return 0;
    }
    const GroupState<K>& state = states_[next_];
    slot_[lane] = next_;
    place(lane, next_++);
    iteration_[lane] = first_;
    ridge_[lane] = job_.ridge;
    for (int i = 0; i < kGram; ++i) gram_[i][lane] = state.normal.gram[i];
    for (int k = 0; k < K; ++k) {
      right_[k][lane] = state.normal.right[k];
      scale_[k][lane] = state.scale;
    }
    return 1;
  }

  Normal<K> normal_of(const double (&gram)[kGram][kLanes], const double (&right)[K][kLanes], int lane) const {
    Normal<K> normal;
    for (int i = 0; i < kGram; ++i) normal.gram[i] = gram[i][lane];
    for (int k = 0; k < K; ++k) normal.right[k] = right[k][lane];
    return normal;
  }

  // Ridge step: scale_, moved_ and same_ridge_.
  void solve_scales() {
    Long suspects = {};
    alignas(64) int64_t suspect[kLanes];
    const Double tolerance = Double{} + job_.tolerance_squared;
    for (int c = 0; c < kLanes; c += kHalf) {
      Double gram[kGram], right[K], found[K];
      for (int i = 0; i < kGram; ++i) gram[i] = load<Double>(gram_[i] + c);
      for (int k = 0; k < K; ++k) right[k] = load<Double>(right_[k] + c);
      const Long bad = solve(gram, right, load<Double>(ridge_ + c), found);
      suspects |= bad;
      store(suspect + c, bad);
      Double change = {};
      for (int k = 0; k < K; ++k) {
        const Double step = found[k] - load<Double>(scale_[k] + c);
        change = change + step * step;
        store(scale_[k] + c, found[k]);
        store(previous_[k] + c, found[k] - step);
      }
      store(moved_ + c, change >= tolerance);
      store(same_ridge_ + c, ~Long{});
    }
    if (any(suspects))
      for (int lane = 0; lane < kLanes; ++lane)
        if (suspect[lane] && slot_[lane] >= 0) guard(lane);
    for (int lane = 0; lane < kLanes; ++lane)
      moving_[moved_[lane] && slot_[lane] >= 0 && iteration_[lane] > 1 ? iteration_[lane] : 0] = 1;
  }

  // found = (gram + ridge I)^-1 right. Nonzero where the condition may be at its threshold.
  Long solve(const Double* gram, const Double* right, Double ridge, Double* found) const {
    const Double half = Double{} + 0.5 * job_.condition_threshold;
    if constexpr (K == 1) {
      found[0] = right[0] / (gram[0] + ridge);
      return Long{};
    } else if constexpr (K == 2) {
      const Double a11 = gram[0] + ridge, a22 = gram[2] + ridge, s12 = gram[1];
      const Double determinant = a11 * a22 - s12 * s12;
      found[0] = (a22 * right[0] - s12 * right[1]) / determinant;
      found[1] = (a11 * right[1] - s12 * right[0]) / determinant;
      return ~(Long)(a11 * a11 + a22 * a22 + 2 * (s12 * s12) < half * determinant);
    } else {
      const Double d1 = gram[0] + ridge;
      const Double l21 = gram[1] / d1, l31 = gram[2] / d1;
      const Double d2 = (gram[3] + ridge) - l21 * gram[1];
      const Double u = gram[4] - l31 * gram[1];
      const Double l32 = u / d2;
      const Double d3 = ((gram[5] + ridge) - l31 * gram[2]) - l32 * u;
      const Double y2 = right[1] - l21 * right[0];
      const Double y3 = right[2] - l31 * right[0] - l32 * y2;
      found[2] = y3 / d3;
      found[1] = y2 / d2 - l32 * found[2];
      found[0] = right[0] / d1 - l21 * found[1] - l31 * found[2];
      // ||A|| ||A^-1|| <= sqrt(3) trace^3 / (4 determinant) < trace^3 / (2 determinant)
      const Double trace = gram[0] + gram[3] + gram[5] + 3 * ridge;
      return ~(Long)(trace * trace * trace < 2 * half * (d1 * d2 * d3));
    }
  }

  // The condition guard of one lane, exactly.
  void guard(int lane) {
    const Normal<K> normal = normal_of(gram_, right_, lane);
    const double ridge = guarded<K>(normal.gram, ridge_[lane], limits_);
    if (ridge == ridge_[lane]) return;
    ridge_[lane] = ridge;
    same_ridge_[lane] = 0;
    double found[K], change = 0;
    solve_normal<K>(normal, ridge, found);
    for (int k = 0; k < K; ++k) {
      change = change + (found[k] - previous_[k][lane]) * (found[k] - previous_[k][lane]);
      scale_[k][lane] = found[k];
    }
    moved_[lane] = change >= job_.tolerance_squared ? -1 : 0;
  }

  // Levels in the order each lane had last; lanes for which it changed are sorted again. Then thresholds as float32 bits.
  // Returns whether some threshold nearly is a float32.
  bool find_thresholds() {
    Long suspects = {};
    alignas(64) int64_t unordered[kLanes];
    for (int c = 0; c < kLanes; c += kHalf) {
      Double scales[K];
      for (int k = 0; k < K; ++k) scales[k] = load<Double>(scale_[k] + c);
      for (int i = 0; i < kCount; ++i) {
        Double level = load<Double>(code_[i][0] + c) * scales[0];
        for (int k = 1; k < K; ++k) level = level + load<Double>(code_[i][k] + c) * scales[k];
        store(level_[i] + c, level);
      }
      const Double gap = kGap * load<Double>(level_[kCount - 1] + c);
      Double before = {};
      Long ordered = ~Long{};
      for (int i = 0; i < kCount; ++i) {
        const Double level = load<Double>(level_[i] + c);
        ordered &= (Long)(level - before > gap);
        before = level;
      }
      suspects |= ~ordered;
      store(unordered + c, ~ordered);
    }
    if (any(suspects))
      for (int lane = 0; lane < kLanes; ++lane)
        if (unordered[lane] && slot_[lane] >= 0) reorder(lane);
    Long near = {};
    for (int c = 0; c < kLanes; c += kHalf) {
      Double before = {};
      for (int i = 0; i < kCount; ++i) {
        const Double level = load<Double>(level_[i] + c);
        const Double threshold = 0.5 * (before + level);
        before = level;
        const FloatHalf rounded = narrow(threshold);
        const Double difference = widen(rounded) - threshold;
        near |= (Long)(absolute(difference) <= threshold * kNear);
        const IntHalf below = narrow((Long)(difference < 0));
        store(threshold_[i] + c, (IntHalf)rounded - below);
      }
    }
    return any(near);
  }

  // Sort the levels of a lane; a group whose levels are not apart leaves to the general path at the end of the iteration.
  void reorder(int lane) {
    Levels<K> levels;
    double scales[K];
    for (int k = 0; k < K; ++k) scales[k] = scale_[k][lane];
    if (!levels.order(scales)) {
      states_[slot_[lane]].general = true;
      return;
    }
    for (int i = 0; i < kCount; ++i) {
      level_[i][lane] = levels.level[i];
      for (int k = 0; k < K; ++k) code_[i][k][lane] = levels.trits[i][k];
    }
  }

  // Number of magnitudes below each threshold: eight pivots, then a binary search between two of them.
  void search() {
    const int32_t stride = static_cast<int32_t>(tile_.shape.stride);
    for (int i = 0; i < kCount; ++i)
      for (int c = 0; c < kLanes; c += kWidth) {
        const Int threshold = load<Int>(threshold_[i] + c), at = load<Int>(sorted_at_ + c);
        Int block = {};
        for (int p = 0; p < kPivots; ++p) block -= load<Int>(pivot_[p] + c) < threshold;
        Int position = block * stride;
        for (int32_t step = stride / 2; step >= 1; step /= 2) {
          const Int value = gather(tile_.sorted, at + (position + (step - 1)) * kLanes);
          position += (value < threshold) & step;
        }
        store(position_[i] + c, position);
      }
  }

  // A weight that lies on a threshold, or so near that rounding would decide, sends its group to the general path.
  void check_ties() {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (slot_[lane] < 0) continue;
      for (int i = 0; i < kCount; ++i) {
        const double threshold = 0.5 * ((i ? level_[i - 1][lane] : 0.0) + level_[i][lane]);
        if (!near_a_float(threshold)) continue;
        const int32_t target = bits_of(static_cast<float>(threshold));
        const int32_t* column = tile_.sorted + sorted_at_[lane];
        const int64_t position = position_[i][lane];
        if (column[position * kLanes] == target || (position > 0 && column[(position - 1) * kLanes] == target))
          states_[slot_[lane]].general = true;
      }
    }
  }

  // Normal equations of the new trits from counts and sums between thresholds.
  void sum_between() {
    const Double size = Double{} + static_cast<double>(tile_.shape.n);
    for (int c = 0; c < kLanes; c += kHalf) {
      const IntHalf at = load<IntHalf>(prefix_at_ + c);
      Double gram[kGram] = {}, right[K] = {};
      Double upper_count = size, upper_sum = load<Double>(total_ + c);
      for (int i = kCount - 1; i >= 0; --i) {
        const IntHalf position = load<IntHalf>(position_[i] + c);
        const Double sum = gather(tile_.prefix, at + position * kLanes);
        const Double count = widen(position);
        const Double inside = upper_count - count, weight = upper_sum - sum;
        upper_count = count;
        upper_sum = sum;
        for (int k = 0, entry = 0; k < K; ++k) {
          const Double code = load<Double>(code_[i][k] + c), counted = code * inside;
          right[k] += code * weight;
          for (int other = k; other < K; ++other, ++entry) gram[entry] += counted * load<Double>(code_[i][other] + c);
        }
      }
      for (int i = 0; i < kGram; ++i) store(next_gram_[i] + c, gram[i]);
      for (int k = 0; k < K; ++k) store(next_right_[k] + c, right[k]);
    }
  }

  // Advance every lane; lanes that are done hand in their result and take the next group. Returns how many became idle.
  int finish() {
    int idle = 0;
    alignas(64) int64_t fixed[kLanes];
    for (int c = 0; c < kLanes; c += kHalf) {
      Long same = load<Long>(same_ridge_ + c);
      for (int i = 0; i < kGram; ++i) {
        const Double next = load<Double>(next_gram_[i] + c);
        same &= (Long)(next == load<Double>(gram_[i] + c));
        store(gram_[i] + c, next);
      }
      for (int k = 0; k < K; ++k) {
        const Double next = load<Double>(next_right_[k] + c);
        same &= (Long)(next == load<Double>(right_[k] + c));
        store(right_[k] + c, next);
      }
      store(fixed + c, same);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (slot_[lane] < 0) continue;
      const bool general = states_[slot_[lane]].general;
      if (general || fixed[lane] || iteration_[lane] >= job_.cap) {
        if (!general) hand_in(lane, fixed[lane] != 0);
        idle += 1 - take(lane);
      } else {
        ++iteration_[lane];
      }
    }
    return idle;
  }

  void hand_in(int lane, bool fixed) {
    GroupState<K>& state = states_[slot_[lane]];
    const Normal<K> normal = normal_of(gram_, right_, lane);
    double scales[K], returned[K];
    for (int k = 0; k < K; ++k) scales[k] = returned[k] = scale_[k][lane];
    if (job_.final_least_squares && !fixed)
      solve_normal<K>(normal, guarded<K>(normal.gram, ridge_[lane], limits_), returned);
    if (job_.starts > 1) {
      double error = state.energy;
      for (int k = 0, entry = 0; k < K; ++k) {
        error -= 2 * returned[k] * normal.right[k];
        for (int other = k; other < K; ++other, ++entry)
          error += (other == k ? 1 : 2) * returned[k] * returned[other] * normal.gram[entry];
      }
      if (!first_start_ && !(error < state.error * kStartMargin - kStartFloor * state.energy)) return;
      state.error = error;
    }
    memcpy(state.level_scales, scales, sizeof scales);
    memcpy(state.scales, returned, sizeof returned);
    state.steps = iteration_[lane];
  }

  const SortedTile& tile_;
  const TritJob& job_;
  Ridge limits_;
  uint8_t* moving_;
  GroupState<K>* states_ = nullptr;
  int64_t count_ = 0, next_ = 0;
  int first_ = 0;
  bool first_start_ = true;

  alignas(64) double gram_[kGram][kLanes];
  alignas(64) double right_[K][kLanes];
  alignas(64) double next_gram_[kGram][kLanes];
  alignas(64) double next_right_[K][kLanes];
  alignas(64) double scale_[K][kLanes];
  alignas(64) double previous_[K][kLanes];
  alignas(64) double ridge_[kLanes];
  alignas(64) double total_[kLanes];
  alignas(64) double code_[kCount][K][kLanes];
  alignas(64) double level_[kCount][kLanes];
  alignas(64) int64_t moved_[kLanes];
  alignas(64) int64_t same_ridge_[kLanes];
  alignas(64) int32_t threshold_[kCount][kLanes];
  alignas(64) int32_t position_[kCount][kLanes];
  alignas(64) int32_t pivot_[kPivots][kLanes];
  alignas(64) int32_t sorted_at_[kLanes];
  alignas(64) int32_t prefix_at_[kLanes];
  int64_t slot_[kLanes];
  int iteration_[kLanes];
};

}  // namespace

#endif
