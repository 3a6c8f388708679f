// What the tests of operators share: the instruction sets that there are, checks that name them, a hash of results.
#ifndef FEATHERWEIGHT_TESTS_PRODUCT_CHECKS_H
#define FEATHERWEIGHT_TESTS_PRODUCT_CHECKS_H

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "product.h"

inline std::vector<const char*> available_isas() {
  std::vector<const char*> found;
  for (const char* isa : {"baseline", "avx2", "avxvnni", "avx512", "vbmi", "bf16", "amx", "neon", "i8mm"})
    if (fw_select_isa(isa) == FW_OK && std::strcmp(fw_product_isa(), isa) == 0) found.push_back(isa);
  return found;
}

inline const std::vector<const char*> kIsas = available_isas();

inline void check(bool holds, const std::string& what) { expect(holds, fw_product_isa(), what.c_str()); }

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline uint64_t hash = 14695981039346656037U;

inline void add_to_hash(const std::vector<float>& values) {
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    hash = (hash ^ bits) * 1099511628211U;
  }
}

// The hash is the same on all processors.
inline int report(const char* tested) {
  std::printf("instruction sets:");
  for (const char* isa : kIsas) std::printf(" %s", isa);
  std::printf("\n%s: %s; results %016llx\n", tested, failures ? "FAILED" : "all tests passed",
              static_cast<unsigned long long>(hash));
  return failures ? 1 : 0;
}

#endif
