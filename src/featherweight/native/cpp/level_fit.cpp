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
    const int64_t items = (job->groups + kGroupsAtATime - 1) / kGroupsAtATime;
    const int workers = static_cast<int>(std::min<int64_t>(fair_threads(threads), std::max<int64_t>(items, 1)));
    const LevelFitGroup fit = group_function();
    std::vector<Memory> work(static_cast<size_t>(workers));
    parallel_for(items, workers, [&](int worker, int64_t item) {
      Memory& mine = work[static_cast<size_t>(worker)];
      if (!mine) mine = allocate(level_fit_work_floats(*job) * 4);
      const int64_t last = std::min(job->groups, (item + 1) * kGroupsAtATime);
      for (int64_t group = item * kGroupsAtATime; group < last; ++group) fit(*job, group, static_cast<float*>(mine.get()));
    });
    return FW_OK;
  });
}
