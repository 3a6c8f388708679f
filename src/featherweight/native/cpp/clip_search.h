// Which of several uniform grids misses a group least. The definition is featherweight/native/clip_search.py, to the bit.
#ifndef FEATHERWEIGHT_CLIP_SEARCH_H
#define FEATHERWEIGHT_CLIP_SEARCH_H

#include <stdint.h>

#include "featherweight.h"

// Matrices are row-major and contiguous. Zero points are integers from 0 to `highest`, the last code of the grids.
typedef struct fw_clip_job {
  const float* values;       // [groups, size]
  const float* counted;      // [period, size] weights of the errors of group i at row i % period; null: all alike
  const float* scales;       // [trials, groups]
  const float* zero_points;  // [trials, groups]
  int32_t* chosen;           // [groups] the first trial of least error; 0 where no error is a number
  int64_t groups, size, period, trials;
  float highest;
  float exponent;  // of the error: above 0, at most 8
} fw_clip_job;

FW_API int32_t fw_clip_search(const fw_clip_job* job, int32_t threads);

// One group; work: clip_work_floats(job) floats, aligned to 64 bytes.
constexpr int64_t kClipLanes = 16;
inline int64_t clip_work_floats(const fw_clip_job& job) {
  return 2 * ((job.size + kClipLanes - 1) / kClipLanes * kClipLanes);
}

typedef void (*ClipGroup)(const fw_clip_job& job, int64_t group, float* work);
void clip_group_baseline(const fw_clip_job& job, int64_t group, float* work);
void clip_group_avx2(const fw_clip_job& job, int64_t group, float* work);
void clip_group_avx512(const fw_clip_job& job, int64_t group, float* work);

#endif
