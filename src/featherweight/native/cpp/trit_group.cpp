#include "trit_group.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "trit_algebra.h"

namespace {

constexpr int kSweepSteps = 65;
constexpr int kPower[4] = {1, 3, 9, 27};

// Work space of one group, cut from one block. Trits are kept as joint codes.
struct Work {
  double* values;
  double* rest;
  uint8_t* current;
  uint8_t* best;

  Work(void* memory, int64_t n)
      : values(static_cast<double*>(memory)),
        rest(values + n),
        current(reinterpret_cast<uint8_t*>(rest + n)),
        best(current + n) {}
};

template <int K>
void split(int code, int* trits) {
  for (int k = K - 1; k >= 0; --k, code /= 3) trits[k] = code % 3 - 1;
}

template <int K>
int join(const int* trits) {
  int code = 0;
  for (int k = 0; k < K; ++k) code = 3 * code + trits[k] + 1;
  return code;
}

template <int K>
Normal<K> normal_equations(const double* w, int64_t n, const uint8_t* codes) {
  int64_t counts[27] = {};
  double sums[27] = {};
  for (int64_t i = 0; i < n; ++i) {
    ++counts[codes[i]];
    sums[codes[i]] += w[i];
  }
  Normal<K> normal = {};
  for (int code = 0; code < kPower[K]; ++code) {
    int trits[K];
    split<K>(code, trits);
    for (int k = 0, entry = 0; k < K; ++k) {
      normal.right[k] += trits[k] * sums[code];
      for (int other = k; other < K; ++other, ++entry)
        normal.gram[entry] += static_cast<double>(trits[k] * trits[other] * counts[code]);
    }
  }
  return normal;
}

// Levels and joint codes of all candidates in the order in which ties are resolved.
template <int K>
struct Candidates {
  double level[27];
  uint8_t code[27];

  Candidates(const double* scales, int order) {
    const int digits[2][3] = {{-1, 0, 1}, {0, -1, 1}};
    for (int c = 0; c < kPower[K]; ++c) {
      int trits[K];
      split<K>(c, trits);
      for (int k = 0; k < K; ++k) trits[k] = digits[order][trits[k] + 1];
      level[c] = trits[0] * scales[0];
      for (int k = 1; k < K; ++k) level[c] = level[c] + trits[k] * scales[k];
      code[c] = static_cast<uint8_t>(join<K>(trits));
    }
  }
};

template <int K>
void nearest(const double* w, int64_t n, const double* scales, int order, uint8_t* codes) {
  const Candidates<K> candidates(scales, order);
  for (int64_t i = 0; i < n; ++i) {
    double best = INFINITY;
    uint8_t code = 0;
    for (int c = 0; c < kPower[K]; ++c) {
      const double distance = w[i] - candidates.level[c];
      const double error = distance * distance;
      if (error < best) {
        best = error;
        code = candidates.code[c];
      }
    }
    codes[i] = code;
  }
}

// Iteration 1 of the published start: all scales equal, ties exact.
template <int K>
void closed_form(const double* w, int64_t n, int order, double* scales, uint8_t* codes) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::fabs(w[i]);
  const double a = sum / static_cast<double>(K * n);
  for (int k = 0; k < K; ++k) scales[k] = a;
  for (int64_t i = 0; i < n; ++i) {
    int trits[K];
    for (int k = 0; k < K; ++k) {
      if (order == 0) {
        const double centre = (K - 1 - 2 * k) * a;
        trits[k] = (w[i] > centre + a / 2) - (w[i] <= centre - a / 2);
      } else {
        const double edge = (K - 1 - k + 0.5) * a;
        trits[k] = (w[i] > edge) - (w[i] < -edge);
      }
    }
    codes[i] = static_cast<uint8_t>(join<K>(trits));
  }
}

// Plane by plane the best single ternary plane: of the m largest magnitudes with sum S_m, the m with the largest S_m^2 / m.
template <int K>
void greedy(const double* w, int64_t n, const Work& work, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    work.rest[i] = w[i];
    codes[i] = 0;
  }
  for (int k = 0; k < K; ++k) {
    for (int64_t i = 0; i < n; ++i) work.values[i] = std::fabs(work.rest[i]);
    std::sort(work.values, work.values + n, std::greater<double>());
    double sum = 0, best = -2, scale = 0, least = 0;
    for (int64_t m = 1; m <= n; ++m) {
      sum += work.values[m - 1];
      if (m < n && work.values[m - 1] == work.values[m]) continue;  // equal magnitudes stay together
      const double gain = sum * sum / static_cast<double>(m);
      if (gain > best) {
        best = gain;
        scale = sum / static_cast<double>(m);
        least = work.values[m - 1];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double rest = work.rest[i];
      const int trit = std::fabs(rest) >= least ? (rest > 0) - (rest < 0) : 0;
      codes[i] = static_cast<uint8_t>(3 * codes[i] + trit + 1);
      work.rest[i] = rest - scale * trit;
    }
  }
}

// The loop, from codes after iteration `first - 1`. Returns the steps; codes and scales are those of that step.
template <int K>
int alternate(const double* w, int64_t n, const TritJob& job, int first, double* scales, uint8_t* codes, uint8_t* moving) {
  const Ridge limits = {job.ridge_max, job.condition_threshold};
  double ridge = job.ridge;
  Normal<K> normal = normal_equations<K>(w, n, codes);
  for (int t = first; t <= job.cap; ++t) {
    const double old_ridge = ridge;
    double found[K];
    ridge = guarded<K>(normal.gram, ridge, limits);
    solve_normal<K>(normal, ridge, found);
    double change = 0;
    for (int k = 0; k < K; ++k) {
      change = change + (found[k] - scales[k]) * (found[k] - scales[k]);
      scales[k] = found[k];
    }
    if (t > 1 && change >= job.tolerance_squared) moving[t] = 1;
    nearest<K>(w, n, scales, job.tie_order, codes);
    const Normal<K> next = normal_equations<K>(w, n, codes);
    if (next == normal && ridge == old_ridge) return t;
    normal = next;
  }
  if (job.final_least_squares) {
    ridge = guarded<K>(normal.gram, ridge, limits);
    solve_normal<K>(normal, ridge, scales);
  }
  return job.cap;
}

template <int K>
double squared_error(const double* w, int64_t n, const double* scales, const uint8_t* codes) {
  double error = 0;
  for (int64_t i = 0; i < n; ++i) {
    int trits[K];
    split<K>(codes[i], trits);
    double value = scales[0] * trits[0];
    for (int k = 1; k < K; ++k) value = value + scales[k] * trits[k];
    error += (w[i] - value) * (w[i] - value);
  }
  return error;
}

template <int K>
int solve_free(const double* w, int64_t n, const TritJob& job, void* memory, uint8_t* codes, double* out, uint8_t* moving) {
  const Work work(memory, n);
  double scales[K];
  closed_form<K>(w, n, job.tie_order, scales, work.best);
  int steps = alternate<K>(w, n, job, 2, scales, work.best, moving);
  double energy = 0, error = 0;
  if (job.starts > 1) {
    for (int64_t i = 0; i < n; ++i) energy += w[i] * w[i];
    error = squared_error<K>(w, n, scales, work.best);
  }
  for (int start = 1; start < job.starts; ++start) {
    double other[K] = {};
    if (start == 1)
      greedy<K>(w, n, work, work.current);
    else
      closed_form<K>(w, n, 1 - job.tie_order, other, work.current);
    const int taken = alternate<K>(w, n, job, start == 1 ? 1 : 2, other, work.current, moving);
    const double found = squared_error<K>(w, n, other, work.current);
    if (found < error * kStartMargin - kStartFloor * energy) {
      error = found;
      steps = taken;
      std::copy(other, other + K, scales);
      std::copy(work.current, work.current + n, work.best);
    }
  }
  const Canonical<K> canonical(scales, job.canonical != 0);
  for (int64_t i = 0; i < n; ++i) {
    int trits[K];
    split<K>(work.best[i], trits);
    codes[i] = static_cast<uint8_t>(canonical.code(trits) + (kPower[K] - 1) / 2);
  }
  if (job.canonical)
    canonical.apply(scales, out);
  else
    std::copy(scales, scales + K, out);
  return steps;
}

int tied_code(double w, double scale, int levels) {
  if (!(scale > 0)) return 0;
  const double magnitude = std::fabs(w);
  int code = 0;
  for (int level = 1; level <= levels; ++level) code += magnitude >= (level - 0.5) * scale;
  return w < 0 ? -code : code;
}

void solve_tied(const double* w, int64_t n, int levels, uint8_t* codes, double* out) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(w[i]));
  double best = -1, scale = 0, rounding = 0;
  for (int step = 0; step < kSweepSteps; ++step) {
    const double trial = largest / ((3.25 + step / 32.0) * levels / 4);
    double product = 0;
    int64_t norm = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int code = tied_code(w[i], trial, levels);
      product += code * w[i];
      norm += code * code;
    }
    const double size = static_cast<double>(norm);
    const double gain = norm > 0 ? product * product / size : 0.0;
    if (gain > best) {
      best = gain;
      scale = norm > 0 ? product / size : 0.0;
      rounding = trial;
    }
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(tied_code(w[i], rounding, levels) + levels);
  out[0] = scale;
}

template <int K>
void assign_free(const double* w, int64_t n, const TritJob& job, const double* scales, uint8_t* codes) {
  nearest<K>(w, n, scales, job.tie_order, codes);
  for (int64_t i = 0; i < n; ++i) {
    int trits[K];
    split<K>(codes[i], trits);
    for (int k = 0; k < K; ++k) trits[k] = scales[k] == 0 ? 0 : trits[k];
    codes[i] = static_cast<uint8_t>(join<K>(trits));
  }
}

template <int K>
void greedy_normal(const double* w, int64_t n, void* memory, double* gram, double* right) {
  const Work work(memory, n);
  greedy<K>(w, n, work, work.current);
  const Normal<K> normal = normal_equations<K>(w, n, work.current);
  std::copy(normal.gram, normal.gram + Normal<K>::kGram, gram);
  std::copy(normal.right, normal.right + K, right);
}

}  // namespace

int64_t trit_group_bytes(int64_t n) { return n * static_cast<int64_t>(2 * sizeof(double) + 2); }

int solve_trit_group(const double* w, int64_t n, const TritJob& job, void* work, uint8_t* codes, double* scales,
                     uint8_t* moving) {
  if (job.tied) {
    solve_tied(w, n, (kPower[job.planes] - 1) / 2, codes, scales);
    return 0;
  }
  if (job.planes == 1) return solve_free<1>(w, n, job, work, codes, scales, moving);
  if (job.planes == 2) return solve_free<2>(w, n, job, work, codes, scales, moving);
  return solve_free<3>(w, n, job, work, codes, scales, moving);
}

void assign_trit_group(const double* w, int64_t n, const TritJob& job, const double* scales, uint8_t* codes) {
  if (job.tied) {
    const int levels = (kPower[job.planes] - 1) / 2;
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(tied_code(w[i], scales[0], levels) + levels);
  } else if (job.planes == 1) {
    assign_free<1>(w, n, job, scales, codes);
  } else if (job.planes == 2) {
    assign_free<2>(w, n, job, scales, codes);
  } else {
    assign_free<3>(w, n, job, scales, codes);
  }
}

void greedy_normal_equations(const double* w, int64_t n, int planes, void* work, double* gram, double* right) {
  if (planes == 1) return greedy_normal<1>(w, n, work, gram, right);
  if (planes == 2) return greedy_normal<2>(w, n, work, gram, right);
  greedy_normal<3>(w, n, work, gram, right);
}
