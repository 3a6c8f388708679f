// What the native tests share: counting failures, numbers that are the same everywhere.
#ifndef FEATHERWEIGHT_TESTS_CHECKS_H
#define FEATHERWEIGHT_TESTS_CHECKS_H

#include <cstdint>
#include <cstdio>

inline int failures = 0;

inline bool expect(bool holds, const char* isa, const char* what) {
  if (holds) return true;
  // A broken kernel fails thousands of cases; the first ones say enough.
  if (++failures <= 40) std::printf("FAILED (%s): %s\n", isa, what);
  return false;
}

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15U;

  uint32_t bits() {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<uint32_t>(state >> 32);
  }
  int below(int count) { return static_cast<int>(bits() % static_cast<uint32_t>(count)); }
  float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24F; }  // [0, 1)
  float symmetric() { return 2.0F * uniform() - 1.0F; }
  template <typename T, int N>
  T one_of(const T (&choices)[N]) {
    return choices[below(N)];
  }
};

#endif
