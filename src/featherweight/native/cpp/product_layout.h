// Where things lie in an operand (product.h). For all layouts a tile is sixteen rows, the last one padded with rows of zeros.
//
// FIELDS, lanes are rows. A tile's codes: for each segment, for each plane, `steps` steps (of the last segment `last_steps`, as
//   many as it has columns for) in units of as few steps as fill whole
//   bytes: 8 of codes with an odd number of bits, 4 of 2 or 6 bits, 2 of 4 bits, 1 of 8. A unit of codes of b bits has
//   steps b / 8 vectors of 64 bytes: byte 4r + j belongs to row r and column 4 step + j. Codes of 1, 2, 4 and 8 bits follow
//   each other from the lowest bits up (step s of vector s b / 8). Of others as many as fit stand whole in each vector, one of
//   5, 6 or 7 bits or two of 3; the remaining bits of all vectors hold the rest of the unit in pieces: see field_parts.
//   W = scale (code - zero), zero = offset or the group's zero point; several planes: W = sum of scale_k (code_k - offset),
//   tied: W = scale sum of weights_k (code_k - offset). With offsets of groups W = scale code + offset of the group, the product
//   rounded before the sum.
// TRITS, lanes are rows, five steps a vector, digits t + 1. Vectors of the planes alternate. Segments of 8, 16 or 32 steps
//   follow each other without padding (a vector may span two), others are padded to whole vectors. Byte for the digits
//   d0 .. d4 of a row and column at steps 5v .. 5v + 4, r = d0 + 3 d1 + 9 d2, q = (2 - d3) + 3 (2 - d4):
//   8 r + q if q < 8, else 216 + r. So d0, d1, d2 are looked up in 64 bytes by the byte's upper five bits or the distance
//   from 216, d3 and d4 by its lower bits: single permutes of AVX-512 VBMI.
// QUARTETS, lanes are rows. A tile's segment has units of 32 steps; step i of a row is the five bits from 5 i of 160 bits, of
//   which 32-bit word w is lane `row` of vector w: pattern + 16 sign. Columns are those of the activations in which the four
//   lanes of a quartet are neighbours (product.cpp permutes them where lane_stride is not 1).
// TABLES, lanes are columns. A row's group of codes: units as in FIELDS, but of 16-byte vectors, byte j of step s for column
//   16 s + j. Tables float32 [rows, groups, 2^bits] instead of scales.
// PLAIN, lanes are rows. Values column by column, padded with zeros to a multiple of 64 columns; those of a column are sixteen
//   neighbours. Of bfloat16 it is pairs of columns: the two values of row r are lane r.
//
// Scales [tile][group][plane][16], zero points uint8 [tile][group][16], or in their place offsets of the scales' type.
#ifndef FEATHERWEIGHT_PRODUCT_LAYOUT_H
#define FEATHERWEIGHT_PRODUCT_LAYOUT_H

#include <stdint.h>

#include "product.h"

constexpr int64_t kTileRows = 16;
constexpr int64_t kStepBytes = 64;
constexpr int64_t kPlainPadding = 64;
constexpr uint32_t kOperandMagic = 0x646e7066;  // "fpnd"
constexpr uint32_t kOperandVersion = 4;
constexpr int kEscape = 216;
// Exponents of one-byte scales: with smaller ones the least scales would be subnormal, which kernels put together from their
// bits do not know.
constexpr int32_t kLeastExponent = -112, kMostExponent = 127;
constexpr int64_t kMostTerms = int64_t{1} << 20;  // of a layer: more are a damaged struct

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

constexpr int unit_steps(int bits) { return bits == 8 ? 1 : bits & 1 ? 8 : bits & 2 ? 4 : 2; }

// Bits `from` to `from + count` of the codes of step `step` are bits `to` and up of the bytes of vector `vector` of a unit.
struct FieldPart {
  int step, from, count, vector, to;
};
struct FieldParts {
  int count;
  FieldPart part[16];
};

// Where in a unit the bits of its codes are. Few instructions lead from a vector to a code: most codes are one part.
constexpr FieldParts field_parts(int bits) {
  FieldParts all{};
  const int steps = unit_steps(bits), vectors = steps * bits / 8, whole = 8 / bits;  // whole codes of each vector
  for (int s = 0; s < whole * vectors; ++s) all.part[all.count++] = {s, 0, bits, s / whole, s % whole * bits};
  switch (bits) {
    case 3:
      for (FieldPart p : {FieldPart{6, 0, 2, 0, 6}, {6, 2, 1, 1, 6}, {7, 0, 1, 1, 7}, {7, 1, 2, 2, 6}}) all.part[all.count++] = p;
      break;
    case 5:
      for (FieldPart p : {FieldPart{5, 0, 3, 0, 5}, {5, 3, 2, 1, 5}, {6, 0, 3, 2, 5}, {6, 3, 2, 3, 5}, {7, 0, 3, 4, 5},
                          {7, 3, 1, 1, 7}, {7, 4, 1, 3, 7}})
        all.part[all.count++] = p;
      break;
    case 6:
      for (int v = 0; v < 3; ++v) all.part[all.count++] = {3, 2 * v, 2, v, 6};
      break;
    case 7:
      for (int v = 0; v < 7; ++v) all.part[all.count++] = {7, v, 1, v, 7};
      break;
    default: break;
  }
  return all;
}

// Whether segments of this many steps follow each other without padding in TRITS.
constexpr bool packed_segments(int64_t steps) { return steps == 8 || steps == 16 || steps == 32; }

constexpr uint8_t trit_byte(int d0, int d1, int d2, int d3, int d4) {
  const int r = d0 + 3 * d1 + 9 * d2, q = (2 - d3) + 3 * (2 - d4);
  return static_cast<uint8_t>(q < 8 ? 8 * r + q : kEscape + r);
}

inline int64_t scale_bytes(int32_t dtype) { return dtype == FW_LOG8 || dtype == FW_INT8 ? 1 : dtype == FW_FLOAT32 ? 4 : 2; }

inline const uint8_t* bytes_of(const fw_operand* operand) { return reinterpret_cast<const uint8_t*>(operand); }
inline const uint8_t* tile_codes(const fw_operand* operand, int64_t tile) {
  return bytes_of(operand) + operand->codes_at + tile * operand->codes_per_tile;
}
inline const uint8_t* tile_scales(const fw_operand* operand, int64_t tile) {
  return bytes_of(operand) + operand->scales_at + tile * operand->scales_per_tile;
}
inline const uint8_t* tile_zeros(const fw_operand* operand, int64_t tile) {  // or offsets
  return bytes_of(operand) + operand->zeros_at + tile * operand->zeros_per_tile;
}

// Where in a tile of PLAIN the value of a row and column is, in values.
inline int64_t plain_index(int32_t dtype, int64_t row, int64_t column) {
  if (dtype == FW_BFLOAT16) return column / 2 * 2 * kTileRows + 2 * row + column % 2;
  return column * kTileRows + row;
}

// Columns of the padded activations that an operand reads: [segments][4 steps], or for lanes of columns one run.
inline int64_t padded_columns(const fw_operand* operand) { return operand->segments * operand->steps * 4; }

// Steps of a segment for which there are codes. Activations have operand->steps of each.
inline int64_t segment_steps(const fw_operand* operand, int64_t segment) {
  return operand->last_steps && segment + 1 == operand->segments ? operand->last_steps : operand->steps;
}

// Vectors of five steps of one plane of a tile.
inline int64_t trit_vectors(const fw_operand* operand) {
  return divide_up(operand->segments * operand->steps, 5);
}

// The order of the dense factor of a block rotation, which is that factor times Sylvester's matrix: 1, 12, 20, 28 (Hadamard
// matrices), or else the odd part of `block`; 0 where there is none.
constexpr int kMostOdd = 63;
constexpr int rotation_kernel(int64_t block) {
  if (block < 1) return 0;
  const int64_t odd = block / (block & -block);
  if (odd > kMostOdd) return 0;
  return static_cast<int>((odd == 3 || odd == 5 || odd == 7) && block % 4 == 0 ? 4 * odd : odd);
}
// Dense factors of order rotation_kernel(block) > 0, times the root of the order, as [column][row]. Made once.
const float* rotation_factor(int kernel);

// Whether runs of `block` columns, one behind the other, are what a Hadamard step can do here.
constexpr bool hadamard_order(int64_t block) { return rotation_kernel(block) > 0; }
constexpr bool hadamard_fits(int64_t block, int64_t cols) { return hadamard_order(block) && cols % block == 0; }

// 2^(exponent - code / 32), 0 for 255: the values of storage/codes/trit_planes.py, with its 32 fractions rounded to float.
float log8_value(int code, int exponent);
extern const uint32_t kLog8Words[6];  // of four equal bytes: constants of product_log8_avx2.h
inline constexpr float kLog8Fractions[32] = {
    0x1p+0F, 0x1.f50766p-1F, 0x1.ea4afap-1F, 0x1.dfc974p-1F, 0x1.d5818ep-1F, 0x1.cb720ep-1F, 0x1.c199bep-1F,
    0x1.b7f770p-1F, 0x1.ae89fap-1F, 0x1.a5503cp-1F, 0x1.9c4918p-1F, 0x1.93737cp-1F, 0x1.8ace54p-1F, 0x1.82589ap-1F,
    0x1.7a1148p-1F, 0x1.71f75ep-1F, 0x1.6a09e6p-1F, 0x1.6247ecp-1F, 0x1.5ab07ep-1F, 0x1.5342b6p-1F, 0x1.4bfdaep-1F,
    0x1.44e086p-1F, 0x1.3dea64p-1F, 0x1.371a74p-1F, 0x1.306fe0p-1F, 0x1.29e9ep-1F, 0x1.2387a6p-1F, 0x1.1d4874p-1F,
    0x1.172b84p-1F, 0x1.11301ep-1F, 0x1.0b5586p-1F, 0x1.059b0ep-1F};

#endif
