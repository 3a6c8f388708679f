// The operators' inner loops, compiled once for every instruction set (product_tiles.cpp) and chosen at run time.
#ifndef FEATHERWEIGHT_PRODUCT_KERNELS_H
#define FEATHERWEIGHT_PRODUCT_KERNELS_H

#include <stdint.h>

#include "product.h"

// Activations of some tokens, laid out in the padded columns of an operand: codes int8 [tokens, columns],
// scales and sums [tokens, segments]. For operands with offsets also the sums of groups, float [tokens, groups]; else null.
struct IntegerInput {
  const int8_t* codes;
  const float* scales;
  const int32_t* sums;
  int64_t tokens, columns, segments;
  const float* group_sums;
};

struct FloatInput {
  const float* values;  // [tokens, columns], padding zero
  int64_t tokens, columns;
  const float* group_sums;  // as in IntegerInput
};

// What a matrix of plain values takes: `cols` columns, padded with zeros to `columns`; rounded to bfloat16 or not.
struct PlainShape {
  int64_t cols, columns;
  bool rounded;
};

struct PlainInput {
  const void* values;  // as plain_input leaves them
  int64_t tokens;
  bool rounded;
};

// Where results go: out[token * stride + row] for rows of tiles [first, last).
struct Output {
  float* values;
  int64_t stride;
  int32_t accumulate;
};

struct ProductKernels {
  const char* name;
  int32_t trits;     // whether TRITS is the faster layout for trits here
  int64_t (*work_bytes)(const fw_operand* operand, int64_t tokens);  // of one member
  // All layouts whose lanes are rows.
  void (*integer_tiles)(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out,
                        void* work);
  void (*float_tiles)(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void* work);
  // PLAIN. Inputs are laid out by plain_input, token by token, at most 4 bytes a column.
  void (*plain_input)(const PlainShape& shape, const float* x, int64_t token, int64_t tokens, void* to);
  void (*plain_tiles)(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work);
  // TABLES, rows [16 first, 16 last).
  void (*float_rows)(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void* work);
  // One token's segment: codes, their sum, and the scale.
  void (*quantize)(const float* x, int64_t count, int8_t* codes, float* scale, int32_t* sum);
  // Orthonormal rotation of each `block` of `count` values (hadamard_order), in place; signs are applied first.
  void (*hadamard)(float* x, const float* signs, int64_t block, int64_t count);
  // All codes of a tile and plane as bytes [segments * steps][64]; tied planes become one, of joint codes.
  void (*unpack)(const fw_operand* operand, int64_t tile, int plane, uint8_t* to);
  // Multiply-adds done by about `rounds` rounds of dot products in registers.
  int64_t (*spin)(int64_t rounds);
  int64_t (*plain_spin)(int64_t rounds);  // of bfloat16
};

const ProductKernels* product_kernels_baseline();
const ProductKernels* product_kernels_avx2();
const ProductKernels* product_kernels_avxvnni();
const ProductKernels* product_kernels_avx512();
const ProductKernels* product_kernels_vbmi();
const ProductKernels* product_kernels_bf16();
const ProductKernels* product_kernels_amx();
bool amx_allowed();  // also asks the system for leave to use the tile registers
const ProductKernels* product_kernels_neon();
const ProductKernels* product_kernels_i8mm();

// Those in use: the best, or what fw_select_isa chose.
const ProductKernels& product_kernels();
// nullptr where the processor or the build lacks them; "auto" for the best.
const ProductKernels* product_kernels_named(const char* name);
void select_product_kernels(const ProductKernels* kernels);

#endif
