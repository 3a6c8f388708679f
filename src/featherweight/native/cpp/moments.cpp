#include "moments.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "product.h"

namespace {

constexpr int64_t kColumnStrips = 12;  // packed, they stay in the second cache while the rows go by

const MomentKernels* kernels_in_use() {
#if defined(FW_AMX)
  if (std::strcmp(fw_product_isa(), "amx") == 0) return moment_kernels_amx();
#endif
#if defined(FW_AVX512BF16)
  if (std::strcmp(fw_product_isa(), "bf16") == 0) return moment_kernels_bf16();
#endif
  return nullptr;
}

bool valid(const fw_moment_job& job) {
  if (!job.left || !job.right || !job.sums || !job.work || job.tokens < 0 || job.rows < 1 || job.columns < 1) return false;
  if (!fair_size(job.rows, job.columns) || job.rows > kLargestSize || job.columns > kLargestSize) return false;
  if (!fair_matrix(job.tokens, job.left_stride, job.rows) || !fair_matrix(job.tokens, job.right_stride, job.columns)) return false;
  if (!fair_matrix(job.rows, job.sums_stride, job.columns)) return false;
  return job.work_bytes >= moment_work_bytes(job.rows, job.columns);
}

struct Pass {  // some tokens of a job
  const fw_moment_job& job;
  const MomentKernels& kernels;
  uint32_t* packed;
  int64_t first, tokens;

  int64_t left_strips() const { return moment_strips(job.rows); }
  int64_t right_strips() const { return moment_strips(job.columns); }

  void pack(int64_t strip) const {
    const bool left = strip < left_strips();
    const int64_t column = (left ? strip : strip - left_strips()) * kStrip, stride = left ? job.left_stride : job.right_stride;
    const auto* values = static_cast<const uint16_t*>(left ? job.left : job.right);
    kernels.pack({values + first * stride + column, stride, tokens, (left ? job.rows : job.columns) - column, left,
                  packed + strip * kStripWords});
  }

  // One strip of rows with some strips of columns.
  void add(int64_t row, int64_t begin, int64_t end) const {
    kernels.begin();
    for (int64_t column = job.above ? std::max(begin, row) : begin; column < end; ++column) {
      const int64_t r = row * kStrip, c = column * kStrip;
      kernels.add({packed + row * kStripWords, packed + (left_strips() + column) * kStripWords,
                   (tokens + kBlockTokens - 1) / kBlockTokens, job.sums + r * job.sums_stride + c, job.sums_stride,
                   std::min(kStrip, job.rows - r), std::min(kStrip, job.columns - c), first == 0 ? job.kept : 1.0F, job.added});
    }
    kernels.end();
  }
};

void add_tokens(const Pass& pass, int threads) {
  const int64_t rows = pass.left_strips(), columns = pass.right_strips();
  parallel_for(rows + columns, threads, [&](int, int64_t strip) { pass.pack(strip); });
  const int64_t parts = (columns + kColumnStrips - 1) / kColumnStrips;
  parallel_for(parts * rows, threads, [&](int, int64_t item) {
    const int64_t begin = item / rows * kColumnStrips;
    pass.add(item % rows, begin, std::min(columns, begin + kColumnStrips));
  });
}

}  // namespace

int32_t fw_moment(const fw_moment_job* job, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    const MomentKernels* kernels = kernels_in_use();
    if (!job || !kernels || !valid(*job)) return FW_INVALID;
    auto* packed = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(job->work) + 63) / 64 * 64);
    for (int64_t first = 0; first < job->tokens; first += kMomentTokens)
      add_tokens({*job, *kernels, packed, first, std::min(kMomentTokens, job->tokens - first)}, fair_threads(threads));
    return FW_OK;
  });
}
