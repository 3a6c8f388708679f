// Compiled once for every instruction set, with FW_ISA naming it. Sixteen partial sums whatever the width of a register,
// so that all give the same bits. Only code with internal linkage.
#include "level_fit.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(level_fit_group_, isa)

namespace {

constexpr int kLanes = static_cast<int>(kFitLanes);

// The lanes by halves.
inline float summed(const float* sums) {
  float part[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) part[lane] = sums[lane];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) part[lane] += part[lane + width];
  return part[0];
}

struct Levels {
  float* digits;  // in the order of their values under the present scale
  float* bounds;  // between neighbours; a value above a bound takes the next level
  int64_t count;

  void set(const float* ascending, float scale) {
    for (int64_t k = 0; k < count; ++k) digits[k] = scale < 0 ? ascending[count - 1 - k] : ascending[k];
    for (int64_t k = 0; k + 1 < count; ++k) bounds[k] = (scale * digits[k + 1] + scale * digits[k]) / 2;
  }

  inline __attribute__((always_inline)) void nearest(const float* values, float* found) const {
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = digits[0];
    for (int64_t k = 0; k + 1 < count; ++k) {
      const float bound = bounds[k], digit = digits[k + 1];
      for (int lane = 0; lane < kLanes; ++lane) found[lane] = values[lane] > bound ? digit : found[lane];
    }
  }
};

}  // namespace

void FW_NAME(FW_ISA)(const fw_level_fit_job& job, int64_t group, float* work) {
  const int64_t padded = (job.size + kFitLanes - 1) / kFitLanes * kFitLanes;
  float* values = work;
  float* counted = work + padded;
  Levels levels = {counted + padded, counted + padded + job.level_count, job.level_count};
  const float* given = job.values + group * job.size;
  const float* weights = job.counted + group % job.period * job.size;
  for (int64_t i = 0; i < padded; ++i) {
    values[i] = i < job.size ? given[i] : 0.0F;
    counted[i] = i < job.size ? weights[i] : 0.0F;
  }
  float scale = job.scales[group];
  for (int32_t round = 0; round < job.rounds; ++round) {
    levels.set(job.levels, scale);
    float squares[kLanes] = {}, products[kLanes] = {}, digits[kLanes];
    for (int64_t i = 0; i < padded; i += kLanes) {
      levels.nearest(values + i, digits);
      for (int lane = 0; lane < kLanes; ++lane) {
        const float weighted = digits[lane] * counted[i + lane];
        squares[lane] += weighted * digits[lane];
        products[lane] += weighted * values[i + lane];
      }
    }
    const float square = summed(squares);
    const float found = square > 0 ? summed(products) / square : scale;
    if (found == scale) break;  // nothing will move any more
    scale = found;
  }
  levels.set(job.levels, scale);
  float errors[kLanes] = {}, digits[kLanes];
  for (int64_t i = 0; i < padded; i += kLanes) {
    levels.nearest(values + i, digits);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float missed = values[i + lane] - scale * digits[lane];
      errors[lane] += missed * missed * counted[i + lane];
    }
  }
  job.scales[group] = scale;
  job.errors[group] = summed(errors);
}
