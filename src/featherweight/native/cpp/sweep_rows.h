// A Hessian sweep in which rows hand their errors to later rows, too: the columns of one block, for some rows. The
// definition is featherweight/native/sweep_rows.py, to the bit.
#ifndef FEATHERWEIGHT_SWEEP_ROWS_H
#define FEATHERWEIGHT_SWEEP_ROWS_H

#include <stdint.h>

#include "featherweight.h"

// Strides are counted in elements; matrices are row-major.
typedef struct fw_sweep_rows_job {
  float* weight;           // [rows, columns], in place: each weight ends as it was just before rounding
  float* target;           // [rows, columns], in place: what a row's own columns have not changed; see the definition
  const float* upper;      // [columns, columns], upper triangle read
  const float* between;    // [rows, rows], upper triangle read
  const float* levels;     // [rows, groups, level_count], ascending
  const int32_t* group_of; // [columns]
  uint8_t* indices;        // [rows, columns], as are the two that follow
  float* errors;
  float* row_errors;
  double* loss;      // [rows] sum of ((w - q) / U_jj)^2
  int64_t* clipped;  // [rows]
  float* drift;      // [rows] largest |w - target|
  int64_t rows, columns, groups, level_count;
  int64_t weight_stride, target_stride, upper_stride, between_stride;
} fw_sweep_rows_job;

// Rows follow one another, so that it runs on the calling thread whatever `threads` says.
FW_API int32_t fw_sweep_rows(const fw_sweep_rows_job* job, int32_t threads);

// work: level_count floats
typedef void (*SweepRows)(const fw_sweep_rows_job& job, float* work);
void sweep_rows_baseline(const fw_sweep_rows_job& job, float* work);
void sweep_rows_avx2(const fw_sweep_rows_job& job, float* work);
void sweep_rows_avx512(const fw_sweep_rows_job& job, float* work);

#endif
