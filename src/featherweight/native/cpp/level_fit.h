// The scale with which a fixed set of levels misses a group least. The definition is featherweight/native/level_fit.py, to the bit.
#ifndef FEATHERWEIGHT_LEVEL_FIT_H
#define FEATHERWEIGHT_LEVEL_FIT_H

#include <stdint.h>

#include "featherweight.h"

// Matrices are row-major and contiguous.
typedef struct fw_level_fit_job {
  const float* values;   // [groups, size]
  const float* counted;  // [period, size] weights of the errors of group i at row i % period
  const float* levels;   // [level_count] ascending, in units of a group's scale
  float* scales;         // [groups] where to begin, and in place what is found
  float* errors;         // [groups] what the found scale misses, sum counted (value - scale level)^2
  int64_t groups, size, period, level_count;
  int32_t rounds;
} fw_level_fit_job;

FW_API int32_t fw_level_fit(const fw_level_fit_job* job, int32_t threads);

// One group; work: level_fit_work_floats(job) floats, aligned to 64 bytes.
constexpr int64_t kFitLanes = 16;
inline int64_t level_fit_work_floats(const fw_level_fit_job& job) {
  return 2 * ((job.size + kFitLanes - 1) / kFitLanes * kFitLanes) + 2 * job.level_count;
}

typedef void (*LevelFitGroup)(const fw_level_fit_job& job, int64_t group, float* work);
void level_fit_group_baseline(const fw_level_fit_job& job, int64_t group, float* work);
void level_fit_group_avx2(const fw_level_fit_job& job, int64_t group, float* work);
void level_fit_group_avx512(const fw_level_fit_job& job, int64_t group, float* work);

#endif
