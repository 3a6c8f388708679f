// Second moments of inputs in bfloat16 against sums in double precision, by every instruction set that has them.
#include "moments.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "product_kernels.h"

namespace {

struct Shape {
  int64_t tokens, rows, columns;
};

constexpr Shape kShapes[] = {{0, 3, 5},    {1, 1, 1},     {2, 16, 32},   {31, 17, 33},    {33, 48, 16},
                             {64, 31, 65}, {1024, 8, 40}, {1025, 40, 9}, {2060, 33, 400}, {100, 450, 450}};

std::vector<uint16_t> inputs(int64_t count, Random& draw) {
  std::vector<uint16_t> found(static_cast<size_t>(count));
  for (uint16_t& one : found) {
    const float value = draw.symmetric();
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    one = static_cast<uint16_t>(bits >> 16);
  }
  return found;
}

double value_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return static_cast<double>(value);
}

// Memory of exactly the size that is asked for, so that a sanitizer sees every step beyond it.
void test_shape(const Shape& shape, bool same, int32_t threads, const char* isa) {
  Random draw;
  const std::vector<uint16_t> left = inputs(shape.tokens * shape.rows, draw);
  const std::vector<uint16_t> right = same ? left : inputs(shape.tokens * shape.columns, draw);
  std::vector<float> sums(static_cast<size_t>(shape.rows * shape.columns), 2.0F);
  const uint16_t none = 0;
  const Memory work = allocate(moment_work_bytes(shape.rows, shape.columns));
  const fw_moment_job job = {left.empty() ? &none : left.data(), right.empty() ? &none : right.data(), sums.data(), work.get(),
                             shape.tokens, shape.rows, shape.columns, shape.rows, shape.columns, shape.columns,
                             moment_work_bytes(shape.rows, shape.columns), 0.5F, 0.25F, same ? 1 : 0};
  expect(fw_moment(&job, threads) == FW_OK, isa, "moments are computed");
  bool near = true;
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t c = same ? r : 0; c < shape.columns; ++c) {
      double sum = 0, size = 0;
      for (int64_t t = 0; t < shape.tokens; ++t) {
        const double product = value_of(left[static_cast<size_t>(t * shape.rows + r)]) *
                               value_of(right[static_cast<size_t>(t * shape.columns + c)]);
        sum += product;
        size += std::fabs(product);
      }
      const double wanted = shape.tokens == 0 ? 2.0 : 1.0 + 0.25 * sum;
      near &= std::fabs(static_cast<double>(sums[static_cast<size_t>(r * shape.columns + c)]) - wanted) <= 1e-6 * (1 + size);
    }
  expect(near, isa, "moments are near those in double precision");
}

}  // namespace

int main() {
  for (const char* isa : {"amx", "bf16"}) {
    const ProductKernels* kernels = product_kernels_named(isa);
    if (!kernels) continue;
    select_product_kernels(kernels);
    for (const Shape& shape : kShapes)
      for (const int32_t threads : {1, 3}) test_shape(shape, shape.rows == shape.columns, threads, isa);
  }
  select_product_kernels(product_kernels_named("baseline"));
  const fw_moment_job nothing = {};
  expect(fw_moment(&nothing, 1) == FW_INVALID, "baseline", "no moments without the instructions");
  std::printf("moments: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
