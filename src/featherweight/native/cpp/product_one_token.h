// Matrix-vector products with integer activations: tiles are streamed from memory, see product_tiles.cpp.
#ifndef FEATHERWEIGHT_PRODUCT_ONE_TOKEN_H
#define FEATHERWEIGHT_PRODUCT_ONE_TOKEN_H

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "product_codes.h"
#include "product_kernels.h"
#include "product_offsets.h"
#include "product_scales.h"

namespace {  // compiled for several instruction sets

constexpr int kStreams = 2;  // tiles at once, each from another stretch of the matrix

// Steps through the segments of `Tiles` tiles, of which the first `live` count. Reader(x, steps, sums) adds up one segment's
// integers: `Sets` sums at once, or, for FIELDS, those of one plane after the other.
template <int Sets, int Tiles, typename Reader>
FW_INLINE void one_token(const fw_operand* operand, const IntegerInput& x, const int64_t (&tiles)[Tiles], int live,
                         const Output& out, Reader& read) {
  const int planes = operand->tied ? 1 : operand->planes;
  Floats total[Tiles];
  for (Floats& f : total) f = zero_floats();
  const int8_t* at = x.codes;
  int64_t group = 0, left = operand->segments_per_group;
  for (int64_t segment = 0; segment < operand->segments; ++segment, at += 4 * operand->steps) {
    const Floats x_scale = spread(x.scales[segment]);
    const int32_t x_sum = x.sums[segment];
    for (int plane = 0; plane < planes; plane += Sets) {
      Sums sum[Sets][Tiles];
      for (int t = 0; t < Tiles; ++t)  // sums begin with what the zero points take away
        for (int p = 0; p < Sets; ++p)
          sum[p][t] = operand->has_zeros ? times(load_bytes(tile_zeros(operand, tiles[t]) + 16 * group), spread(-x_sum))
                                         : spread(-operand->offset * x_sum);
      read(at, segment_steps(operand, segment), sum);
      for (int p = 0; p < Sets; ++p) {
        Floats scale[Tiles];
        load_scales(operand, tiles, group * planes + plane + p, scale);
        for (int t = 0; t < Tiles; ++t) total[t] = add(total[t], times(to_floats(sum[p][t]), times(scale[t], x_scale)));
      }
    }
    if (--left == 0) {
      ++group;
      left = operand->segments_per_group;
    }
  }
  if (x.group_sums) add_offsets(operand, tiles, x.group_sums, total);
  for (int t = 0; t < live; ++t) put(out, operand->rows, tiles[t], 0, total[t]);
}

template <int Bits, int Tiles>
struct FieldsReader {
  const uint8_t* codes[Tiles];
  int64_t chunk;
  FieldsReader(const fw_operand* operand, const int64_t (&tiles)[Tiles]) : chunk(chunk_steps(operand)) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  FW_INLINE void operator()(const int8_t* x, int64_t steps, Sums (&sum)[1][Tiles]) {
    constexpr int64_t kShort = 8;  // groups of 32, of tied planes above all: as a loop they take an eighth more
    if (Bits == 4 && steps == kShort)
      accumulate_fields<Bits, Tiles>(codes, kShort, kShort, x, sum[0]);
    else
      accumulate_fields<Bits, Tiles>(codes, steps, chunk, x, sum[0]);
    for (int t = 0; t < Tiles; ++t) codes[t] += steps * kStepBytes * Bits / 8;
  }
};

template <int Tiles>
struct QuartetReader {
  const uint8_t* codes[Tiles];
  int64_t steps;
  QuartetReader(const fw_operand* operand, const int64_t (&tiles)[Tiles]) : steps(operand->steps) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
  }
  FW_INLINE void operator()(const int8_t* x, int64_t, Sums (&sum)[1][Tiles]) {
    accumulate_quartets<Tiles>(codes, steps, x, sum[0]);
    for (int t = 0; t < Tiles; ++t) codes[t] += steps * 10;
  }
};

#if defined(FW_HAS_TRITS)
// Sets: sums that are kept, one for each plane, or one for tied planes.
template <int Planes, int Sets, int Tiles, int Steps>
struct TritReader {
  const uint8_t* codes[Tiles];
  int64_t vectors;
  int phase = 0;
  TritTables tables[Planes];
  TritReader(const fw_operand* operand, const int64_t (&tiles)[Tiles]) : vectors(operand->steps / 5) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
    for (int p = 0; p < Planes; ++p) tables[p] = operand->tied ? weighted(operand->weights[p]) : kTritTables;
  }
  void move_to(const fw_operand* operand, const int64_t (&tiles)[Tiles]) {
    for (int t = 0; t < Tiles; ++t) codes[t] = tile_codes(operand, tiles[t]);
    phase = 0;
  }
  FW_INLINE void operator()(const int8_t* x, int64_t, Sums (&sum)[Sets][Tiles]) {
    int64_t used = 0;
    if constexpr (Steps == 0) {
      used = accumulate_trits<Planes, Tiles, 0, 0, Sets>(codes, vectors, x, tables, sum);
    } else {
      switch (phase) {
        case 0: used = accumulate_trits<Planes, Tiles, Steps, 0, Sets>(codes, vectors, x, tables, sum); break;
        case 1: used = accumulate_trits<Planes, Tiles, Steps, 1, Sets>(codes, vectors, x, tables, sum); break;
        case 2: used = accumulate_trits<Planes, Tiles, Steps, 2, Sets>(codes, vectors, x, tables, sum); break;
        case 3: used = accumulate_trits<Planes, Tiles, Steps, 3, Sets>(codes, vectors, x, tables, sum); break;
        default: used = accumulate_trits<Planes, Tiles, Steps, 4, Sets>(codes, vectors, x, tables, sum); break;
      }
      phase = (phase + Steps) % 5;
    }
    for (int t = 0; t < Tiles; ++t) codes[t] += used;
  }
};
#endif

// Tiles [first, last) in streams: `Tiles` tiles at once, each from another stretch, then those that are left.
template <template <int> class Reader, int Sets, int Tiles>
void stream_tiles(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out) {
  if (first >= last) return;
  const int64_t stretch = (last - first) / Tiles, left = (last - first) % Tiles;
  int64_t tiles[Tiles];
  for (int t = 0; t < Tiles; ++t) tiles[t] = first;
  Reader<Tiles> read(operand, tiles);
  for (int64_t i = 0; i < stretch + (left > 0); ++i) {
    const int live = static_cast<int>(i < stretch ? Tiles : left);
    for (int t = 0; t < Tiles; ++t)
      tiles[t] = i < stretch ? first + t * stretch + i : std::min(first + Tiles * stretch + t, last - 1);
    read.move_to(operand, tiles);
    one_token<Sets, Tiles>(operand, x, tiles, live, out, read);
  }
}

template <int Bits>
struct FieldsOf {
  template <int Tiles>
  using Reader = FieldsReader<Bits, Tiles>;
};
#if defined(FW_HAS_TRITS)
template <int Planes, int Sets, int Steps>
struct TritsOf {
  template <int Tiles>
  using Reader = TritReader<Planes, Sets, Tiles, Steps>;
};

template <int Planes, int Sets, int Tiles>
void stream_trits(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out) {
  switch (packed_segments(operand->steps) ? operand->steps : 0) {
    case 8: return stream_tiles<TritsOf<Planes, Sets, 8>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    case 16: return stream_tiles<TritsOf<Planes, Sets, 16>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    case 32: return stream_tiles<TritsOf<Planes, Sets, 32>::template Reader, Sets, Tiles>(operand, x, first, last, out);
    default: return stream_tiles<TritsOf<Planes, Sets, 0>::template Reader, Sets, Tiles>(operand, x, first, last, out);
  }
}
#endif

}  // namespace

#endif
