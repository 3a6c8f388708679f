// Assigning trits by thresholds. With generic scales the trit step depends on |w| alone: the nearest of the (3^K - 1) / 2
// positive levels and 0, a lookup among the midpoints of neighbouring levels.
#ifndef FEATHERWEIGHT_TRIT_LEVELS_H
#define FEATHERWEIGHT_TRIT_LEVELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "trit_algebra.h"

namespace {

// Levels closer together than this, relative to the largest, go to the general path.
constexpr double kGap = 1e-9;
// A weight this close to a threshold might be assigned by rounding in the exhaustive search: general path.
constexpr double kNear = 0x1p-44;

inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// |w| >= threshold as a comparison of bits: those of the smallest float32 that is not below the threshold.
inline int32_t ceiling_bits(double threshold) {
  const float nearest = static_cast<float>(threshold);
  return bits_of(nearest) + (static_cast<double>(nearest) < threshold);
}

inline bool near_a_float(double threshold) {
  return fabs(static_cast<double>(static_cast<float>(threshold)) - threshold) <= threshold * kNear;
}

// One code tuple of each pair (c, -c), c != 0.
template <int K>
struct Patterns {
  static constexpr int kCount = (K == 1 ? 1 : K == 2 ? 4 : 13);
  int8_t trits[kCount][K];

  constexpr Patterns() : trits() {
    for (int i = 0; i < kCount; ++i) {
      int rest = i + kCount + 1;  // codes above that of all zeros
      for (int k = K - 1; k >= 0; --k, rest /= 3) trits[i][k] = static_cast<int8_t>(rest % 3 - 1);
    }
  }
};

template <int K>
constexpr Patterns<K> kPatterns;

// Positive levels in ascending order with their code tuples.
template <int K>
struct Levels {
  static constexpr int kCount = Patterns<K>::kCount;
  double level[kCount];
  int8_t trits[kCount][K];

  // Sums from left to right, as the exhaustive search forms its levels. False if levels are too close together.
  bool order(const double* scales) {
    for (int i = 0; i < kCount; ++i) {
      const int8_t* pattern = kPatterns<K>.trits[i];
      double sum = pattern[0] * scales[0];
      for (int k = 1; k < K; ++k) sum = sum + pattern[k] * scales[k];
      const int sign = sum < 0 ? -1 : 1;
      int at = i;
      for (; at > 0 && level[at - 1] > sign * sum; --at) {
        level[at] = level[at - 1];
        memcpy(trits[at], trits[at - 1], K);
      }
      level[at] = sign * sum;
      for (int k = 0; k < K; ++k) trits[at][k] = static_cast<int8_t>(sign * pattern[k]);
    }
    const double gap = kGap * level[kCount - 1];
    bool apart = level[0] > gap;
    for (int i = 1; i < kCount; ++i) apart = apart && level[i] - level[i - 1] > gap;
    return apart;
  }

  double threshold(int i) const { return i == 0 ? 0.5 * level[0] : 0.5 * (level[i - 1] + level[i]); }
};

// Thresholds as float32 bits and what the joint code gains at each.
template <int Count>
struct Ladder {
  int32_t threshold[Count];
  int32_t gain[Count];

  template <int K>
  void set(const Levels<K>& levels, const Canonical<K>& canonical) {
    int before = 0;
    for (int i = 0; i < Count; ++i) {
      int trits[K];
      for (int k = 0; k < K; ++k) trits[k] = levels.trits[i][k];
      const int code = canonical.code(trits);
      threshold[i] = ceiling_bits(levels.threshold(i));
      gain[i] = code - before;
      before = code;
    }
  }

  // Integer codes: the i-th threshold is (i + 1/2) scale.
  void set_tied(double scale) {
    for (int i = 0; i < Count; ++i) {
      threshold[i] = scale > 0 ? ceiling_bits((i + 0.5) * scale) : INT32_MAX;
      gain[i] = 1;
    }
  }

  void assign(const float* w, int64_t n, uint8_t* codes) const {
    const Ladder ladder = *this;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t bits = bits_of(w[i]), magnitude = bits & INT32_MAX, sign = bits >> 31;
      int32_t code = 0;
      for (int j = 0; j < Count; ++j) code += magnitude >= ladder.threshold[j] ? ladder.gain[j] : 0;
      codes[i] = static_cast<uint8_t>(((code ^ sign) - sign) + Count);
    }
  }
};

// Whether a weight lies so near to a threshold that the order of ties or rounding decides.
template <int K>
bool has_tie(const Levels<K>& levels, const float* w, int64_t n) {
  for (int j = 0; j < Levels<K>::kCount; ++j) {
    if (!near_a_float(levels.threshold(j))) continue;
    const int32_t target = bits_of(static_cast<float>(levels.threshold(j)));
    int32_t found = 0;
    for (int64_t i = 0; i < n; ++i) found |= (bits_of(w[i]) & INT32_MAX) == target;
    if (found) return true;
  }
  return false;
}

}  // namespace

#endif
