// Compiled once for every instruction set, with FW_ISA naming it. Rows go one after another, and so do the columns of a
// row; the lanes are the columns, or rows' columns, that an error is pushed into. Only code with internal linkage.
#include "sweep_rows.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(sweep_rows_, isa)

namespace {

void push(float e, const float* __restrict through, int64_t first, int64_t last, float* __restrict w) {
  for (int64_t k = first; k < last; ++k) w[k] -= e * through[k];
}

// Take from a row what the rows before it missed, one after another.
void take_from_rows(const fw_sweep_rows_job& job, int64_t row, float* __restrict w, float* __restrict target) {
  for (int64_t i = 0; i < row; ++i) {
    const float u = job.between[i * job.between_stride + row];
    const float* __restrict e = job.row_errors + i * job.columns;
    for (int64_t j = 0; j < job.columns; ++j) {
      const float taken = e[j] * u;
      w[j] -= taken;
      target[j] -= taken;
    }
  }
}

void sweep_row(const fw_sweep_rows_job& job, int64_t row, float* __restrict w, const float* target, float* middles) {
  const int64_t n = job.columns, L = job.level_count;
  const float own = job.between[row * job.between_stride + row];
  const float* levels = nullptr;
  double loss = 0;
  int64_t clipped = 0;
  float drift = 0, low = 0, high = 0;
  int32_t group = -1;
  for (int64_t j = 0; j < n; ++j) {
    if (job.group_of[j] != group) {
      group = job.group_of[j];
      levels = job.levels + (row * job.groups + group) * L;
      for (int64_t k = 0; k + 1 < L; ++k) middles[k] = (levels[k + 1] + levels[k]) / 2;
      const float bottom = levels[0], top = levels[L - 1];
      const float second = L > 1 ? levels[1] : bottom, second_last = L > 1 ? levels[L - 2] : top;
      low = bottom - (second - bottom) / 2;
      high = top + (top - second_last) / 2;
    }
    const float* u = job.upper + j * job.upper_stride;
    const float now = w[j];
    int32_t index = 0;
    for (int64_t k = 0; k + 1 < L; ++k) index += now > middles[k];
    const float missed = now - levels[index], e = missed / u[j], far = now - target[j], moved = far < 0 ? -far : far;
    job.indices[row * n + j] = static_cast<uint8_t>(index);
    job.errors[row * n + j] = e;
    job.row_errors[row * n + j] = (target[j] - levels[index]) / own;
    loss += static_cast<double>(e) * static_cast<double>(e);
    clipped += (now < low) | (now > high);
    drift = moved > drift ? moved : drift;
    push(e, u, j + 1, n, w);
  }
  job.loss[row] = loss;
  job.clipped[row] = clipped;
  job.drift[row] = drift;
}

}  // namespace

void FW_NAME(FW_ISA)(const fw_sweep_rows_job& job, float* work) {
  for (int64_t row = 0; row < job.rows; ++row) {
    float* w = job.weight + row * job.weight_stride;
    float* target = job.target + row * job.target_stride;
    take_from_rows(job, row, w, target);
    sweep_row(job, row, w, target, work);
  }
}
