// The operations that are compiled once for every instruction set and chosen at run time.
#ifndef FEATHERWEIGHT_KERNELS_H
#define FEATHERWEIGHT_KERNELS_H

#include <stdint.h>

#include "trit_group.h"

// Groups of equal length n that are solved together. For group i: weights (float32) at w[i], codes [n] to codes[i], scales
// to scales[i], steps to *steps[i].
struct TritTile {
  const TritJob* job;
  int64_t n;
  int64_t groups;
  const float* const* w;
  uint8_t* const* codes;
  double* const* scales;
  uint8_t* const* steps;
  uint8_t* moving;  // [cap + 1]
  void* work;       // trit_tile_bytes(n, planes) bytes, aligned to 64
};

struct Kernels {
  const char* name;
  // Solve a tile of at most tile_groups(n) groups. Returns the first group with a NaN or Inf, or -1.
  int64_t (*solve)(const TritTile& tile);
  // The trit step alone, with tile.scales as input.
  void (*assign)(const TritTile& tile);
  // out[i] = ((s0 t0 + s1 t1) + s2 t2) for i < n, or tied: s0 times the integer code.
  void (*combine)(const int8_t* const* trits, const float* scales, int planes, int tied, int64_t n, float* out);
  // missed = sum (a - b)^2 and total = sum a^2 in double, in a fixed order of 16 partial sums.
  void (*squares)(const float* a, const float* b, int64_t n, double* missed, double* total);
  void (*widen)(const uint16_t* values, int half, int64_t n, float* out);
};

// Groups in a tile, and work space for one. Sorted groups of a tile are meant to stay in a second-level cache.
int64_t tile_groups(int64_t n);
int64_t tile_bytes(int64_t n);
constexpr int64_t kLongestSorted = 16384;  // longer groups go through trit_group.h

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

#endif
