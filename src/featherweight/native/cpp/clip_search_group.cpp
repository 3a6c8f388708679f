// Compiled once for every instruction set, with FW_ISA naming it. Sixteen partial sums whatever the width of a register,
// so that all give the same bits. Only code with internal linkage.
#include "clip_search.h"
#include "simd.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(clip_group_, isa)

namespace {

typedef float Float __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Word __attribute__((vector_size(kWidth * 4)));

constexpr int kParts = static_cast<int>(kClipLanes) / kWidth;
constexpr float kToInteger = 12582912.0F;  // 1.5 * 2^23: adding and subtracting it rounds, half to even
constexpr float kSmallest = 1.17549435e-38F;
constexpr int32_t kRootHalf = 0x3f3504f3;  // the bits of sqrt(1/2)

inline Float converted(Int a) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtepi32_ps((__m512i)a);
#else
  return __builtin_convertvector(a, Float);
#endif
}

// GCC 12 makes two instructions of `a > b ? a : b` without the intrinsics, which mean the same, also for a NaN.
inline Float larger(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Float smaller(Float a, Float b) {
#if defined(__AVX512F__)
  return (Float)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Float)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// x^(1 + extra) for x >= 0: x times 2^(extra log2 x), the logarithm and the power as polynomials.
inline __attribute__((always_inline)) Float raised(Float x, float extra) {
  const Int bits = (Int)x;
  const Int exponent = (bits - kRootHalf) >> 23;
  const Float m = (Float)(bits - (exponent << 23)) - 1.0F;
  Float log = m * 0.170656979F + -0.272686452F;
  log = log * m + 0.297250807F;
  log = log * m + -0.358963221F;
  log = log * m + 0.480466217F;
  log = log * m + -0.721375823F;
  log = log * m + 1.44269967F;
  log = log * m + converted(exponent);
  const Float power = log * extra;
  const Float clamped = larger(power, Float{} - 126.0F);
  const Float shifted = clamped + kToInteger;
  const Float rest = clamped - (shifted - kToInteger);
  Float two = rest * 0.00132764666F + 0.00967554189F;
  two = two * rest + 0.0555071346F;
  two = two * rest + 0.240221202F;
  two = two * rest + 0.693146944F;
  two = two * rest + 1.00000012F;
  return x * (Float)((Word)two + ((Word)shifted << 23));  // the integer lies in the lowest bits of `shifted`
}

struct Grid {
  float inverse, step, lowest, highest;
};

// The sum of all lanes, by halves.
inline float summed(const Float* sums) {
  float lanes[kClipLanes];
  for (int part = 0; part < kParts; ++part) store(lanes + part * kWidth, sums[part]);
  for (int i = 0; i < 8; ++i) lanes[i] += lanes[i + 8];
  for (int i = 0; i < 4; ++i) lanes[i] += lanes[i + 4];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

template <bool kSquared, bool kCounted>
float error_of(const float* v, const float* counted, int64_t padded, const Grid& grid, float extra) {
  Float sums[kParts] = {};
  const Float zero = {};
  const Float lowest = zero + grid.lowest, highest = zero + grid.highest;
  for (int64_t i = 0; i < padded; i += kClipLanes)
    for (int part = 0; part < kParts; ++part) {
      const Float value = load<Float>(v + i + part * kWidth);
      Float steps = smaller(larger(value * grid.inverse, lowest), highest);
      steps = (steps + kToInteger) - kToInteger;
      const Float missed = value - steps * grid.step;
      Float error = missed * missed;
      if (!kSquared) error = raised(error, extra);
      if (kCounted) error = error * load<Float>(counted + i + part * kWidth);
      sums[part] += error;
    }
  return summed(sums);
}

template <bool kSquared, bool kCounted>
int32_t least(const fw_clip_job& job, int64_t group, const float* v, const float* counted, int64_t padded, float unit) {
  const float extra = job.exponent / 2 - 1;
  int32_t chosen = 0;
  float best = 0;
  for (int64_t trial = 0; trial < job.trials; ++trial) {
    const float scale = job.scales[trial * job.groups + group], zero_point = job.zero_points[trial * job.groups + group];
    const Grid grid = {scale > 0 ? unit / scale : 0, scale / unit, -zero_point, job.highest - zero_point};
    const float error = error_of<kSquared, kCounted>(v, counted, padded, grid, extra);
    if (trial > 0 && !(error < best)) continue;
    best = error;
    chosen = static_cast<int32_t>(trial);
  }
  return chosen;
}

}  // namespace

void FW_NAME(FW_ISA)(const fw_clip_job& job, int64_t group, float* work) {
  const int64_t n = job.size, padded = clip_work_floats(job) / 2;
  const float* values = job.values + group * n;
  float* v = work;
  float* counted = work + padded;
  float unit = kSmallest;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float size = values[i] < 0 ? -values[i] : values[i];
    finite = finite && size <= 3.40282347e38F;
    unit = size > unit ? size : unit;
  }
  job.chosen[group] = 0;
  if (!finite) return;
  for (int64_t i = 0; i < padded; ++i) v[i] = i < n ? values[i] / unit : 0;
  const bool squared = job.exponent == 2;
  if (!job.counted) {
    job.chosen[group] = squared ? least<true, false>(job, group, v, counted, padded, unit)
                                : least<false, false>(job, group, v, counted, padded, unit);
    return;
  }
  const float* from = job.counted + group % job.period * n;
  for (int64_t i = 0; i < padded; ++i) counted[i] = i < n ? from[i] : 0;
  job.chosen[group] = squared ? least<true, true>(job, group, v, counted, padded, unit)
                              : least<false, true>(job, group, v, counted, padded, unit);
}
