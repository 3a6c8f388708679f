// Products with activations as they are: all layouts whose lanes are rows, from unpacked codes, and those whose lanes are
// columns.
#ifndef FEATHERWEIGHT_PRODUCT_FLOATS_H
#define FEATHERWEIGHT_PRODUCT_FLOATS_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "product_many_tokens.h"
#include "product_offsets.h"

namespace {  // compiled for several instruction sets

// Sums over the columns of a segment run in their order, row by row in the lanes.
template <int Tokens>
FW_INLINE void float_block(const fw_operand* operand, const FloatInput& x, int64_t first_token, int64_t tile,
                           const uint8_t* const (&codes)[3], const Output& out) {
  const int planes = unpacked_planes(operand);
  const TileScales scales(operand, tile);
  const int count = static_cast<int>(std::min<int64_t>(Tokens, x.tokens - first_token));
  Floats total[Tokens];
  for (Floats& f : total) f = zero_floats();
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const int64_t group = segment / operand->segments_per_group, end = segment * operand->steps + segment_steps(operand, segment);
    const Floats zero = scales.zeros ? to_floats(load_bytes(scales.zeros + 16 * group)) : spread(static_cast<float>(operand->offset));
    for (int plane = 0; plane < planes; ++plane) {
      Floats sum[Tokens];
      for (Floats& f : sum) f = zero_floats();
      for (int64_t step = segment * operand->steps; step < end; ++step) {
        const Codes now = load_codes(codes[plane] + kStepBytes * step);
        each<4>([&](auto j) FW_LAMBDA {
          const Floats level = subtract(column<decltype(j)::value>(now), zero);
          for (int m = 0; m < Tokens; ++m) {
            const int64_t token = first_token + std::min(m, count - 1);
            sum[m] = add(sum[m], times(level, spread(x.values[token * x.columns + 4 * step + j])));
          }
        });
      }
      const Floats scale = load_scales(operand, scales.scales, group * planes + plane);
      for (int m = 0; m < Tokens; ++m) total[m] = add(total[m], times(sum[m], scale));
    }
  }
  if (x.group_sums) {
    Floats part[Tokens];
    offset_parts(operand, tile, x.group_sums + first_token * operand->groups, count, part);
    for (int m = 0; m < Tokens; ++m) total[m] = add(total[m], part[m]);
  }
  for (int m = 0; m < count; ++m) put(out, operand->rows, tile, first_token + m, total[m]);
}

void float_tiles(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void* work) {
  uint8_t* space = static_cast<uint8_t*>(work);
  for (int64_t tile = first; tile < last; ++tile) {
    const uint8_t* codes[3] = {};
    for (int plane = 0; plane < unpacked_planes(operand); ++plane) {
      uint8_t* to = space + plane * unpacked_bytes(operand);
      unpack_tile(operand, tile, plane, to);
      codes[plane] = to;
    }
    int64_t token = 0;
    for (; token + 4 <= x.tokens; token += 4) float_block<4>(operand, x, token, tile, codes, out);
    for (; token < x.tokens; ++token) float_block<1>(operand, x, token, tile, codes, out);
  }
}

// ---- lanes are columns ----

// Sixteen partial sums are added in halves: the same bits everywhere.
FW_INLINE float total(Floats f) {
  alignas(64) float v[16];
  store_floats(v, f);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// Codes of 16 columns as bytes; `unit` of 16-byte vectors.
template <int Bits, int I>
FW_INLINE void row_step(const uint8_t* unit, uint8_t* to) {
  constexpr FieldParts kParts = field_parts(Bits);
  for (int j = 0; j < 16; ++j) {
    int code = 0;
    each<kParts.count>([&](auto n) FW_LAMBDA {
      constexpr FieldPart part = kParts.part[decltype(n)::value];
      if constexpr (part.step == I) code |= (unit[16 * part.vector + j] >> part.to & ((1 << part.count) - 1)) << part.from;
    });
    to[j] = static_cast<uint8_t>(code);
  }
}

template <int Bits, int Tokens>
FW_INLINE void table_block(const fw_operand* operand, const FloatInput& x, int64_t token, int64_t row, const Output& out) {
  constexpr int kUnit = unit_steps(Bits);
  constexpr int64_t kUnitBytes = kUnit * 2 * Bits;
  const int64_t columns = operand->steps * 4;
  const uint8_t* codes = tile_codes(operand, 0) + row * (operand->codes_per_tile / kTileRows);
  const float* tables = reinterpret_cast<const float*>(tile_scales(operand, 0)) + row * operand->groups * (1 << Bits);
  Floats sum[Tokens];
  for (Floats& f : sum) f = zero_floats();
  alignas(64) float table[16] = {};
  alignas(16) uint8_t index[16];
  for (int64_t segment = 0; segment < operand->segments; ++segment) {
    const float* entries = tables + segment / operand->segments_per_group * (1 << Bits);
    if (Bits <= 4) memcpy(table, entries, sizeof(float) * std::min(16, 1 << Bits));
    for (int64_t c = 0; c < columns; c += 16 * kUnit, codes += kUnitBytes)
      each<kUnit>([&](auto i) FW_LAMBDA {
        row_step<Bits, decltype(i)::value>(codes, index);
        Floats weight;
        if constexpr (Bits <= 4) {
          weight = look_up16(table, index);
        } else {
          alignas(64) float found[16];
          for (int j = 0; j < 16; ++j) found[j] = entries[index[j]];
          weight = load_floats(found);
        }
        for (int m = 0; m < Tokens; ++m)
          sum[m] = add(sum[m], times(weight, load_floats(x.values + (token + m) * x.columns + segment * columns + c + 16 * i)));
      });
  }
  for (int m = 0; m < Tokens; ++m) {
    float& to = out.values[(token + m) * out.stride + row];
    to = out.accumulate ? to + total(sum[m]) : total(sum[m]);
  }
}

template <int Bits>
void table_rows(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out) {
  for (int64_t row = first; row < last; ++row) {
    int64_t token = 0;
    for (; token + 4 <= x.tokens; token += 4) table_block<Bits, 4>(operand, x, token, row, out);
    for (; token < x.tokens; ++token) table_block<Bits, 1>(operand, x, token, row, out);
  }
}

void float_rows(const fw_operand* operand, const FloatInput& x, int64_t first, int64_t last, const Output& out, void*) {
  const int64_t begin = first * kTileRows, end = std::min(operand->rows, last * kTileRows);
  switch (operand->bits) {
    case 1: return table_rows<1>(operand, x, begin, end, out);
    case 2: return table_rows<2>(operand, x, begin, end, out);
    case 3: return table_rows<3>(operand, x, begin, end, out);
    case 4: return table_rows<4>(operand, x, begin, end, out);
    case 5: return table_rows<5>(operand, x, begin, end, out);
    case 6: return table_rows<6>(operand, x, begin, end, out);
    case 7: return table_rows<7>(operand, x, begin, end, out);
    default: return table_rows<8>(operand, x, begin, end, out);
  }
}

}  // namespace

#endif
