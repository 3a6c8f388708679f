#include "level_fit.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace {

constexpr int64_t kGroupsAtATime = 64;

LevelFitGroup group_function() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return level_fit_group_avx512;
  if (std::strcmp(fw_isa(), "avx2") == 0) return level_fit_group_avx2;
#endif
  return level_fit_group_baseline;
}

bool valid(const fw_level_fit_job& job) {
  if (!job.values || !job.counted || !job.levels || !job.scales || !job.errors) return false;
  if (job.size < 1 || job.period < 1 || job.level_count < 2 || job.level_count > 256) return false;
  if (!fair_size(job.groups, job.size) || !fair_size(job.period, job.size)) return false;
  return job.rounds >= 0;
}

}  // namespace

int32_t fw_level_fit(const fw_level_fit_job* job, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!job || !valid(*job)) return FW_INVALID;
    const LevelFitGroup fit = group_function();
    parallel_rows(job->groups, kGroupsAtATime, threads, level_fit_work_floats(*job) * 4, [&](int64_t first, int64_t last, void* work) {
      for (int64_t group = first; group < last; ++group) fit(*job, group, static_cast<float*>(work));
    });
    return FW_OK;
  });
}
