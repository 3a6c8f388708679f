#include "sweep_rows.h"

#include <cstring>
#include <vector>

#include "parallel.h"

namespace {

SweepRows rows_function() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return sweep_rows_avx512;
  if (std::strcmp(fw_isa(), "avx2") == 0) return sweep_rows_avx2;
#endif
  return sweep_rows_baseline;
}

bool valid(const fw_sweep_rows_job& job) {
  if (!job.weight || !job.target || !job.upper || !job.between || !job.levels || !job.group_of) return false;
  if (!job.indices || !job.errors || !job.row_errors || !job.loss || !job.clipped || !job.drift) return false;
  if (job.columns < 1 || job.level_count < 1 || job.level_count > 256 || job.groups < 1) return false;
  for (const int64_t stride : {job.weight_stride, job.target_stride})
    if (!fair_matrix(job.rows, stride, job.columns)) return false;
  if (!fair_size(job.rows, job.columns) || !fair_matrix(job.columns, job.upper_stride, job.columns)) return false;
  if (!fair_matrix(job.rows, job.between_stride, job.rows)) return false;
  if (job.groups > kLargestSize / 256 || !fair_size(job.rows, job.groups * job.level_count)) return false;
  for (int64_t j = 0; j < job.columns; ++j)
    if (job.group_of[j] < 0 || job.group_of[j] >= job.groups) return false;
  return true;
}

}  // namespace

int32_t fw_sweep_rows(const fw_sweep_rows_job* job, int32_t threads) {
  static_cast<void>(threads);
  return guarded_call([&]() -> int32_t {
    if (!job || !valid(*job)) return FW_INVALID;
    std::vector<float> middles(static_cast<size_t>(job->level_count));
    rows_function()(*job, middles.data());
    return FW_OK;
  });
}
