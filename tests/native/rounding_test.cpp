// What rounds weights to levels, without Python, to be run under the sanitizers: sweeps, descents and searches of ranges give
// the same with every instruction set and number of threads. Prints what failed and returns 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "clip_search.h"
#include "featherweight.h"
#include "library_checks.h"
#include "sweep.h"
#include "sweep_rows.h"
#include "trit_descent.h"

namespace {

// Levels of a group, ascending: [rows, groups, count].
std::vector<float> random_levels(Random& random, int64_t rows, int64_t groups, int64_t count) {
  std::vector<float> levels(static_cast<size_t>(rows * groups * count));
  for (size_t i = 0; i < levels.size(); i += static_cast<size_t>(count)) {
    float level = -2;
    for (size_t k = 0; k < static_cast<size_t>(count); ++k) levels[i + k] = level += static_cast<float>(random.uniform());
  }
  return levels;
}

std::vector<int32_t> groups_of(int64_t columns, int64_t size) {
  std::vector<int32_t> groups(static_cast<size_t>(columns));
  for (size_t j = 0; j < groups.size(); ++j) groups[j] = static_cast<int32_t>(static_cast<int64_t>(j) / size);
  return groups;
}

// Symmetric with a heavy diagonal.
template <typename T>
std::vector<T> random_gram(Random& random, int64_t n) {
  std::vector<T> gram(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j)
      gram[static_cast<size_t>(i * n + j)] = gram[static_cast<size_t>(j * n + i)] =
          static_cast<T>(i == j ? 1 + random.uniform() : 0.2 * random.bell() / std::sqrt(static_cast<double>(n)));
  return gram;
}

struct Swept {
  std::vector<float> weight, errors, residuals, tail_errors, tail_residuals, drift;
  std::vector<uint8_t> indices;
  std::vector<double> loss;
  std::vector<int64_t> clipped;
  int32_t status = FW_INVALID;

  bool operator==(const Swept& other) const {
    return status == other.status && weight == other.weight && errors == other.errors && residuals == other.residuals &&
           tail_errors == other.tail_errors && tail_residuals == other.tail_residuals && drift == other.drift &&
           indices == other.indices && loss == other.loss && clipped == other.clipped;
  }
};

void test_sweep() {
  Random random;
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {37, 50, 16, 8}, {64, 33, 128, 3}, {130, 20, 7, 256}, {65, 9, 1, 2}};
  for (const auto& shape : shapes) {
    const int64_t rows = shape[0], columns = shape[1], count = shape[3], stride = columns + 3;
    const std::vector<int32_t> group_of = groups_of(columns, shape[2]);
    const int64_t groups = group_of.back() + 1;
    const std::vector<float> levels = random_levels(random, rows, groups, count), upper = random_gram<float>(random, columns),
                             feedback = random_gram<float>(random, columns);
    std::vector<float> weight(static_cast<size_t>(rows * stride)), original(static_cast<size_t>(rows * columns));
    for (float& w : weight) w = static_cast<float>(random.bell());
    for (float& w : original) w = static_cast<float>(random.bell());
    for (int crossed = 0; crossed < 2; ++crossed)
      for (int tail = 0; tail < 3; ++tail) {
        const auto run = [&](int threads) {
          Swept result;
          const auto size = original.size(), per_row = static_cast<size_t>(rows);
          result.weight = weight;
          result.errors.resize(size);
          result.indices.resize(size);
          if (crossed) result.residuals.resize(size);
          if (tail) result.tail_errors.resize(size);
          if (tail && crossed) result.tail_residuals.resize(size);
          result.loss.resize(per_row);
          result.clipped.resize(per_row);
          result.drift.resize(per_row);
          const auto place = [](std::vector<float>& values) { return values.empty() ? nullptr : values.data(); };
          const fw_sweep_job job = {result.weight.data(), original.data(), upper.data(), crossed ? feedback.data() : nullptr,
                                    levels.data(), group_of.data(), result.indices.data(), result.errors.data(),
                                    place(result.residuals), place(result.tail_errors), place(result.tail_residuals),
                                    result.loss.data(), result.clipped.data(), result.drift.data(), rows, columns, groups,
                                    count, stride, columns, columns, columns, 0.25F, 0.25F, 0.1F, tail == 1, tail};
          result.status = fw_sweep(&job, threads);
          return result;
        };
        fw_select_isa("baseline");
        const Swept expected = run(1);
        expect(expected.status == FW_OK, "sweep succeeds");
        for (uint8_t index : expected.indices) expect(index < count, "levels exist");
        for (const char* isa : {"baseline", "avx2", "avx512"})
          if (fw_select_isa(isa) == FW_OK) expect(run(3) == expected, "same sweep for all threads and instructions");
      }
  }
}

void test_sweep_rows() {
  Random random;
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {37, 50, 16, 8}, {64, 33, 128, 3}, {30, 20, 7, 256}};
  for (const auto& shape : shapes) {
    const int64_t rows = shape[0], columns = shape[1], count = shape[3], stride = columns + 3;
    const std::vector<int32_t> group_of = groups_of(columns, shape[2]);
    const int64_t groups = group_of.back() + 1;
    const std::vector<float> levels = random_levels(random, rows, groups, count), upper = random_gram<float>(random, columns),
                             between = random_gram<float>(random, rows);
    std::vector<float> weight(static_cast<size_t>(rows * stride)), target(static_cast<size_t>(rows * columns));
    for (float& w : weight) w = static_cast<float>(random.bell());
    for (float& w : target) w = static_cast<float>(random.bell());
    const auto run = [&]() {
      Swept result;
      const auto size = target.size(), per_row = static_cast<size_t>(rows);
      result.weight = weight;
      result.residuals = target;
      result.errors.resize(size);
      result.tail_errors.resize(size);
      result.indices.resize(size);
      result.loss.resize(per_row);
      result.clipped.resize(per_row);
      result.drift.resize(per_row);
      const fw_sweep_rows_job job = {result.weight.data(), result.residuals.data(), upper.data(), between.data(), levels.data(),
                                     group_of.data(), result.indices.data(), result.errors.data(), result.tail_errors.data(),
                                     result.loss.data(), result.clipped.data(), result.drift.data(), rows, columns, groups,
                                     count, stride, columns, columns, rows};
      result.status = fw_sweep_rows(&job, 1);
      return result;
    };
    fw_select_isa("baseline");
    const Swept expected = run();
    expect(expected.status == FW_OK, "sweep by rows succeeds");
    for (uint8_t index : expected.indices) expect(index < count, "levels exist");
    for (const char* isa : {"avx2", "avx512"})
      if (fw_select_isa(isa) == FW_OK) expect(run() == expected, "same sweep by rows for all instructions");
  }
}

void test_clip_search() {
  Random random;
  const int64_t shapes[][3] = {{1, 1, 1}, {37, 2, 16}, {5, 3, 17}, {300, 1, 128}, {9, 4, 100}, {2, 1, 1000}};
  for (const auto& shape : shapes) {
    const int64_t groups = shape[0] * shape[1], size = shape[2], trials = 30;
    std::vector<float> values(static_cast<size_t>(groups * size)), counted(static_cast<size_t>(shape[1] * size)),
        scales(static_cast<size_t>(trials * groups)), zero_points(scales.size(), 4.0F);
    for (float& value : values) value = static_cast<float>(random.bell());
    for (float& value : counted) value = static_cast<float>(random.uniform());
    for (float& value : scales) value = static_cast<float>(random.uniform());
    for (int64_t i = 0; i < size; ++i) values[static_cast<size_t>(i)] = 0;
    scales[0] = 0;
    for (const float exponent : {2.0F, 2.4F, 0.5F, 8.0F})
      for (int weighted = 0; weighted < 2; ++weighted) {
        const auto run = [&](int threads) {
          std::vector<int32_t> chosen(static_cast<size_t>(groups), -1);
          const fw_clip_job job = {values.data(), weighted ? counted.data() : nullptr, scales.data(), zero_points.data(),
                                   chosen.data(), groups, size, shape[1], trials, 7, exponent};
          expect(fw_clip_search(&job, threads) == FW_OK, "clip search succeeds");
          return chosen;
        };
        fw_select_isa("baseline");
        const std::vector<int32_t> expected = run(1);
        for (const char* isa : {"baseline", "avx2", "avx512"})
          if (fw_select_isa(isa) == FW_OK) expect(run(3) == expected, "same choice for all threads and instructions");
        const auto error = [&](int64_t group, int32_t trial) {
          const auto at = static_cast<size_t>(trial * groups + group);
          const double scale = static_cast<double>(scales[at]);
          double sum = 0;
          for (int64_t i = 0; i < size; ++i) {
            const double value = static_cast<double>(values[static_cast<size_t>(group * size + i)]);
            const double steps = scale > 0 ? std::fmin(std::fmax(std::nearbyint(value / scale), -4.0), 3.0) : 0;
            const double missed = std::pow(std::fabs(value - steps * scale), static_cast<double>(exponent));
            sum += weighted ? missed * static_cast<double>(counted[static_cast<size_t>(group % shape[1] * size + i)]) : missed;
          }
          return sum;
        };
        for (int64_t group = 0; group < groups; ++group) {
          const double found = error(group, expected[static_cast<size_t>(group)]);
          for (int32_t trial = 0; trial < trials; ++trial)
            expect(found <= error(group, trial) * (1 + 1e-5) + 1e-3 * (exponent < 1), "no trial has a smaller error");
        }
      }
  }
  fw_clip_job wrong = {};
  expect(fw_clip_search(&wrong, 1) == FW_INVALID && fw_clip_search(nullptr, 1) == FW_INVALID, "an empty job is refused");
}

void test_descent() {
  Random random;
  const int64_t shapes[][4] = {{1, 1, 1, 3}, {19, 30, 16, 9}, {33, 17, 100, 3}, {5, 8, 1, 27}};
  for (const auto& shape : shapes) {
    const int64_t rows = shape[0], columns = shape[1], count = shape[3];
    const std::vector<int32_t> group_of = groups_of(columns, shape[2]);
    const int64_t groups = group_of.back() + 1;
    const std::vector<float> levels = random_levels(random, rows, groups, count);
    const std::vector<double> gram = random_gram<double>(random, columns);
    std::vector<double> start(static_cast<size_t>(rows * columns));
    for (double& g : start) g = random.bell();
    for (int pairs = 0; pairs < 2; ++pairs) {
      struct Found {
        std::vector<uint8_t> indices;
        std::vector<double> gradient, decrease;
        std::vector<int64_t> changes;
        bool operator==(const Found& other) const {
          return indices == other.indices && gradient == other.gradient && decrease == other.decrease &&
                 changes == other.changes;
        }
      };
      const auto run = [&](int threads) {
        Found found = {std::vector<uint8_t>(start.size()), start, std::vector<double>(static_cast<size_t>(rows)),
                       std::vector<int64_t>(static_cast<size_t>(rows))};
        const fw_descent_job job = {gram.data(), levels.data(), group_of.data(), found.indices.data(), found.gradient.data(),
                                    found.decrease.data(), found.changes.data(), rows, columns, groups, count, 4, pairs};
        expect(fw_descent(&job, threads) == FW_OK, "descent succeeds");
        return found;
      };
      fw_select_isa("baseline");
      const Found expected = run(1);
      for (double decrease : expected.decrease) expect(decrease >= 0, "the objective does not rise");
      for (const char* isa : {"baseline", "avx2", "avx512"})
        if (fw_select_isa(isa) == FW_OK) expect(run(3) == expected, "same descent for all threads and instructions");
    }
  }
}

}  // namespace

int main() {
  test_sweep();
  test_sweep_rows();
  test_clip_search();
  test_descent();
  if (failures == 0) std::printf("all tests of rounding passed\n");
  return failures == 0 ? 0 : 1;
}
