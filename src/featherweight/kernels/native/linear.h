// Linear layers made of terms (see product.h), inside a region of a team.
#ifndef FEATHERWEIGHT_LINEAR_H
#define FEATHERWEIGHT_LINEAR_H

#include <stdint.h>

#include <atomic>
#include <memory>

#include "product.h"
#include "team.h"

// Buffers for the transformed and quantised inputs of layers, shared by the members of a team; grows as needed.
class LinearWork {
 public:
  LinearWork();
  ~LinearWork();
  struct Buffers;
  Buffers& buffers() { return *buffers_; }
  // If set and not 0, members leave their products undone but meet at all barriers: what comes out is of no use then.
  const std::atomic<int32_t>* stop = nullptr;

 private:
  std::unique_ptr<Buffers> buffers_;
};

// One layer of several that read the same input: out[t, row] for all rows, rows of `out` out_stride elements apart.
struct LinearCall {
  const fw_linear* linear;
  float* out;
  int64_t out_stride;
};

// Makes room for `tokens` tokens of layers that are applied in one call: by one thread, before the region.
void linear_reserve(LinearWork& work, const LinearCall* calls, int count, int64_t tokens, int precision, int threads);

// Collective: every member calls it with the same arguments. x [tokens, cols] must be complete (barrier before). What layers
// have in common (steps and rounding of the input) is done once. When it returns, other members may still be writing: barrier
// before reading `out`.
void linear_apply(Team& team, LinearWork& work, const LinearCall* calls, int count, const float* x, int64_t tokens,
                  int64_t x_stride, int precision);

#endif
