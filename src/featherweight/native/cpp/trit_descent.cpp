#include "trit_descent.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace {

constexpr int64_t kRowsAtATime = 16;

DescentRow row_function() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return descent_row_avx512;
  if (std::strcmp(fw_isa(), "avx2") == 0) return descent_row_avx2;
#endif
  return descent_row_baseline;
}

bool valid(const fw_descent_job& job) {
  if (!job.gram || !job.levels || !job.group_of || !job.indices || !job.gradient || !job.decrease || !job.changes)
    return false;
  if (job.columns < 1 || job.groups < 1 || job.level_count < 1 || job.level_count > 256) return false;
  if (!fair_size(job.rows, job.columns) || !fair_size(job.columns, job.columns)) return false;
  if (job.groups > kLargestSize / 256 || !fair_size(job.rows, job.groups * job.level_count)) return false;
  for (int64_t j = 0; j < job.columns; ++j)
    if (job.group_of[j] < 0 || job.group_of[j] >= job.groups) return false;
  for (int64_t i = 0; i < job.rows * job.columns; ++i)
    if (job.indices[i] >= job.level_count) return false;
  return job.rounds >= 0;
}

}  // namespace

int32_t fw_descent(const fw_descent_job* job, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!job || !valid(*job)) return FW_INVALID;
    const DescentRow descend = row_function();
    parallel_rows(job->rows, kRowsAtATime, threads, descent_work_doubles(*job) * 8, [&](int64_t first, int64_t last, void* work) {
      for (int64_t row = first; row < last; ++row) descend(*job, row, static_cast<double*>(work));
    });
    return FW_OK;
  });
}
