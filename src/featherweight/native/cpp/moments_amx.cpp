// Second moments by the tile registers of AMX: 16 by 16 sums of 32 tokens an instruction, four of them at a time.
#include "moments_lanes.h"
#include "product_amx.h"

namespace {

void begin() { configure_tiles(16, 64, 16); }
void end() { _tile_release(); }

void add(const MomentBlock& b) {
  alignas(64) float sums[4 * 256];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < b.blocks; ++i) {
    const uint32_t *left = b.left + i * kBlockWords, *right = b.right + i * kBlockWords;
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kBlockWords / 2, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kBlockWords / 2, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  for (int64_t row = 0; row < b.rows; ++row) {
    const float* of_row = sums + row / kHalf * 512 + row % kHalf * 16;
    add_sums(b, row, 0, _mm512_load_ps(of_row));
    if (b.columns > kHalf) add_sums(b, row, kHalf, _mm512_load_ps(of_row + 256));
  }
}

}  // namespace

const MomentKernels* moment_kernels_amx() {
  static const MomentKernels kernels = {begin, pack_strip, add, end};
  return &kernels;
}
