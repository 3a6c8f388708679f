// Which of the operators' instruction sets an AArch64 processor has.
#ifndef FEATHERWEIGHT_CPU_ARM_H
#define FEATHERWEIGHT_CPU_ARM_H

#include <string.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

struct ArmFeatures {
  bool halves, dot, matrix;  // half-precision arithmetic, SDOT, i8mm
};

#if defined(__linux__)
inline ArmFeatures arm_features() {
  // Bits of the kernel's asm/hwcap.h, which older C libraries do not have all.
  constexpr unsigned long kHalves = 1UL << 10, kDot = 1UL << 20, kMatrix = 1UL << 13;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first & kHalves) != 0, (first & kDot) != 0, (second & kMatrix) != 0};
}
#elif defined(__APPLE__)
inline bool arm_feature(const char* name) {
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present != 0;
}
inline ArmFeatures arm_features() {
  return {arm_feature("hw.optional.arm.FEAT_FP16"), arm_feature("hw.optional.arm.FEAT_DotProd"),
          arm_feature("hw.optional.arm.FEAT_I8MM")};
}
#else
inline ArmFeatures arm_features() { return {false, false, false}; }
#endif

// "neon" (with dot products) or "i8mm".
inline bool arm_supports(const char* name) {
  static const ArmFeatures features = arm_features();
  const bool neon = features.halves && features.dot;
  if (strcmp(name, "neon") == 0) return neon;
  return strcmp(name, "i8mm") == 0 && neon && features.matrix;
}

}  // namespace

#endif
