#include "clip_search.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace {

constexpr int64_t kGroupsAtATime = 256;

ClipGroup group_function() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return clip_group_avx512;
  if (std::strcmp(fw_isa(), "avx2") == 0) return clip_group_avx2;
#endif
  return clip_group_baseline;
}

bool valid(const fw_clip_job& job) {
  if (!job.values || !job.scales || !job.zero_points || !job.chosen) return false;
  if (job.size < 1 || job.period < 1 || job.trials < 1 || job.trials > INT32_MAX) return false;
  if (!fair_size(job.groups, job.size) || !fair_size(job.period, job.size) || !fair_size(job.trials, job.groups)) return false;
  return job.highest >= 1 && job.highest <= 255 && job.exponent > 0 && job.exponent <= 8;
}

}  // namespace

int32_t fw_clip_search(const fw_clip_job* job, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!job || !valid(*job)) return FW_INVALID;
    const ClipGroup search = group_function();
    parallel_rows(job->groups, kGroupsAtATime, threads, clip_work_floats(*job) * 4, [&](int64_t first, int64_t last, void* work) {
      for (int64_t group = first; group < last; ++group) search(*job, group, static_cast<float*>(work));
    });
    return FW_OK;
  });
}
