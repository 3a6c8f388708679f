// The native library without Python, to be run under the sanitizers: every instruction set, shapes with short groups, ties,
// refusals. Prints what failed and returns 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "clip_search.h"
#include "featherweight.h"
#include "sweep.h"
#include "sweep_rows.h"
#include "trit_descent.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED (%s): %s\n", fw_isa(), what);
}

// A small generator of its own: the same numbers everywhere.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15U;

  double uniform() {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
  double bell() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

struct Result {
  std::vector<uint8_t> codes, steps, moving;
  std::vector<double> scales;
  int32_t status;
  int64_t bad = -1;

  bool operator==(const Result& other) const {
    return status == other.status && codes == other.codes && steps == other.steps && moving == other.moving &&
           scales == other.scales;
  }
};

fw_trit_settings settings_for(int planes, int64_t group_size, int tied, int order, int starts) {
  return {1e-4, 1e-8, 1.0, 1e12, group_size, planes, tied, order, starts, 0, 1};
}

Result solve(const std::vector<float>& weight, int64_t rows, int64_t cols, const fw_trit_settings& settings, int threads) {
  const int64_t size = settings.group_size < cols ? settings.group_size : cols;
  const auto groups = static_cast<size_t>(rows * ((cols + size - 1) / size));
  Result result;
  result.codes.resize(weight.size());
  result.steps.resize(groups);
  result.moving.resize(51);
  result.scales.resize(groups * static_cast<size_t>(settings.tied ? 1 : settings.planes));
  result.status = fw_solve(weight.data(), FW_FLOAT32, rows, cols, cols, &settings, 50, result.codes.data(),
                           result.scales.data(), result.steps.data(), result.moving.data(), 0, threads, &result.bad);
  return result;
}

double relative_error(const std::vector<float>& weight, int64_t cols, const fw_trit_settings& settings, const Result& found) {
  const int64_t size = settings.group_size < cols ? settings.group_size : cols, groups = (cols + size - 1) / size;
  const int power[4] = {1, 3, 9, 27};
  double error = 0, energy = 0;
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / cols, group = row * groups + static_cast<int64_t>(i) % cols / size;
    double value = 0;
    for (int k = 0; k < settings.planes; ++k) {
      const int trit = found.codes[i] / power[settings.planes - 1 - k] % 3 - 1;
      const double scale = settings.tied ? found.scales[static_cast<size_t>(group)] * power[settings.planes - 1 - k]
                                         : found.scales[static_cast<size_t>(group * settings.planes + k)];
      value += scale * trit;
    }
    error += std::pow(static_cast<double>(weight[i]) - value, 2);
    energy += std::pow(static_cast<double>(weight[i]), 2);
  }
  return std::sqrt(error / energy);
}

void test_solver() {
  Random random;
  const int64_t shapes[][3] = {{37, 300, 128}, {5, 64, 16}, {3, 7, 128}, {2, 700, 256}, {1, 1, 1}, {300, 128, 128}};
  for (const auto& shape : shapes) {
    std::vector<float> weight(static_cast<size_t>(shape[0] * shape[1]));
    for (float& w : weight) w = static_cast<float>(random.bell());
    for (int planes = 1; planes <= 3; ++planes)
      for (int tied = 0; tied < (planes > 1 ? 2 : 1); ++tied)
        for (int order = 0; order < 2; ++order)
          for (int starts = 1; starts <= 3; starts += 2) {
            const fw_trit_settings settings = settings_for(planes, shape[2], tied, order, starts);
            fw_select_isa("baseline");
            const Result expected = solve(weight, shape[0], shape[1], settings, 1);
            expect(expected.status == FW_OK, "solve succeeds");
            const double most[4] = {0, 0.6, 0.3, 0.15};
            expect(relative_error(weight, shape[1], settings, expected) < most[planes], "error is small");
            for (const char* isa : {"baseline", "avx2", "avx512"}) {
              if (fw_select_isa(isa) != FW_OK) continue;
              expect(solve(weight, shape[0], shape[1], settings, 3) == expected, "same for all threads and instructions");
            }
          }
  }
}

void test_hard_groups() {
  const int64_t rows = 40, cols = 96;
  Random random;
  std::vector<float> weight(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < weight.size(); ++i) {
    const auto row = i / static_cast<size_t>(cols);
    const float factor = row == 1 ? 1e-38F : row == 2 ? 1e36F : 1.0F;
    weight[i] = row == 0 ? 0.0F : row < 10 ? factor * static_cast<float>(random.bell()) : static_cast<float>(std::floor(random.uniform() * 5) - 2);
  }
  for (int planes = 1; planes <= 3; ++planes) {
    const fw_trit_settings settings = settings_for(planes, 32, 0, 0, 1);
    fw_select_isa("baseline");
    const Result expected = solve(weight, rows, cols, settings, 1);
    for (double scale : expected.scales) expect(std::isfinite(scale) && scale >= 0, "scales are finite");
    for (const char* isa : {"avx2", "avx512"})
      if (fw_select_isa(isa) == FW_OK) expect(solve(weight, rows, cols, settings, 2) == expected, "same for hard groups");
  }
  weight[500] = std::numeric_limits<float>::quiet_NaN();
  weight[900] = std::numeric_limits<float>::infinity();
  const Result refused = solve(weight, rows, cols, settings_for(2, 32, 0, 0, 1), 3);
  expect(refused.status == FW_NON_FINITE && refused.bad == 500, "the first NaN is found");
}

void test_other_types() {
  Random random;
  const int64_t rows = 5, cols = 70;
  std::vector<double> wide(static_cast<size_t>(rows * cols));
  std::vector<uint16_t> narrow(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    wide[i] = random.bell();
    narrow[i] = static_cast<uint16_t>(random.uniform() * 0x4000);  // finite as half and as bfloat16
  }
  const fw_trit_settings settings = settings_for(2, 32, 0, 0, 1);
  std::vector<uint8_t> codes(wide.size()), again(wide.size()), steps(15), moving(51);
  std::vector<double> scales(30);
  int64_t bad = -1;
  for (const int32_t dtype : {FW_BFLOAT16, FW_FLOAT16, FW_FLOAT64}) {
    const void* data = dtype == FW_FLOAT64 ? static_cast<const void*>(wide.data()) : narrow.data();
    expect(fw_solve(data, dtype, rows, cols, cols, &settings, 50, codes.data(), scales.data(), steps.data(), moving.data(), 0,
                    2, &bad) == FW_OK,
           "other types are solved");
    expect(fw_assign(data, dtype, rows, cols, cols, &settings, scales.data(), again.data(), 2) == FW_OK, "assign succeeds");
    expect(codes == again, "the trits are nearest to the scales");
  }
  fw_trit_settings wrong = settings;
  wrong.planes = 4;
  expect(fw_solve(wide.data(), FW_FLOAT64, rows, cols, cols, &wrong, 50, codes.data(), scales.data(), steps.data(),
                  moving.data(), 0, 1, &bad) == FW_INVALID,
         "four planes are refused");
}

void test_packing() {
  Random random;
  for (int64_t count = 0; count < 70; ++count)
    for (const int32_t packing : {FW_BASE3, FW_2BIT}) {
      const int64_t bytes = packing == FW_BASE3 ? (count + 4) / 5 : (count + 3) / 4;
      std::vector<int8_t> trits(static_cast<size_t>(count)), back(trits.size());
      for (int8_t& trit : trits) trit = static_cast<int8_t>(std::floor(random.uniform() * 3) - 1);
      std::vector<uint8_t> packed(static_cast<size_t>(bytes));
      int64_t bad = -1;
      expect(fw_pack_trits(trits.data(), count, packing, packed.data()) == FW_OK, "pack");
      expect(fw_unpack_trits(packed.data(), count, packing, back.data(), &bad) == FW_OK && back == trits, "unpack");
      if (bytes == 0) continue;
      packed.back() = 255;
      expect(fw_unpack_trits(packed.data(), count, packing, back.data(), &bad) == FW_INVALID && bad == bytes - 1, "bad byte");
    }
  for (int32_t bits = 1; bits <= 8; ++bits)
    for (int64_t count = 0; count < 20; ++count) {
      std::vector<uint8_t> values(static_cast<size_t>(count)), back(values.size());
      for (uint8_t& value : values) value = static_cast<uint8_t>(random.uniform() * (1 << bits));
      std::vector<uint8_t> packed(static_cast<size_t>((count * bits + 7) / 8));
      fw_pack_bits(values.data(), count, bits, packed.data());
      fw_unpack_bits(packed.data(), count, bits, back.data());
      expect(back == values, "bits there and back");
    }
}

void test_decode() {
  Random random;
  const int64_t rows = 9, cols = 53, size = 20, groups = 3, planes = 2;
  std::vector<uint8_t> codes(static_cast<size_t>(rows * cols));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.uniform() * 9);
  std::vector<float> scales(static_cast<size_t>(rows * groups * planes)), out(codes.size());
  for (float& scale : scales) scale = static_cast<float>(random.uniform());
  for (const int32_t packing : {FW_BASE3, FW_2BIT}) {
    const int64_t bytes = packing == FW_BASE3 ? (rows * cols + 4) / 5 : (rows * cols + 3) / 4;
    std::vector<uint8_t> packed(static_cast<size_t>(planes * bytes));
    int64_t bad = -1;
    fw_pack_codes(codes.data(), rows * cols, planes, packing, packed.data(), bytes);
    for (const char* isa : {"baseline", "avx2", "avx512"}) {
      if (fw_select_isa(isa) != FW_OK) continue;
      expect(fw_decode(packed.data(), bytes, planes, scales.data(), FW_FLOAT32, 0, rows, cols, size, packing, out.data(), 2,
                       &bad) == FW_OK,
             "decode succeeds");
      bool same = true;
      for (int64_t i = 0; i < rows * cols; ++i) {
        const float* scale = scales.data() + (i / cols * groups + i % cols / size) * planes;
        const int code = codes[static_cast<size_t>(i)];
        const float value = scale[0] * static_cast<float>(code / 3 - 1) + scale[1] * static_cast<float>(code % 3 - 1);
        same = same && value == out[static_cast<size_t>(i)];
      }
      expect(same, "decoded values");
    }
  }
}

void test_squared_errors() {
  Random random;
  const int64_t rows = 5, cols = 37, stride = 41;
  std::vector<float> weight(static_cast<size_t>(rows * stride)), decoded(static_cast<size_t>(rows * cols));
  for (float& value : weight) value = static_cast<float>(random.uniform());
  for (float& value : decoded) value = static_cast<float>(random.uniform());
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (fw_select_isa(isa) != FW_OK) continue;
    std::vector<double> missed(static_cast<size_t>(rows)), total(static_cast<size_t>(rows));
    expect(fw_squared_errors(weight.data(), FW_FLOAT32, rows, cols, stride, decoded.data(), missed.data(), total.data(), 3) ==
               FW_OK,
           "squared errors succeed");
    for (int64_t row = 0; row < rows; ++row) {
      double far = 0, all = 0;
      for (int64_t col = 0; col < cols; ++col) {
        const double value = static_cast<double>(weight[static_cast<size_t>(row * stride + col)]);
        const double gap = value - static_cast<double>(decoded[static_cast<size_t>(row * cols + col)]);
        far += gap * gap;
        all += value * value;
      }
      expect(std::abs(far - missed[static_cast<size_t>(row)]) <= 1e-12 * far, "squared error of a row");
      expect(std::abs(all - total[static_cast<size_t>(row)]) <= 1e-12 * all, "squared norm of a row");
    }
  }
}

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
  expect(fw_version() == FW_VERSION, "version");
  test_solver();
  test_hard_groups();
  test_other_types();
  test_packing();
  test_decode();
  test_squared_errors();
  test_sweep();
  test_sweep_rows();
  test_clip_search();
  test_descent();
  if (failures == 0) std::printf("all native tests passed\n");
  return failures == 0 ? 0 : 1;
}
