// The operators of product.h without Python, for every instruction set and layout: integers against sums in 64 bits, floats
// against sums in double, numbers of threads and of tokens against each other bit for bit, and so instruction sets, but for
// matrices of plain values, which each multiplies in its own way. To be run under the sanitizers and, for AArch64, under an emulator; the hash of all results is the same on all processors.
#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "parallel.h"
#include "product_cases.h"
#include "product_checks.h"
#include "product_refusals.h"

namespace {

// ---- operands ----

template <typename T>
int64_t count_of(const std::vector<T>& values) {
  return static_cast<int64_t>(values.size());
}

bool covered(const fw_operand& h, int64_t at) {  // whether a byte of an operand means anything
  const auto within = [&](int64_t begin, int64_t size) { return at >= begin && at < begin + size; };
  return at < h.codes_at || within(h.codes_at, h.tiles * h.codes_per_tile) ||
         within(h.scales_at, h.tiles * h.scales_per_tile) || within(h.zeros_at, h.tiles * h.zeros_per_tile);
}

void test_packing(const Matrix& m, int32_t layout, const Operand& operand) {
  const Operand again = packed(m, layout, 3, 0xff);
  const uint8_t* a = static_cast<const uint8_t*>(operand.memory.get());
  const uint8_t* b = static_cast<const uint8_t*>(again.memory.get());
  bool equal = operand.bytes == again.bytes;
  for (int64_t i = 0; equal && i < operand.bytes; ++i) equal = a[i] == b[i] || !covered(operand.header(), i);
  check(equal, m.name + ": the same operand whatever memory held before, for all threads");
  check(fw_operand_check(a, operand.bytes) == FW_OK, m.name + ": is a valid operand");
  check(fw_operand_check(a, operand.bytes - 1) == FW_INVALID, m.name + ": a cut operand is refused");
}

void test_rows(const Matrix& m, const Operand& operand) {
  const int64_t rows = m.source.rows, cols = m.source.cols;
  using Range = std::pair<int64_t, int64_t>;
  for (const auto& [first, last] : {Range{0, rows}, Range{rows / 2, rows / 2 + 1}, Range{rows / 3, rows}}) {
    std::vector<float> found(static_cast<size_t>((last - first) * cols), -7.0F), expected;
    for (int64_t row = first; row < last; ++row)
      for (int64_t col = 0; col < cols; ++col) expected.push_back(m.value(row, col));
    check(fw_operand_rows(operand.memory.get(), operand.bytes, first, last, found.data(), count_of(found)) == FW_OK, m.name + ": rows are read");
    bool equal = true;
    for (size_t i = 0; i < found.size(); ++i) equal &= found[i] == expected[i];
    check(equal, m.name + ": decoded rows");
  }
}

// ---- products ----

constexpr float kUntouched = 12345.0F;
constexpr int64_t kMargin = 3;  // floats after each row of an output

enum class Activations { kRandom, kHighest, kLowest, kOpposite };

std::vector<int8_t> activations(Random& random, int64_t tokens, int64_t cols, Activations kind) {
  std::vector<int8_t> x(static_cast<size_t>(tokens * cols));
  for (size_t i = 0; i < x.size(); ++i) switch (kind) {
      case Activations::kRandom: x[i] = static_cast<int8_t>(random.below(256) - 128); break;
      case Activations::kHighest: x[i] = 127; break;
      case Activations::kLowest: x[i] = -128; break;
      case Activations::kOpposite: x[i] = static_cast<int64_t>(i) % cols < cols / 2 ? 127 : -128;
    }
  return x;
}

// What offsets add to a product: each times the sum of its group's activations.
float part_of_offsets(const Matrix& m, const fw_operand& h, const std::vector<int8_t>& x, const std::vector<float>& x_scales,
                      int64_t token, int64_t row) {
  float part = 0.0F;
  for (int64_t segment = 0; segment < h.segments;) {
    const int64_t end = std::min(h.segments, segment + h.segments_per_group), first = segment * h.segment;
    float sum = 0.0F;
    for (; segment < end; ++segment) {
      int64_t of_segment = 0;
      for (int64_t c = segment * h.segment; c < std::min(m.source.cols, (segment + 1) * h.segment); ++c)
        of_segment += x[static_cast<size_t>(token * m.source.cols + c)];
      sum += x_scales[static_cast<size_t>(token * h.segments + segment)] * static_cast<float>(of_segment);
    }
    part += m.offset(row, first) * sum;
  }
  return part;
}

// Sums in 64 bits; what the operators then do to them, in the same order.
std::vector<float> expected_product(const Matrix& m, const fw_operand& h, const std::vector<int8_t>& x,
                                    const std::vector<float>& x_scales, int64_t tokens) {
  const int64_t rows = m.source.rows, cols = m.source.cols;
  std::vector<float> out(static_cast<size_t>(tokens * (rows + kMargin)), kUntouched);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < rows; ++row) {
      float total = 0.0F;
      for (int64_t segment = 0; segment < h.segments; ++segment) {
        const int64_t first = segment * h.segment, last = std::min(cols, first + h.segment);
        for (int k = 0; k < m.planes; ++k) {
          int64_t sum = 0;
          for (int64_t c = first; c < last; ++c) sum += int64_t{m.level(k, row, c)} * x[static_cast<size_t>(t * cols + c)];
          const float x_scale = x_scales[static_cast<size_t>(t * h.segments + segment)];
          total += static_cast<float>(sum) * (m.scale(row, first, k) * x_scale);
        }
      }
      if (!m.offsets.empty()) total += part_of_offsets(m, h, x, x_scales, t, row);
      out[static_cast<size_t>(t * (rows + kMargin) + row)] = total;
    }
  return out;
}

void test_integers(Random& random, const Matrix& m, const Operand& operand, int64_t tokens, Activations kind) {
  const fw_operand& h = operand.header();
  const std::vector<int8_t> x = activations(random, tokens, m.source.cols, kind);
  std::vector<float> x_scales(static_cast<size_t>(tokens * h.segments));
  for (float& s : x_scales) s = random.uniform() * 0.01F;
  const std::vector<float> expected = expected_product(m, h, x, x_scales, tokens);
  add_to_hash(expected);
  for (const char* isa : kIsas) {
    fw_select_isa(isa);
    for (int threads : {1, 2, 5}) {
      std::vector<float> out(expected.size(), kUntouched);
      check(fw_product_int8(operand.memory.get(), operand.bytes, x.data(), count_of(x), x_scales.data(), count_of(x_scales),
                            tokens, out.data(), count_of(out), m.source.rows + kMargin, threads) == FW_OK, m.name + ": product of integers succeeds");
      check(out == expected, m.name + " layout " + std::to_string(h.layout) + " tokens " + std::to_string(tokens) +
                                 " activations " + std::to_string(static_cast<int>(kind)) + " threads " +
                                 std::to_string(threads) + ": product of integers");
    }
  }
}

struct FloatProblem {
  const Matrix& m;
  const Operand& operand;
  int64_t tokens, x_stride;
  std::vector<float> x;

  std::vector<float> run(int32_t precision, int threads, const std::vector<float>* onto = nullptr) const {
    std::vector<float> out(static_cast<size_t>(tokens * (m.source.rows + kMargin)), kUntouched);
    if (onto) out = *onto;
    check(fw_product(operand.memory.get(), operand.bytes, x.data(), count_of(x), tokens, x_stride, out.data(), count_of(out),
                     m.source.rows + kMargin, precision, onto != nullptr, threads) == FW_OK, m.name + ": product succeeds");
    return out;
  }
};

// The float path within 1e-5 of the sum of the magnitudes.
void check_near(const FloatProblem& p, const std::vector<float>& out) {
  const int64_t rows = p.m.source.rows, cols = p.m.source.cols;
  bool near = true, untouched = true;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0, size = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double x = p.x[static_cast<size_t>(t * p.x_stride + c)];
        for (int k = 0; k < (p.m.values.empty() ? p.m.planes : 1); ++k) {
          const double term = x * (p.m.values.empty() ? double{p.m.scale(row, c, k)} * p.m.level(k, row, c)
                                                      : double{p.m.value(row, c)});
          sum += term;
          size += std::fabs(term);
        }
        sum += x * p.m.offset(row, c);
        size += std::fabs(x * p.m.offset(row, c));
      }
      near &= std::fabs(out[static_cast<size_t>(t * (rows + kMargin) + row)] - sum) <= 1e-5 * size;
    }
    for (int64_t i = rows; i < rows + kMargin; ++i)
      untouched &= out[static_cast<size_t>(t * (rows + kMargin) + i)] == kUntouched;
  }
  check(near, p.m.name + " layout " + std::to_string(p.operand.header().layout) + ": product of floats");
  check(untouched, p.m.name + ": nothing is written between the rows of an output");
}

// What FW_ACTIVATION_INT8 stands for: the activations of fw_quantize.
std::vector<float> product_of_quantised(const FloatProblem& p) {
  const fw_operand& h = p.operand.header();
  const int64_t cols = p.m.source.cols;
  std::vector<int8_t> codes(static_cast<size_t>(p.tokens * cols));
  std::vector<float> scales(static_cast<size_t>(p.tokens * h.segments));
  std::vector<int32_t> sums(scales.size());
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t at = t * h.segments;
    const int32_t status = fw_quantize(p.x.data() + t * p.x_stride, 1, cols, h.segment, nullptr, codes.data() + t * cols,
                                       scales.data() + at, sums.data() + at, 1);
    check(status == FW_OK, p.m.name + ": is quantised");
  }
  return expected_product(p.m, h, codes, scales, p.tokens);
}

// To the nearest bfloat16, ties to even.
float bfloat_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fffU + (bits >> 16 & 1U)) & 0xffff0000U;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// A token's results are the same alone and in company.
void test_neighbours(const FloatProblem& p, int32_t precision, const std::vector<float>& expected) {
  for (int64_t first = 0; first < p.tokens; first += 5) {
    FloatProblem alone = {p.m, p.operand, std::min<int64_t>(1 + first % 3, p.tokens - first), p.x_stride, {}};
    alone.x.assign(p.x.begin() + first * p.x_stride, p.x.begin() + (first + alone.tokens) * p.x_stride);
    const int64_t width = p.m.source.rows + kMargin;
    const std::vector<float> part(expected.begin() + first * width, expected.begin() + (first + alone.tokens) * width);
    check(same_bits(alone.run(precision, 2), part), p.m.name + ": the same for tokens in other company");
  }
}

void test_floats(Random& random, const Matrix& m, const Operand& operand, int64_t tokens) {
  FloatProblem p = {m, operand, tokens, m.source.cols + random.below(3), {}};
  for (int64_t i = 0; i < tokens * p.x_stride; ++i) p.x.push_back(random.symmetric());
  const bool plain = operand.header().layout == FW_PLAIN;
  FloatProblem rounded = p;
  if (plain && operand.header().scale_dtype == FW_BFLOAT16)
    for (float& x : rounded.x) x = bfloat_of(x);
  fw_select_isa("baseline");
  std::vector<float> expected = p.run(FW_ACTIVATION_FLOAT, 1);
  check_near(p, expected);
  add_to_hash(expected);
  const bool lanes_are_rows = m.values.empty();
  std::vector<float> integer = lanes_are_rows ? product_of_quantised(p) : rounded.run(FW_ACTIVATION_FLOAT, 1);
  add_to_hash(integer);
  for (const char* isa : kIsas) {
    fw_select_isa(isa);
    if (plain) {
      expected = p.run(FW_ACTIVATION_FLOAT, 1);
      check_near(p, expected);
      integer = p.run(FW_ACTIVATION_INT8, 1);
      check_near(rounded, integer);
    }
    test_neighbours(p, FW_ACTIVATION_FLOAT, expected);
    test_neighbours(p, FW_ACTIVATION_INT8, integer);
    for (int threads : {1, 2, 5}) {
      check(same_bits(p.run(FW_ACTIVATION_FLOAT, threads), expected), m.name + ": floats, the same bits for all threads");
      check(same_bits(p.run(FW_ACTIVATION_INT8, threads), integer), m.name + ": rounded activations, the same for all threads");
    }
    for (const int32_t precision : {FW_ACTIVATION_FLOAT, FW_ACTIVATION_INT8}) {
      std::vector<float> sum = precision == FW_ACTIVATION_FLOAT ? expected : integer;
      for (size_t i = 0; i < sum.size(); ++i)
        sum[i] = static_cast<int64_t>(i) % (m.source.rows + kMargin) < m.source.rows ? 0.75F + sum[i] : 0.75F;
      const std::vector<float> onto(sum.size(), 0.75F);
      check(same_bits(p.run(precision, 2, &onto), sum), m.name + ": added to what is there");
    }
  }
}

void test_matrix(Random& random, Matrix& m) {
  m.finish();
  bool any = false;
  for (const int32_t layout : m.layouts) {
    const Operand operand = packed(m, layout, 1, 0);
    if (operand.bytes < 0) continue;  // a layout that this shape does not have
    any = true;
    test_packing(m, layout, operand);
    const int64_t tokens = random.one_of<int64_t>({1, 1, 2, 4, 5, 12, 13, 17, 33});
    for (const char* isa : kIsas) {
      fw_select_isa(isa);
      test_rows(m, operand);
    }
    if (m.values.empty())
      for (const Activations kind : {Activations::kRandom, Activations::kHighest, Activations::kLowest})
        test_integers(random, m, operand, kind == Activations::kRandom ? tokens : 1 + tokens % 3, kind);
    test_floats(random, m, operand, m.source.kind == FW_DENSE ? tokens : 1 + tokens % 7);
  }
  check(any, m.name + ": has a layout");
  for (const char* isa : kIsas) {
    fw_select_isa(isa);
    check(fw_operand_bytes(&m.source, FW_AUTO) > 0, m.name + ": there is a layout for it");
  }
}

// ---- cases ----

struct Shape {
  int64_t rows, cols, group, segment;
};

Shape random_shape(Random& random, int64_t multiple) {
  Shape s = {};
  s.rows = random.one_of<int64_t>({1, 2, 15, 16, 17, 33, 48, 65, 130});
  s.group = multiple * random.one_of<int64_t>({1, 2, 8, 9, 16, 25, 32, 40, 64});
  s.cols = s.group * random.below(4) + 1 + random.below(static_cast<int>(s.group));
  if (random.below(4) == 0) s.group = s.cols;
  // A segment is the group or divides it.
  const int64_t divisor = random.one_of<int64_t>({1, 2, 4});
  if (random.below(3) == 0 && s.group % (divisor * multiple) == 0) s.segment = s.group / divisor;
  return s;
}

void test_shapes(int rounds) {
  Random random;
  Maker make(random);
  const std::vector<int> kWeights[] = {{1, 0, 0}, {3, 1, 0}, {3, 2, 0}, {9, 3, 1}, {2, 1, 1}, {27, 27, 27}, {27, 9, 1}};
  for (int round = 0; round < rounds; ++round) {
    const Fill fill = random.one_of({Fill::kRandom, Fill::kRandom, Fill::kRandom, Fill::kLow, Fill::kHigh});
    const int32_t dtype = random.one_of<int32_t>({FW_FLOAT32, FW_BFLOAT16, FW_FLOAT16, FW_LOG8});
    const int32_t float_type = dtype == FW_LOG8 ? FW_FLOAT32 : dtype;
    const int packing = random.below(2), bits = 1 + round % 8, planes = 1 + round % 3;
    const auto test = [&](Matrix m, const Shape& s) {
      m.source.segment = s.segment;
      test_matrix(random, m);
    };
    Shape s = random_shape(random, random.one_of<int64_t>({1, 4}));
    test(make.trits(s.rows, s.cols, s.group, planes, packing, {}, dtype, fill), s);
    s = random_shape(random, 4);
    std::vector<int> weights = random.one_of(kWeights);
    weights.resize(static_cast<size_t>(weights[1] ? weights[2] ? 3 : 2 : 1));
    test(make.trits(s.rows, s.cols, s.group, static_cast<int>(weights.size()), packing, weights, dtype, fill), s);
    s = random_shape(random, random.one_of<int64_t>({1, 4}));
    test(make.uniform(s.rows, s.cols, s.group, bits, random.below(2) == 1, dtype, fill), s);
    s = random_shape(random, random.one_of<int64_t>({1, 4}));
    test(make.uniform_with_offsets(s.rows, s.cols, s.group, bits, float_type, fill), s);
    const int stride = random.one_of({1, 1, 2, 8, 16});
    s = random_shape(random, random.below(3) ? 4 * stride : 1);
    test(make.sherry(s.rows, s.cols, s.group, stride, dtype, fill), s);
    s = random_shape(random, 1);
    s.segment = 0;
    test(make.codebook(s.rows, s.cols, s.group, bits, float_type), s);
    test(make.dense(s.rows, s.cols, float_type), s);
  }
}

// One segment as long as they get, where sums of narrow integers would overflow.
void test_long_segments(int64_t cols) {
  Random random;
  Maker make(random);
  const int64_t rows = 17;
  std::vector<Matrix> matrices;
  for (const Fill fill : {Fill::kLow, Fill::kHigh}) {
    for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8})
      matrices.push_back(make.uniform(rows, cols, cols, bits, bits != 4, FW_FLOAT32, fill));
    for (const int bits : {2, 4, 8}) matrices.push_back(make.uniform_with_offsets(rows, cols, cols, bits, FW_FLOAT32, fill));
    matrices.push_back(make.trits(rows, cols, cols, 2, FW_2BIT, {}, FW_FLOAT32, fill));
    matrices.push_back(make.trits(rows, cols, cols, 3, FW_BASE3, {27, 27, 27}, FW_FLOAT32, fill));
    matrices.push_back(make.sherry(rows, cols, cols, 16, FW_FLOAT32, fill));
  }
  for (Matrix& m : matrices) {
    m.source.segment = cols;
    m.finish();
    for (const int32_t layout : m.layouts) {
      const Operand operand = packed(m, layout, 2, 0);
      if (operand.bytes < 0) continue;
      check(operand.header().segments == 1, m.name + ": one segment");
      test_integers(random, m, operand, 1, Activations::kHighest);
      test_integers(random, m, operand, 2, Activations::kLowest);
      test_integers(random, m, operand, 1, Activations::kOpposite);
      test_integers(random, m, operand, 1, Activations::kRandom);
    }
  }
  Matrix longer = make.uniform(1, 65537, 65537, 8, false, FW_FLOAT32, Fill::kLow);
  longer.finish();
  longer.source.segment = 65537;
  check(fw_operand_bytes(&longer.source, FW_FIELDS) == -1, "a segment that 32 bits may not hold is refused");
}

// More columns than a block of a product with plain values has, and more tokens than a group.
void test_wide_dense_matrices() {
  Random random;
  Maker make(random);
  for (const int32_t dtype : {FW_FLOAT32, FW_BFLOAT16, FW_FLOAT16})
    for (const int64_t rows : {15, 150}) {
      Matrix m = make.dense(rows, 1100 + random.below(900), dtype);
      m.finish();
      const Operand operand = packed(m, FW_PLAIN, 2, 0);
      test_floats(random, m, operand, 1);
      test_floats(random, m, operand, 29);
    }
}

}  // namespace

// Arguments: rounds of random shapes, and the columns of the longest segment.
int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::atoi(argv[1]) : 24;
  const int64_t longest = argc > 2 ? std::atoll(argv[2]) : 65536;
  test_refusals();
  test_shapes(rounds);
  test_wide_dense_matrices();
  test_long_segments(longest);
  return report("products");
}
