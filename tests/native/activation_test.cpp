// Quantised and rotated activations, one-byte scales: every instruction set against the definition.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "product_checks.h"
#include "product_layout.h"

namespace {

void test_quantize() {
  Random random;
  for (const int64_t count : {1, 7, 16, 64, 100, 257}) {
    const float sizes[] = {1.0F, 1e-30F, 1e-38F, 0.0F, 1e30F, 3.4e38F};
    for (const float size : sizes) {
      std::vector<float> x(static_cast<size_t>(count));
      for (float& v : x) v = size * random.symmetric();
      if (count > 20 && size == 1.0F) {  // halves exactly between two codes
        x[0] = 127.0F;
        for (int i = 1; i < 20; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i) - 9.5F;
      }
      float largest = 0.0F;
      for (const float v : x) largest = std::max(largest, std::fabs(v));
      for (const char* isa : kIsas) {
        fw_select_isa(isa);
        std::vector<int8_t> codes(x.size());
        float scale = -1.0F;
        int32_t sum = -1, expected_sum = 0;
        check(fw_quantize(x.data(), 1, count, count, nullptr, codes.data(), &scale, &sum, 1) == FW_OK, "quantise");
        const bool zero = largest < 1e-33F;
        check(scale == (zero ? 0.0F : largest / 127.0F), "scale of activations");
        bool right = true;
        for (size_t i = 0; i < x.size(); ++i) {
          right &= codes[i] == (zero ? 0 : static_cast<int>(std::nearbyint(x[i] * (127.0F / largest))));
          expected_sum += codes[i];
        }
        check(right, "codes of activations");
        check(sum == expected_sum, "sum of codes");
      }
    }
    for (const float strange : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      std::vector<float> x(static_cast<size_t>(count), 1.0F);
      x[static_cast<size_t>(random.below(static_cast<int>(count)))] = strange;
      for (const char* isa : kIsas) {
        fw_select_isa(isa);
        std::vector<int8_t> codes(x.size(), 1);
        float scale = 0.0F;
        int32_t sum = 1;
        fw_quantize(x.data(), 1, count, count, nullptr, codes.data(), &scale, &sum, 1);
        check(std::isnan(scale) && sum == 0 && codes == std::vector<int8_t>(x.size(), 0), "a value that is no number");
      }
    }
  }
}

// Entry of the matrix of an order, times the root of the order, where there is a formula; NaN elsewhere.
double entry_by_formula(int64_t order, int64_t i, int64_t j) {
  const int64_t power = order & -order, odd = order / power;
  const double sign = __builtin_parityll(static_cast<uint64_t>((i % power) & (j % power))) ? -1.0 : 1.0;
  if (odd == 1) return sign;
  if (odd % 4 == 3 && odd != 51) return std::nan("");
  if (odd == 5 && power > 2) return std::nan("");
  const double angle = 2 * std::acos(-1.0) * static_cast<double>((i / power) * (j / power) % odd) / static_cast<double>(odd);
  return sign * (std::cos(angle) + std::sin(angle));
}

// What a step makes of the unit vectors: `matrix`[j][i] is entry (i, j) of the order's matrix.
std::vector<float> matrix_of(int32_t block) {
  const size_t n = static_cast<size_t>(block);
  std::vector<float> unit(n * n), matrix(n * n);
  for (size_t i = 0; i < n; ++i) unit[i * n + i] = 1.0F;
  const fw_step step = {FW_HADAMARD, block, 0, 0, 0, nullptr, nullptr};
  check(fw_apply_step(&step, unit.data(), block, block, matrix.data(), 1) == FW_OK, "unit vectors are rotated");
  return matrix;
}

void test_matrix(int32_t block) {
  const std::vector<float> matrix = matrix_of(block);
  const size_t n = static_cast<size_t>(block);
  double worst = 0, largest = 0;
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j) {
      double product = i == j ? -1.0 : 0.0;
      for (size_t k = 0; k < n; ++k) product += double{matrix[i * n + k]} * matrix[j * n + k];
      worst = std::max(worst, std::fabs(product));
      const double expected = entry_by_formula(block, static_cast<int64_t>(j), static_cast<int64_t>(i));
      const double entry = matrix[i * n + j] * std::sqrt(static_cast<double>(block));
      if (!std::isnan(expected)) worst = std::max(worst, std::fabs(entry - expected));
      largest = std::max(largest, std::fabs(entry));
    }
  check(worst < 2e-6, "the matrix of order " + std::to_string(block));
  check(largest < (rotation_kernel(block) % 4 == 3 && rotation_kernel(block) != 51 ? 1.2 : 1.4143), "entries of one size");
}

void test_hadamard() {
  Random random;
  for (int32_t block = 1; block < 128; ++block)
    if (hadamard_order(block)) test_matrix(block);
  for (const int32_t block : {1, 2, 8, 16, 64, 256, 12, 24, 192, 20, 40, 320, 28, 56, 448, 3, 6, 14, 9, 72, 576, 63, 50, 800, 1008}) {
    const int64_t tokens = 3, cols = 2 * block;
    std::vector<float> x(static_cast<size_t>(tokens * cols)), signs(static_cast<size_t>(cols));
    for (float& v : x) v = random.symmetric();
    for (float& s : signs) s = random.below(2) ? 1.0F : -1.0F;
    const fw_step step = {FW_HADAMARD, block, 0, 0, cols, nullptr, signs.data()};
    const std::vector<float> matrix = matrix_of(block);
    std::vector<float> first;
    for (const char* isa : kIsas) {
      fw_select_isa(isa);
      std::vector<float> out(x.size() + 1);  // the result begins where no vector would
      check(fw_apply_step(&step, x.data(), tokens, cols, out.data() + 1, 2) == FW_OK, "Hadamard succeeds");
      out.erase(out.begin());
      if (first.empty()) first = out;
      check(same_bits(out, first), "Hadamard, the same bits everywhere");
    }
    add_to_hash(first);
    double worst = 0;
    for (int64_t begin = 0; begin < tokens * cols; begin += block)
      for (int64_t i = 0; i < block; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < block; ++j) {
          const size_t at = static_cast<size_t>(begin + j);
          sum += double{matrix[static_cast<size_t>(j * block + i)]} * x[at] * signs[at % static_cast<size_t>(cols)];
        }
        worst = std::max(worst, std::fabs(sum - first[static_cast<size_t>(begin + i)]));
      }
    check(worst < 2e-5, "Hadamard of order " + std::to_string(block));
  }
}

void test_log8() {
  bool near = true;
  for (const int exponent : {-20, -3, 0, 12})
    for (int code = 0; code < 255; ++code)
      near &= std::fabs(log8_value(code, exponent) / std::exp2(exponent - code / 32.0) - 1.0) < 1.2e-7;
  check(near && log8_value(255, 0) == 0.0F, "values of one-byte scales");
}

}  // namespace

int main() {
  test_log8();
  test_quantize();
  test_hadamard();
  return report("activations");
}
