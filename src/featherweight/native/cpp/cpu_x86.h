// What an x86 processor can do, for the choices of api.cpp and product.cpp.
#ifndef FEATHERWEIGHT_CPU_X86_H
#define FEATHERWEIGHT_CPU_X86_H

#include <stdint.h>

// Of what Clang 14's __builtin_cpu_supports does not know.
inline bool x86_has_f16c() {
  uint32_t a = 1, b = 0, c = 0, d = 0;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (c >> 29 & 1) != 0;
}

inline bool x86_has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && x86_has_f16c() && __builtin_cpu_supports("bmi2");
}

inline bool x86_has_avx512() {
  return x86_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif
