// The native library without Python, to be run under the sanitizers: every instruction set, shapes with short groups, ties,
// refusals. Prints what failed and returns 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "featherweight.h"
#include "library_checks.h"

namespace {

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

}  // namespace

int main() {
  expect(fw_version() == FW_VERSION, "version");
  test_solver();
  test_hard_groups();
  test_other_types();
  test_packing();
  test_decode();
  test_squared_errors();
  if (failures == 0) std::printf("all native tests passed\n");
  return failures == 0 ? 0 : 1;
}
