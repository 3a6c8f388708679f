// Activations in the form an operand reads them, and one member's share of a product.
#ifndef FEATHERWEIGHT_PRODUCT_INPUT_H
#define FEATHERWEIGHT_PRODUCT_INPUT_H

#include <stdint.h>

#include "parallel.h"
#include "product_kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// What activations must look like for an operand; equal shapes can share them.
struct InputShape {
  bool integer, plain, rounded;  // plain: for PLAIN; rounded: to bfloat16
  int64_t columns, segments, segment, padded, lane_stride, cols;
  bool operator==(const InputShape& o) const {
    return integer == o.integer && plain == o.plain && rounded == o.rounded && columns == o.columns && segments == o.segments &&
           segment == o.segment && padded == o.padded && lane_stride == o.lane_stride && cols == o.cols;
  }
};

InputShape input_shape(const fw_operand* operand, int precision);

class InputBuffers {
 public:
  void reserve(const InputShape& shape, int64_t tokens);
  bool holds(const InputShape& shape, int64_t tokens) const;
  int8_t* codes() const { return static_cast<int8_t*>(codes_.get()); }
  float* scales() const { return static_cast<float*>(scales_.get()); }
  int32_t* sums() const { return static_cast<int32_t*>(sums_.get()); }
  float* values() const { return static_cast<float*>(values_.get()); }

 private:
  Memory codes_, scales_, sums_, values_;
  int64_t codes_bytes_ = 0, scales_bytes_ = 0, sums_bytes_ = 0, values_bytes_ = 0;
};

// Segments [first, last) of token number `token` of `tokens`, whose values are at x. Buffers hold the shape and tokens; `spare`
// has room for shape.padded values.
void prepare_input(const InputShape& shape, const float* x, int64_t token, int64_t tokens, InputBuffers& to, int64_t first,
                   int64_t last, float* spare);

// For each token and group of an operand with offsets the sum of its activations as the product takes them, float
// [tokens, groups]. In one order on all instruction sets: segment by segment, or of floats every fourth column apart.
void sum_groups(const fw_operand* operand, const InputShape& shape, const InputBuffers& input, int64_t tokens, float* to);

// Tiles [first, last) of a product. `work`: product_work_bytes() of memory.
void product_share(const fw_operand* operand, const InputShape& shape, const InputBuffers& input, int64_t tokens, int64_t first,
                   int64_t last, const Output& out, void* work);
int64_t product_work_bytes(const fw_operand* operand, int64_t tokens);

// Rows [first, last) of an operand as float32.
void operand_rows(const fw_operand* operand, int64_t first, int64_t last, float* out);

// One step, valid_step for these columns, on one token.
void apply_step(const fw_step& step, const float* x, int64_t cols, float* out);

inline void advise_huge(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (last > first + (uintptr_t{4} << 20)) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

#endif
