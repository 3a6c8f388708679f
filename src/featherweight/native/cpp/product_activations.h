// What happens to activations before a product: rounding to integers, and the block-Hadamard transform.
#ifndef FEATHERWEIGHT_PRODUCT_ACTIVATIONS_H
#define FEATHERWEIGHT_PRODUCT_ACTIVATIONS_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>

#include "product_lanes.h"
#include "product_layout.h"

namespace {  // compiled for several instruction sets

// Lie anywhere. Not to be passed by reference: Clang then takes them to be aligned.
typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));  // of any row of floats
typedef int32_t I16 __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int32_t kMagic = 0x4b400000;  // the bits of 1.5 2^23: adding it rounds to the nearest integer, halves to even

void quantize(const float* x, int64_t count, int8_t* codes, float* scale, int32_t* sum) {
  const int64_t whole = count / 16 * 16;
  // Sizes of floats are in the order of their bits.
  I16 lanes = {};
  for (int64_t i = 0; i < whole; i += 16) {
    I16 size;
    memcpy(&size, x + i, sizeof size);
    size &= INT32_MAX;
    lanes = size > lanes ? size : lanes;
  }
  int32_t largest_bits = 0;
  for (int j = 0; j < 16; ++j) largest_bits = std::max(largest_bits, lanes[j]);
  for (int64_t i = whole; i < count; ++i) {
    int32_t size;
    memcpy(&size, x + i, sizeof size);
    largest_bits = std::max(largest_bits, size & INT32_MAX);
  }
  const bool finite = largest_bits < 0x7f800000;
  float largest;
  memcpy(&largest, &largest_bits, sizeof largest);
  const float step = largest / 127.0F;
  const float inverse = step > 1e-35F && finite ? 127.0F / largest : 0.0F;  // smaller ones have no finite inverse
  *scale = finite ? (inverse > 0.0F ? step : 0.0F) : std::nanf("");
  *sum = 0;
  if (inverse == 0.0F) {
    memset(codes, 0, static_cast<size_t>(count));
    return;
  }
  I16 sums = {};
  for (int64_t i = 0; i < whole; i += 16) {
    // The sum's bits are those of the constant plus the integer. Products exceed 127 by no more than their last bit.
    I16 code;
    const F16 shifted = *reinterpret_cast<const F16*>(x + i) * inverse + 12582912.0F;
    memcpy(&code, &shifted, sizeof code);
    code -= kMagic;
    sums += code;
    *reinterpret_cast<B16*>(codes + i) = __builtin_convertvector(code, B16);
  }
  int32_t total = 0;
  for (int j = 0; j < 16; ++j) total += sums[j];
  for (int64_t i = whole; i < count; ++i) {
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(x[i] * inverse + 12582912.0F - 12582912.0F));
    total += codes[i];
  }
  *sum = total;
}

#if defined(FW_NEON)
template <int Distance>
FW_INLINE void butterfly_within(F16* v, int64_t vectors) {
  alignas(64) float signs[16];
  for (int i = 0; i < 16; ++i) signs[i] = i & Distance ? -1.0F : 1.0F;
  const Floats sign = load_floats(signs);
  float* x = reinterpret_cast<float*>(v);
  for (int64_t i = 0; i < vectors; ++i, x += 16) {
    const Floats value = load_floats(x);
    store_floats(x, add(swapped<Distance>(value), times(value, sign)));  // lower lanes a + b, upper ones a - b
  }
}
#else
template <int Distance>
FW_INLINE void butterfly_within(F16* v, int64_t vectors) {
  const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const I16 partner = lane ^ Distance, upper = (lane & Distance) != 0;
  const I16 sign = upper & INT32_MIN;
  for (int64_t i = 0; i < vectors; ++i) {
    I16 bits;
    memcpy(&bits, &v[i], sizeof bits);
    bits ^= sign;
    F16 signed_value;
    memcpy(&signed_value, &bits, sizeof bits);
#if defined(__clang__)
    constexpr int d = Distance;
    const F16 other = __builtin_shufflevector(v[i], v[i], 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d, 8 ^ d, 9 ^ d, 10 ^ d,
                                              11 ^ d, 12 ^ d, 13 ^ d, 14 ^ d, 15 ^ d);
    (void)partner;
#else
    const F16 other = __builtin_shuffle(v[i], partner);
#endif
    v[i] = other + signed_value;  // lower lanes a + b, upper ones a - b
  }
}
#endif

// Butterflies of the Sylvester matrix over runs of `order` values, `order` a power of two.
void sylvester(float* x, int64_t order, int64_t count) {
  if (order >= 16) {
    F16* v = reinterpret_cast<F16*>(x);
    const int64_t vectors = count / 16;
    butterfly_within<1>(v, vectors);
    butterfly_within<2>(v, vectors);
    butterfly_within<4>(v, vectors);
    butterfly_within<8>(v, vectors);
    for (int64_t half = 1; half < order / 16; half *= 2)
      for (int64_t first = 0; first < vectors; first += 2 * half)
        for (int64_t i = first; i < first + half; ++i) {
          const F16 a = v[i], b = v[i + half];
          v[i] = a + b;
          v[i + half] = a - b;
        }
    return;
  }
  for (int64_t half = 1; half < order; half *= 2)
    for (int64_t first = 0; first < count; first += 2 * half)
      for (int64_t i = first; i < first + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

// Kernel times the rows of 16 columns of x [kernel][order]: sums in the order of the kernel's columns.
template <int Rows>
FW_INLINE void dense_rows(const float* table, int kernel, int row, const F16* in, float* to, int64_t order) {
  F16 sums[Rows] = {};
  for (int k = 0; k < kernel; ++k)
    for (int r = 0; r < Rows; ++r) sums[r] += in[k] * table[k * kernel + row + r];
  for (int r = 0; r < Rows; ++r) *reinterpret_cast<F16*>(to + (row + r) * order) = sums[r];
}

// The dense factor of a rotation on one run [kernel][order], in place.
void dense_factor(float* x, const float* table, int kernel, int64_t order) {
  if (order % 16 == 0) {
    F16 in[kMostOdd];
    for (int64_t i = 0; i < order; i += 16) {
      for (int k = 0; k < kernel; ++k) in[k] = *reinterpret_cast<const F16*>(x + k * order + i);
      int row = 0;
      for (; row + 4 <= kernel; row += 4) dense_rows<4>(table, kernel, row, in, x + i, order);
      for (; row < kernel; ++row) dense_rows<1>(table, kernel, row, in, x + i, order);
    }
    return;
  }
  for (int64_t i = 0; i < order; ++i) {
    float sums[kMostOdd] = {};
    for (int k = 0; k < kernel; ++k) {
      const float value = x[k * order + i];
      for (int r = 0; r < kernel; ++r) sums[r] += table[k * kernel + r] * value;
    }
    for (int r = 0; r < kernel; ++r) x[r * order + i] = sums[r];
  }
}

// A block is one rotation_kernel() times the matrix of Sylvester; any that hadamard_order() allows.
void hadamard(float* x, const float* signs, int64_t block, int64_t count) {
  if (signs)
    for (int64_t i = 0; i < count; ++i) x[i] *= signs[i];
  const int kernel = rotation_kernel(block);
  const int64_t order = block / kernel;
  sylvester(x, order, count);
  if (kernel > 1) {
    const float* table = rotation_factor(kernel);
    for (int64_t first = 0; first < count; first += block) dense_factor(x + first, table, kernel, order);
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace

#endif
