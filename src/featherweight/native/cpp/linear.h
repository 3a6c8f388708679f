// Linear layers made of terms (see product.h), inside a region of a team.
//
// Three steps: a plan of the layers that read the same input, made once; room for it and a number of tokens, made by one
// thread before a region; the products, by all members. What a call needs follows from its plan alone, and every call asks
// whether there is room for it before it writes anything.
#ifndef FEATHERWEIGHT_LINEAR_H
#define FEATHERWEIGHT_LINEAR_H

#include <stdint.h>

#include <atomic>
#include <memory>
#include <vector>

#include "product.h"
#include "product_input.h"
#include "team.h"

// FW_OK if everything a layer points to is there, fits its shape and the lengths it comes with, and refers to nothing outside.
int32_t check_linear(const fw_linear* linear);
// Whether a step can be applied to rows of `cols` values.
bool valid_step(const fw_step& step, int64_t cols);

// Layers that read the same input and are applied in one call, with what they have in common. Of any number of terms.
struct LinearPlan {
  struct Item {
    int layer;
    const fw_linear* linear;
    const fw_term* term;
    int source;  // the prepared input: index into shapes; -1 for a sparse term
    int chain;   // the row of values it is made from: index into chains; -1: the input itself
  };
  struct Shape {  // a prepared input
    InputShape shape;
    int chain;
  };
  struct Chain {  // steps
    const fw_term* term;
    int64_t run;  // columns that can be done one run after the other, together with the input made from them; 0: none
  };
  std::vector<Item> items;
  std::vector<Shape> shapes;
  std::vector<Chain> chains;
  int64_t cols = 0;

  LinearPlan() = default;
  // Of valid layers with equal numbers of columns.
  LinearPlan(const fw_linear* const* layers, int count, int precision);
};

// Buffers for the transformed and quantised inputs of layers, shared by the members of a team; grow as needed.
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

// Where one layer of a plan puts its results: out[t, row] for all rows, rows of `values` `stride` elements apart.
struct LinearOutput {
  float* values;
  int64_t stride;
};

// Makes room for a plan with up to `tokens` tokens and `threads` members: by one thread, before the region.
void linear_reserve(LinearWork& work, const LinearPlan& plan, int64_t tokens, int threads);

// Collective: every member calls it with the same arguments. x [tokens, cols] must be complete (barrier before). What layers
// have in common (steps and rounding of the input) is done once. When it returns, other members may still be writing: barrier
// before reading `outputs`. FW_INVALID, of all members alike and before anything is written, if no room was made for this.
int32_t linear_apply(Team& team, LinearWork& work, const LinearPlan& plan, const LinearOutput* outputs, const float* x,
                     int64_t tokens, int64_t x_stride);

#endif
