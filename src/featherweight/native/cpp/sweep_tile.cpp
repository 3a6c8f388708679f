// Compiled once for every instruction set, with FW_ISA naming it. A tile of kSweepRows rows lies transposed in the work
// space, so that rows are the lanes of all loops; no operation mixes rows. Only code with internal linkage.
#include "sweep.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(sweep_tile_, isa)

namespace {

constexpr int64_t R = kSweepRows;

struct Tile {
  float *w, *w0;           // [columns][R]
  float *levels, *middles; // [L][R]
  float *low, *high;       // [R] the range, with half a step on either side
  float *bottom, *top;     // [R] the extreme levels
  float *q, *e, *r, *te, *tr, *instead;
};

Tile carve(const fw_sweep_job& job, float* work) {
  Tile t;
  float** const rows[] = {&t.low, &t.high, &t.bottom, &t.top, &t.q, &t.e, &t.r, &t.te, &t.tr, &t.instead};
  for (float** row : rows) *row = work, work += R;
  t.w = work;
  t.w0 = t.w + job.columns * R;
  t.levels = t.w0 + job.columns * R;
  t.middles = t.levels + job.level_count * R;
  return t;
}

// Rows [count][n] to columns [n][R]; lanes without a row repeat the last one.
void transpose(const float* from, int64_t stride, int64_t count, int64_t n, float* to) {
  constexpr int64_t kRows = 16;
  for (int64_t i = 0; i < R; i += kRows) {
    const float* rows[kRows];
    for (int64_t k = 0; k < kRows; ++k) {
      rows[k] = from + (i + k < count ? i + k : count - 1) * stride;
      for (int64_t j = 0; j < n; j += 16) __builtin_prefetch(rows[k] + j);
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t k = 0; k < kRows; ++k) to[j * R + i + k] = rows[k][j];
  }
}

void load_group(const fw_sweep_job& job, int64_t first, int64_t count, int64_t group, const Tile& t) {
  const int64_t L = job.level_count;
  for (int64_t i = 0; i < R; ++i) {  // lanes without a row repeat the last one
    const int64_t row = first + (i < count ? i : count - 1);
    const float* from = job.levels + (row * job.groups + group) * L;
    for (int64_t k = 0; k < L; ++k) t.levels[k * R + i] = from[k];
  }
  for (int64_t k = 0; k + 1 < L; ++k)
    for (int64_t i = 0; i < R; ++i) t.middles[k * R + i] = (t.levels[(k + 1) * R + i] + t.levels[k * R + i]) / 2;
  const float* bottom = t.levels;
  const float* top = t.levels + (L - 1) * R;
  const float* second = L > 1 ? bottom + R : bottom;
  const float* second_last = L > 1 ? top - R : top;
  for (int64_t i = 0; i < R; ++i) {
    t.bottom[i] = bottom[i];
    t.top[i] = top[i];
    t.low[i] = bottom[i] - (second[i] - bottom[i]) / 2;
    t.high[i] = top[i] + (top[i] - second_last[i]) / 2;
  }
}

void round_column(const fw_sweep_job& job, const Tile& t, const float* __restrict w, int32_t* __restrict index) {
  const int64_t L = job.level_count;
  float* __restrict q = t.q;
  for (int64_t i = 0; i < R; ++i) q[i] = t.levels[i], index[i] = 0;
  for (int64_t k = 0; k + 1 < L; ++k) {
    const float* __restrict middle = t.middles + k * R;
    const float* __restrict level = t.levels + (k + 1) * R;
    for (int64_t i = 0; i < R; ++i) {
      const bool above = w[i] > middle[i];
      q[i] = above ? level[i] : q[i];
      index[i] += above;
    }
  }
}

template <bool kFeedback>
void push(const fw_sweep_job& job, const Tile& t, int64_t j) {
  const float* u = job.upper + j * job.upper_stride;
  const float* p = kFeedback ? job.feedback + j * job.feedback_stride : nullptr;
  const float* __restrict e = t.e;
  const float* __restrict r = t.r;
  for (int64_t k = j + 1; k < job.columns; ++k) {
    float* __restrict w = t.w + k * R;
    const float u_k = u[k], p_k = kFeedback ? p[k] : 0;
    for (int64_t i = 0; i < R; ++i) {
      const float pushed = w[i] - e[i] * u_k;
      w[i] = kFeedback ? pushed + r[i] * p_k : pushed;
    }
  }
}

void pass_on(const fw_sweep_job& job, const Tile& t, int64_t j, const float* __restrict instead, float* __restrict e,
             float* __restrict r) {
  const float* __restrict w = t.w + j * R;
  const float* __restrict w0 = t.w0 + j * R;
  const float* __restrict q = t.q;
  const float pivot = job.upper[j * job.upper_stride + j];
  const float alpha = job.alpha, residual = job.residual, shrink = job.shrink;
  for (int64_t i = 0; i < R; ++i) {
    const float kept = residual * (w0[i] - instead[i]), shrunk = shrink * (w0[i] - w[i]);
    e[i] = (((w[i] - q[i]) + kept) + shrunk) / pivot;
    r[i] = alpha * instead[i] + residual * (w0[i] - instead[i]);
  }
}

void keep(float* to, int64_t first, int64_t count, int64_t columns, int64_t j, const float* from) {
  if (!to) return;
  for (int64_t i = 0; i < count; ++i) to[(first + i) * columns + j] = from[i];
}

// What a tile's rows add up to.
struct Totals {
  double loss[R];
  int32_t clipped[R];
  float drift[R];
};

void sum_up(const fw_sweep_job& job, const Tile& t, int64_t j, Totals& totals) {
  const float* __restrict w = t.w + j * R;
  const float* __restrict w0 = t.w0 + j * R;
  const float* __restrict q = t.q;
  const float* __restrict low = t.low;
  const float* __restrict high = t.high;
  const float pivot = job.upper[j * job.upper_stride + j];
  for (int64_t i = 0; i < R; ++i) {
    const float missed = (w[i] - q[i]) / pivot;
    totals.loss[i] += static_cast<double>(missed) * static_cast<double>(missed);
  }
  for (int64_t i = 0; i < R; ++i) {
    totals.clipped[i] += (w[i] < low[i]) | (w[i] > high[i]);
    const float difference = w[i] - w0[i];
    const float far = difference < 0 ? -difference : difference;
    totals.drift[i] = far > totals.drift[i] ? far : totals.drift[i];
  }
}

}  // namespace

void FW_NAME(FW_ISA)(const fw_sweep_job& job, int64_t first, int64_t last, float* work) {
  const Tile t = carve(job, work);
  const int64_t n = job.columns, count = last - first;
  transpose(job.weight + first * job.weight_stride, job.weight_stride, count, n, t.w);
  transpose(job.original + first * job.original_stride, job.original_stride, count, n, t.w0);
  Totals totals = {};
  int32_t group = -1;
  int32_t index[R];
  for (int64_t j = 0; j < n; ++j) {
    if (job.group_of[j] != group) load_group(job, first, count, group = job.group_of[j], t);
    float* w = t.w + j * R;
    const float* w0 = t.w0 + j * R;
    if (job.pull_back)
      for (int64_t i = 0; i < R; ++i) w[i] -= job.shrink * (w[i] - w0[i]);
    round_column(job, t, w, index);
    pass_on(job, t, j, w, t.e, t.r);
    job.feedback ? push<true>(job, t, j) : push<false>(job, t, j);
    for (int64_t i = 0; i < count; ++i) job.indices[(first + i) * n + j] = static_cast<uint8_t>(index[i]);
    keep(job.errors, first, count, n, j, t.e);
    keep(job.residuals, first, count, n, j, t.r);
    if (job.tail) {
      for (int64_t i = 0; i < R; ++i) {
        const float raised = w[i] > t.bottom[i] ? w[i] : t.bottom[i];
        t.instead[i] = job.tail == 1 ? t.q[i] : (raised < t.top[i] ? raised : t.top[i]);
      }
      pass_on(job, t, j, t.instead, t.te, t.tr);
      keep(job.tail_errors, first, count, n, j, t.te);
      keep(job.tail_residuals, first, count, n, j, t.tr);
    }
    sum_up(job, t, j, totals);
  }
  for (int64_t i = 0; i < count; ++i) {
    job.loss[first + i] = totals.loss[i];
    job.clipped[first + i] = totals.clipped[i];
    job.drift[first + i] = totals.drift[i];
    for (int64_t j = 0; j < n; ++j) job.weight[(first + i) * job.weight_stride + j] = t.w[j * R + i];
  }
}
