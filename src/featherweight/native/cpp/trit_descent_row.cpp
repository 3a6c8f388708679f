// Compiled once for every instruction set, with FW_ISA naming it. Only code with internal linkage.
#include "trit_descent.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(descent_row_, isa)

namespace {

// A pair must gain this share of its first move's own curvature, so that rounding alone moves nothing.
constexpr double kLeastGain = 1e-10;

struct Row {
  const fw_descent_job& job;
  int64_t n;
  const double* gram;
  uint8_t* index;
  double *g, *q, *up, *down, *curvature;  // up, down: distance to the neighbouring levels, 0 at the ends
  double *levels, *middles;               // [groups][level_count]

  void refresh(int64_t j) {
    const double* own = levels + job.group_of[j] * job.level_count;
    q[j] = own[index[j]];
    up[j] = index[j] + 1 < job.level_count ? own[index[j] + 1] - q[j] : 0.0;
    down[j] = index[j] > 0 ? own[index[j] - 1] - q[j] : 0.0;
  }

  void push(double d, const double* h) {
    for (int64_t k = 0; k < n; ++k) g[k] -= d * h[k];
  }

  int64_t singles(double& decrease) {
    int64_t changes = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double own = curvature[j];
      if (!(own > 0)) continue;
      const double target = q[j] + g[j] / own;
      const double* middle = middles + job.group_of[j] * job.level_count;
      int64_t k = 0;
      for (int64_t l = 0; l + 1 < job.level_count; ++l) k += target > middle[l];
      if (k == index[j]) continue;
      const double d = levels[job.group_of[j] * job.level_count + k] - q[j];
      const double gain = d * (2 * g[j] - d * own);
      if (!(gain > 0)) continue;
      push(d, gram + j * n);
      index[j] = static_cast<uint8_t>(k);
      refresh(j);
      decrease += gain;
      ++changes;
    }
    return changes;
  }

  // The best answer of any other weight to a move d of weight i: its change of the objective.
  double best_answer(double d, const double* h) const {
    double best = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double gj = g[j] - d * h[j];
      const double u = up[j] * (up[j] * curvature[j] - 2 * gj);
      const double v = down[j] * (down[j] * curvature[j] - 2 * gj);
      const double e = u < v ? u : v;
      best = e < best ? e : best;
    }
    return best;
  }

  int64_t pairs(double& decrease) {
    int64_t changes = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(curvature[i] > 0)) continue;
      const double upwards = up[i] * (up[i] * curvature[i] - 2 * g[i]);
      const double downwards = down[i] * (down[i] * curvature[i] - 2 * g[i]);
      const bool falls = up[i] == 0 || (down[i] != 0 && downwards < upwards);
      const double d = falls ? down[i] : up[i];
      if (d == 0) continue;
      const double* h = gram + i * n;
      const double kept_up = up[i], kept_down = down[i];
      up[i] = down[i] = 0;  // not its own answer
      const double best = best_answer(d, h);
      const double change = (falls ? downwards : upwards) + best;
      up[i] = kept_up, down[i] = kept_down;
      if (!(best < 0) || !(change < -kLeastGain * (d * d * curvature[i]))) continue;
      for (int64_t j = 0; j < n; ++j) {
        if (j == i) continue;
        const double gj = g[j] - d * h[j];
        const bool rises = up[j] * (up[j] * curvature[j] - 2 * gj) == best;
        if (!rises && down[j] * (down[j] * curvature[j] - 2 * gj) != best) continue;
        const double dj = rises ? up[j] : down[j];
        push(d, h);
        push(dj, gram + j * n);
        index[i] = static_cast<uint8_t>(falls ? index[i] - 1 : index[i] + 1);
        index[j] = static_cast<uint8_t>(rises ? index[j] + 1 : index[j] - 1);
        refresh(i);
        refresh(j);
        decrease -= change;
        ++changes;
        break;
      }
    }
    return changes;
  }
};

}  // namespace

void FW_NAME(FW_ISA)(const fw_descent_job& job, int64_t r, double* work) {
  const int64_t n = job.columns, count = job.groups * job.level_count;
  double* const curvature = work + 3 * n;
  double* const levels = work + 4 * n;
  Row row{job, n, job.gram, job.indices + r * n, job.gradient + r * n, work, work + n, work + 2 * n, curvature,
          levels, levels + count};
  for (int64_t i = 0; i < count; ++i) levels[i] = job.levels[r * count + i];
  for (int64_t i = 0; i + 1 < count; ++i) row.middles[i] = (levels[i] + levels[i + 1]) / 2;
  for (int64_t j = 0; j < n; ++j) {
    curvature[j] = job.gram[j * n + j];
    row.refresh(j);
  }
  double decrease = 0;
  int64_t total = 0;
  for (int32_t round = 0; round < job.rounds; ++round) {
    int64_t changes = row.singles(decrease);
    if (job.pairs) changes += row.pairs(decrease);
    total += changes;
    if (!changes) break;
  }
  job.decrease[r] = decrease;
  job.changes[r] = total;
}
