// A tile of groups in the form the fast solver works on: in lanes of sixteen, magnitudes sorted, with prefix sums.
//
// For the scales only counts and sums of |w| between thresholds matter. With the magnitudes sorted once, an iteration of the
// solver is a few binary searches and a K x K solve, without a pass over the weights.
#ifndef FEATHERWEIGHT_SORTED_TILE_H
#define FEATHERWEIGHT_SORTED_TILE_H

#include "kernels.h"
#include "simd.h"
#include "sort_lanes.h"

namespace {

constexpr int kPivots = 16;

// How a group of n weights lies in memory: rows padded to a power of two, and an extra stride for positions past the end.
struct Shape {
  int64_t n, padded, stride;

  explicit Shape(int64_t length) : n(length), padded(kBlock) {
    while (padded < n) padded *= 2;
    stride = padded / kPivots;
  }
  int64_t sorted_size() const { return (padded + stride) * kLanes; }  // int32 of one batch of lanes
  int64_t prefix_size() const { return (n + 1) * kLanes; }            // double
};

// Memory of a tile, cut from one block.
struct SortedTile {
  Shape shape;
  int64_t batches;
  int32_t* sorted;
  double* prefix;
  float* lanes;      // [padded][16], the batch being sorted, with signs
  double* group;     // one group in double
  void* group_work;  // trit_group_bytes(n)

  SortedTile(void* work, int64_t n, int64_t groups) : shape(n), batches((groups + kLanes - 1) / kLanes) {
    const int64_t most = tile_groups(n) / kLanes;
    sorted = static_cast<int32_t*>(work);
    prefix = reinterpret_cast<double*>(sorted + most * shape.sorted_size());
    lanes = reinterpret_cast<float*>(prefix + most * shape.prefix_size());
    group = reinterpret_cast<double*>(lanes + shape.padded * kLanes);
    group_work = group + n;
  }

  int32_t* sorted_batch(int64_t batch) const { return sorted + batch * shape.sorted_size(); }
  double* prefix_batch(int64_t batch) const { return prefix + batch * shape.prefix_size(); }

  // Fill batch `batch` of the tile. Lanes past the end repeat the last group. False if a weight is NaN or infinite.
  bool fill(const TritTile& tile, int64_t batch) const {
    int32_t* rows = sorted_batch(batch);
    transpose(tile, batch, rows);
    for (int64_t i = shape.n * kLanes; i < shape.sorted_size(); ++i) rows[i] = INT32_MAX;
    sort_lanes(rows, shape.padded);
    int32_t largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t last = rows[(shape.n - 1) * kLanes + lane];
      largest = last > largest ? last : largest;
    }
    if (largest >= 0x7f800000) return false;
    sum_prefixes(rows, prefix_batch(batch));
    return true;
  }

  // The signed weights of a batch that was filled before, to `lanes`.
  void reload(const TritTile& tile, int64_t batch) const {
    for (int lane = 0; lane < lanes_in(tile, batch); ++lane)
      for (int64_t i = 0; i < shape.n; ++i) lanes[i * kLanes + lane] = tile.w[batch * kLanes + lane][i];
  }

  static int lanes_in(const TritTile& tile, int64_t batch) {
    const int64_t left = tile.groups - batch * kLanes;
    return static_cast<int>(left < kLanes ? left : kLanes);
  }

 private:
  // Signed weights to lanes, bits of magnitudes to rows.
  void transpose(const TritTile& tile, int64_t batch, int32_t* rows) const {
    const float* w[kLanes];
    const int present = lanes_in(tile, batch);
    for (int lane = 0; lane < kLanes; ++lane) w[lane] = tile.w[batch * kLanes + (lane < present ? lane : present - 1)];
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + kLanes <= shape.n; i += kLanes) transpose_block(w, i, rows);
#endif
    for (; i < shape.n; ++i)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = w[lane][i];
        int32_t bits;
        memcpy(&bits, &value, sizeof bits);
        lanes[i * kLanes + lane] = value;
        rows[i * kLanes + lane] = bits & INT32_MAX;
      }
  }

#if defined(__AVX512F__)
  // Sixteen by sixteen: in step k, lanes whose bit k differs change places.
  void transpose_block(const float* const* w, int64_t at, int32_t* rows) const {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(w[i] + at);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
      a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
      a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
      a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
      b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
      b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
      b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    const __m512i magnitude = _mm512_set1_epi32(INT32_MAX);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88);
      a[8 + i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
      a[4 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88);
      a[12 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_storeu_si512(lanes + (at + i) * kLanes, a[i]);
      _mm512_storeu_si512(rows + (at + i) * kLanes, _mm512_and_si512(a[i], magnitude));
    }
  }
#endif

  void sum_prefixes(const int32_t* rows, double* sums) const {
    constexpr int kParts = kLanes / kHalf;
    Double sum[kParts] = {};
    for (int part = 0; part < kParts; ++part) store(sums + part * kHalf, sum[part]);
    for (int64_t i = 0; i < shape.n; ++i)
      for (int part = 0; part < kParts; ++part) {
        sum[part] += widen(load<FloatHalf>(rows + i * kLanes + part * kHalf));
        store(sums + (i + 1) * kLanes + part * kHalf, sum[part]);
      }
  }
};

}  // namespace

#endif
