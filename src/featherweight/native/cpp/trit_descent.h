// Coordinate descent over the levels of a block of columns. The definition is featherweight/native/trit_descent.py.
#ifndef FEATHERWEIGHT_TRIT_DESCENT_H
#define FEATHERWEIGHT_TRIT_DESCENT_H

#include <stdint.h>

#include "featherweight.h"

// Matrices are row-major and contiguous.
typedef struct fw_descent_job {
  const double* gram;      // [columns, columns], symmetric
  const float* levels;     // [rows, groups, level_count], ascending
  const int32_t* group_of; // [columns]
  uint8_t* indices;        // [rows, columns], in place
  double* gradient;        // [rows, columns] (w - q) H of these columns, in place
  double* decrease;        // [rows] what the objective fell by
  int64_t* changes;        // [rows] accepted moves
  int64_t rows, columns, groups, level_count;
  int32_t rounds, pairs;   // pairs 1: also moves of two weights at once
} fw_descent_job;

FW_API int32_t fw_descent(const fw_descent_job* job, int32_t threads);

// One row; work: descent_work_doubles(job) doubles, aligned to 64 bytes.
inline int64_t descent_work_doubles(const fw_descent_job& job) {
  return 5 * job.columns + job.groups * (2 * job.level_count) + 8;
}

typedef void (*DescentRow)(const fw_descent_job& job, int64_t row, double* work);
void descent_row_baseline(const fw_descent_job& job, int64_t row, double* work);
void descent_row_avx2(const fw_descent_job& job, int64_t row, double* work);
void descent_row_avx512(const fw_descent_job& job, int64_t row, double* work);

#endif
