#include "sweep.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace {

SweepTile tile_function() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return sweep_tile_avx512;
  if (std::strcmp(fw_isa(), "avx2") == 0) return sweep_tile_avx2;
#endif
  return sweep_tile_baseline;
}

bool valid(const fw_sweep_job& job) {
  if (!job.weight || !job.original || !job.upper || !job.levels || !job.group_of || !job.indices || !job.errors)
    return false;
  if (!job.loss || !job.clipped || !job.drift || job.columns < 1) return false;
  if (job.level_count < 1 || job.level_count > 256 || job.groups < 1 || job.tail < 0 || job.tail > 2) return false;
  if (job.feedback && !job.residuals) return false;
  if (job.tail > 0 && (!job.tail_errors || (job.feedback && !job.tail_residuals))) return false;
  for (const int64_t stride : {job.weight_stride, job.original_stride})
    if (!fair_matrix(job.rows, stride, job.columns)) return false;
  if (!fair_size(job.rows, job.columns) || !fair_matrix(job.columns, job.upper_stride, job.columns)) return false;
  if (job.feedback && !fair_matrix(job.columns, job.feedback_stride, job.columns)) return false;
  if (job.groups > kLargestSize / 256 || !fair_size(job.rows, job.groups * job.level_count)) return false;
  if (std::isnan(job.alpha) || std::isnan(job.residual) || std::isnan(job.shrink)) return false;
  for (int64_t j = 0; j < job.columns; ++j)
    if (job.group_of[j] < 0 || job.group_of[j] >= job.groups) return false;
  return true;
}

}  // namespace

int32_t fw_sweep(const fw_sweep_job* job, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!job || !valid(*job)) return FW_INVALID;
    const SweepTile tile = tile_function();
    parallel_rows(job->rows, kSweepRows, threads, sweep_work_floats(*job) * 4, [&](int64_t first, int64_t last, void* work) {
      tile(*job, first, last, static_cast<float*>(work));
    });
    return FW_OK;
  });
}
