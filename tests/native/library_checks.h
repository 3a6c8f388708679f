// What the tests of the library's functions share: counting failures, numbers that are the same everywhere.
#ifndef FEATHERWEIGHT_TESTS_LIBRARY_CHECKS_H
#define FEATHERWEIGHT_TESTS_LIBRARY_CHECKS_H

#include <cstdint>
#include <cstdio>

#include "featherweight.h"

inline int failures = 0;

inline void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED (%s): %s\n", fw_isa(), what);
}

// A small generator of its own: the same numbers everywhere.
struct Random {
  uint64_t state = 0x9e3779b97f4a7c15U;

  double uniform() {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
  double bell() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

#endif
