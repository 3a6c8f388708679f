// The columns of one block of a Hessian sweep. The definition is featherweight/native/sweep.py, to the bit.
#ifndef FEATHERWEIGHT_SWEEP_H
#define FEATHERWEIGHT_SWEEP_H

#include <stdint.h>

#include "featherweight.h"

// Strides are counted in elements; matrices are row-major. Pointers that may be null: feedback (no cross moment) and with
// it residuals; tail_errors and tail_residuals (tail 0: the same as errors and residuals).
typedef struct fw_sweep_job {
  float* weight;           // [rows, columns], in place: each column ends as it was just before rounding
  const float* original;   // [rows, columns]
  const float* upper;      // [columns, columns], upper triangle read
  const float* feedback;   // [columns, columns], above the diagonal read
  const float* levels;     // [rows, groups, level_count], ascending
  const int32_t* group_of; // [columns]
  uint8_t* indices;        // [rows, columns], as are the four that follow
  float* errors;
  float* residuals;
  float* tail_errors;
  float* tail_residuals;
  double* loss;      // [rows] sum of ((w - q) / U_jj)^2
  int64_t* clipped;  // [rows]
  float* drift;      // [rows] largest |w - w0|
  int64_t rows, columns, groups, level_count;
  int64_t weight_stride, original_stride, upper_stride, feedback_stride;
  float alpha, residual, shrink;
  int32_t pull_back;  // 1: each column is shrunk towards its original right before it is rounded
  int32_t tail;       // w behind the block: 0 as before rounding, 1 rounded, 2 clamped to the range of its group
} fw_sweep_job;

FW_API int32_t fw_sweep(const fw_sweep_job* job, int32_t threads);

// Rows first to last - 1 (at most kSweepRows); work: sweep_work_floats(job) floats, aligned to 64 bytes.
constexpr int64_t kSweepRows = 64;
inline int64_t sweep_work_floats(const fw_sweep_job& job) {
  return kSweepRows * (2 * job.columns + 2 * job.level_count + 16);
}

typedef void (*SweepTile)(const fw_sweep_job& job, int64_t first, int64_t last, float* work);
void sweep_tile_baseline(const fw_sweep_job& job, int64_t first, int64_t last, float* work);
void sweep_tile_avx2(const fw_sweep_job& job, int64_t first, int64_t last, float* work);
void sweep_tile_avx512(const fw_sweep_job& job, int64_t first, int64_t last, float* work);

#endif
