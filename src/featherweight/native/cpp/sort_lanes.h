// Sorting networks over lanes: 16 groups at once, ascending, values [rows][16] with rows a power of two of at least 16.
//
// Blocks of 16 rows are sorted in registers by Batcher's odd-even network, then merged bitonically: the passes between blocks
// take up to eight rows at a time, the last four passes of a merge stay inside a block and again in registers.
#ifndef FEATHERWEIGHT_SORT_LANES_H
#define FEATHERWEIGHT_SORT_LANES_H

#include <utility>

#include "simd.h"

namespace {

struct Comparator {
  int low, high;
};

constexpr int kBlock = 16;
constexpr int kBatcherSize = 63;  // comparators of Batcher's network for 16
constexpr int kCleanSize = 32;    // of a bitonic merge inside a block

struct BatcherNetwork {
  Comparator pairs[kBatcherSize] = {};

  constexpr BatcherNetwork() {
    int count = 0;
    for (int p = 1; p < kBlock; p *= 2)
      for (int k = p; k >= 1; k /= 2)
        for (int j = k % p; j + k < kBlock; j += 2 * k)
          for (int i = 0; i < k && i + j + k < kBlock; ++i)
            if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) pairs[count++] = {i + j, i + j + k};
  }
};

struct CleanNetwork {
  Comparator pairs[kCleanSize] = {};

  constexpr CleanNetwork() {
    int count = 0;
    for (int k = kBlock / 2; k >= 1; k /= 2)
      for (int i = 0; i < kBlock; ++i)
        if (!(i & k)) pairs[count++] = {i, i + k};
  }
};

constexpr BatcherNetwork kBatcher;
constexpr CleanNetwork kClean;

inline void compare(Int& low, Int& high) {
  const Int smaller = min_of(low, high);
  high = max_of(low, high);
  low = smaller;
}

template <const auto& Network, int... I>
inline void run_network(Int* rows, std::integer_sequence<int, I...>) {
  (compare(rows[Network.pairs[I].low], rows[Network.pairs[I].high]), ...);
}

template <const auto& Network, int Size>
inline void run_in_block(int32_t* block) {
  for (int c = 0; c < kLanes; c += kWidth) {
    Int rows[kBlock];
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) rows[i] = load<Int>(block + i * kLanes + c);
    run_network<Network>(rows, std::make_integer_sequence<int, Size>());
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) store(block + i * kLanes + c, rows[i]);
  }
}

// Rows at `place` (kept apart by the caller), compared as `pairs` say.
template <int Rows, int Count>
inline void run_across(int32_t* values, const int64_t (&place)[Rows], const Comparator (&pairs)[Count]) {
  for (int c = 0; c < kLanes; c += kWidth) {
    Int rows[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) rows[i] = load<Int>(values + place[i] * kLanes + c);
#pragma GCC unroll 12
    for (int i = 0; i < Count; ++i) compare(rows[pairs[i].low], rows[pairs[i].high]);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) store(values + place[i] * kLanes + c, rows[i]);
  }
}

constexpr Comparator kFlip32[1] = {{0, 1}};
constexpr Comparator kFlip64[4] = {{0, 3}, {1, 2}, {0, 1}, {2, 3}};
constexpr Comparator kFlip128[12] = {{0, 7}, {1, 6}, {2, 5}, {3, 4}, {0, 2}, {1, 3},
                                     {4, 6}, {5, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}};
constexpr Comparator kClean128[12] = {{0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 2}, {1, 3},
                                      {4, 6}, {5, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}};

// Merge two sorted halves of `size` rows, but for the passes inside blocks.
inline void merge_across(int32_t* values, int64_t size) {
  if (size == 32) {
    for (int64_t i = 0; i < kBlock; ++i) run_across(values, {i, 31 - i}, kFlip32);
  } else if (size == 64) {
    for (int64_t i = 0; i < kBlock; ++i) run_across(values, {i, 16 + i, 47 - i, 63 - i}, kFlip64);
  } else if (size == 128) {
    for (int64_t i = 0; i < kBlock; ++i)
      run_across(values, {i, 16 + i, 32 + i, 48 + i, 79 - i, 95 - i, 111 - i, 127 - i}, kFlip128);
  } else {
    for (int64_t i = 0; i < size / 2; ++i) run_across(values, {i, size - 1 - i}, kFlip32);
    for (int64_t k = size / 4; k >= 128; k /= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & k)) run_across(values, {i, i + k}, kFlip32);
    for (int64_t part = 0; part < size; part += 128)
      for (int64_t i = part; i < part + kBlock; ++i)
        run_across(values, {i, 16 + i, 32 + i, 48 + i, 64 + i, 80 + i, 96 + i, 112 + i}, kClean128);
  }
}

inline void sort_lanes(int32_t* values, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kBlock) run_in_block<kBatcher, kBatcherSize>(values + i * kLanes);
  for (int64_t size = 2 * kBlock; size <= rows; size *= 2) {
    for (int64_t part = 0; part < rows; part += size) merge_across(values + part * kLanes, size);
    for (int64_t i = 0; i < rows; i += kBlock) run_in_block<kClean, kCleanSize>(values + i * kLanes);
  }
}

}  // namespace

#endif
