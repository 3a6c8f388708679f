// Second moments by AVX512-BF16: sums of eight rows by 32 columns in registers, a pair of tokens a step.
#include "moments_lanes.h"

namespace {

constexpr int64_t kRows = 8;

void nothing() {}

void add(const MomentBlock& b) {
  for (int64_t first = 0; first < b.rows; first += kRows) {
    __m512 sums[kRows][2];
    for (int64_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    const uint32_t* left = b.left + first / kHalf * (kBlockWords / 2) + first % kHalf * 16;
    for (int64_t i = 0; i < b.blocks; ++i, left += kBlockWords) {
      const uint32_t* right = b.right + i * kBlockWords;
      for (int64_t pair = 0; pair < 16; ++pair) {
        const auto low = reinterpret_cast<__m512bh>(_mm512_load_si512(right + 16 * pair));
        const auto high = reinterpret_cast<__m512bh>(_mm512_load_si512(right + kBlockWords / 2 + 16 * pair));
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r) {
          const auto one = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(left[16 * r + pair])));
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], one, low);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], one, high);
        }
      }
    }
    for (int64_t r = 0; r < kRows && first + r < b.rows; ++r) {
      add_sums(b, first + r, 0, sums[r][0]);
      if (b.columns > kHalf) add_sums(b, first + r, kHalf, sums[r][1]);
    }
  }
}

}  // namespace

const MomentKernels* moment_kernels_bf16() {
  static const MomentKernels kernels = {nothing, pack_strip, add, nothing};
  return &kernels;
}
