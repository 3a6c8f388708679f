// The shapes of AMX's tile registers, and the kernels that use them: integers in product_amx.cpp, bfloat16 in
// product_amx_bf16.cpp.
#ifndef FEATHERWEIGHT_PRODUCT_AMX_H
#define FEATHERWEIGHT_PRODUCT_AMX_H

#include <stdint.h>

#include "product_kernels.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3 are sums [tokens][16 rows], 4 and 5 activations [tokens][row_bytes], 6 and 7 weights [steps][64].
inline void configure_tiles(int64_t tokens, int64_t row_bytes, int64_t steps) {
  TileConfig config;
  for (int r = 0; r < 8; ++r) {
    config.row_bytes[r] = static_cast<uint16_t>(r == 4 || r == 5 ? row_bytes : 64);
    config.rows[r] = static_cast<uint8_t>(r >= 6 ? steps : tokens);
  }
  // Not the intrinsic: GCC 12 thinks it reads eight bytes and drops the stores to the others.
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void amx_plain_input(const PlainShape& shape, const float* x, int64_t token, int64_t tokens, void* to);
void amx_plain_tiles(const fw_operand* operand, const PlainInput& x, int64_t first, int64_t last, const Output& out, void* work);

#endif
