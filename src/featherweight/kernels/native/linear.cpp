#include "linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"
#include "product_input.h"
#include "product_layout.h"

namespace {

constexpr int kMostTerms = 64;  // of all layers of one call

const fw_operand* first_operand(const fw_term& term) {
  return static_cast<const fw_operand*>(term.kind == FW_TERM_LOW_RANK ? term.right : term.operand);
}

bool same_steps(const fw_term& a, const fw_term& b) {
  if (a.steps != b.steps) return false;
  for (int i = 0; i < a.steps; ++i) {
    const fw_step &s = a.step[i], &t = b.step[i];
    if (s.kind != t.kind || s.block != t.block || s.bits != t.bits) return false;
    if (s.order == t.order && s.values == t.values) continue;
    return false;
  }
  return true;
}

bool same_contents(const fw_step& s, const fw_step& t, int64_t cols) {
  if (s.kind != t.kind || s.block != t.block || s.bits != t.bits) return false;
  if (s.kind == FW_PERMUTE) return s.order == t.order || std::equal(s.order, s.order + cols, t.order);
  if (s.kind == FW_SCALE || s.kind == FW_HADAMARD) {
    if (!s.values || !t.values) return s.values == t.values;
    return s.values == t.values || std::equal(s.values, s.values + cols, t.values);
  }
  return true;
}

}  // namespace

struct Rows {  // float rows that grow
  Memory memory;
  int64_t bytes = 0;
  float* get() const { return static_cast<float*>(memory.get()); }
  void reserve(int64_t count) {
    if (count * 4 <= bytes) return;
    memory = allocate(count * 4 + 128);
    bytes = count * 4;
  }
};

struct LinearWork::Buffers {
  std::vector<Memory> member;  // work space of each member
  int64_t member_bytes = 0;
  std::vector<InputBuffers> inputs;
  std::vector<Rows> stepped;   // inputs after steps
  Rows ranks, ranks_input;     // low rank: products with the right factors
  InputBuffers rank_input;
};

LinearWork::LinearWork() : buffers_(new Buffers) {}
LinearWork::~LinearWork() = default;

namespace {

// An input that terms share: which steps lead to it and how it is laid out.
struct Source {
  const fw_term* term;
  InputShape shape;
  bool plain;  // read as it is by a sparse term
};

struct Item {
  const LinearCall* call;
  const fw_term* term;
  int source, steps;  // indices of the prepared input and of the row of values it is made from (-1: x itself)
};

bool equal_steps(const fw_term& a, const fw_term& b, int64_t cols) {
  if (same_steps(a, b)) return true;
  if (a.steps != b.steps) return false;
  for (int i = 0; i < a.steps; ++i)
    if (!same_contents(a.step[i], b.step[i], cols)) return false;
  return true;
}

struct Plan {
  Item items[kMostTerms];
  const fw_term* chains[kMostTerms];  // distinct chains of steps
  InputShape shapes[kMostTerms];      // distinct prepared inputs
  int shape_chain[kMostTerms];
  int count = 0, chain_count = 0, shape_count = 0;
};

void make_plan(const LinearCall* calls, int count, int precision, Plan& plan) {
  for (int i = 0; i < count; ++i) {
    const fw_linear& linear = *calls[i].linear;
    for (int64_t k = 0; k < linear.terms && plan.count < kMostTerms; ++k) {
      const fw_term& term = linear.term[k];
      int chain = -1;
      if (term.steps > 0) {
        for (chain = 0; chain < plan.chain_count; ++chain)
          if (equal_steps(*plan.chains[chain], term, linear.cols)) break;
        if (chain == plan.chain_count) plan.chains[plan.chain_count++] = &term;
      }
      int source = -1;
      if (term.kind != FW_TERM_SPARSE) {
        const InputShape shape = input_shape(first_operand(term), precision);
        for (source = 0; source < plan.shape_count; ++source)
          if (plan.shape_chain[source] == chain && plan.shapes[source] == shape) break;
        if (source == plan.shape_count) {
          plan.shape_chain[source] = chain;
          plan.shapes[plan.shape_count++] = shape;
        }
      }
      plan.items[plan.count++] = {&calls[i], &term, source, chain};
    }
  }
}

void reserve(LinearWork::Buffers& buffers, const LinearCall* calls, int count, int64_t tokens, int precision, int threads) {
  Plan plan;
  make_plan(calls, count, precision, plan);
  if (static_cast<int>(buffers.inputs.size()) < plan.shape_count) buffers.inputs.resize(static_cast<size_t>(plan.shape_count));
  if (static_cast<int>(buffers.stepped.size()) < plan.chain_count) buffers.stepped.resize(static_cast<size_t>(plan.chain_count));
  for (int s = 0; s < plan.shape_count; ++s) buffers.inputs[static_cast<size_t>(s)].reserve(plan.shapes[s], tokens);
  int64_t work = 64, ranks = 0;
  for (int i = 0; i < plan.count; ++i) {
    const fw_term& term = *plan.items[i].term;
    if (plan.items[i].steps >= 0)
      buffers.stepped[static_cast<size_t>(plan.items[i].steps)].reserve(tokens * plan.items[i].call->linear->cols + 16);
    if (term.kind == FW_TERM_SPARSE) continue;
    work = std::max(work, product_work_bytes(first_operand(term), tokens));
    if (term.kind == FW_TERM_LOW_RANK) {
      const fw_operand* left = static_cast<const fw_operand*>(term.operand);
      work = std::max(work, product_work_bytes(left, tokens));
      ranks = std::max(ranks, left->cols);
      buffers.rank_input.reserve(input_shape(left, FW_ACTIVATION_FLOAT), tokens);
    }
  }
  buffers.ranks.reserve(tokens * ranks + 16);
  // Steps go through a second row a member.
  int64_t cols = 0;
  for (int i = 0; i < count; ++i) cols = std::max(cols, calls[i].linear->cols);
  work += cols * 4 + 64;
  if (work > buffers.member_bytes || static_cast<int>(buffers.member.size()) < threads) {
    buffers.member.clear();
    for (int i = 0; i < threads; ++i) buffers.member.push_back(allocate(work));
    buffers.member_bytes = work;
  }
}

// x through a chain of steps; `spare` is a row of scratch.
void run_steps(const fw_term& chain, const float* x, int64_t cols, float* to, float* spare) {
  // The last step must end in `to`.
  const float* from = x;
  for (int i = 0; i < chain.steps; ++i) {
    float* place = (chain.steps - 1 - i) % 2 == 0 ? to : spare;
    apply_step(chain.step[i], from, cols, place);
    from = place;
  }
}

// Columns that a chain of one Hadamard step and all inputs made from it can be done in, one run after the other; 0 if the
// chain must be done as a whole.
int64_t fused_run(const Plan& plan, int chain, int64_t cols) {
  const fw_term& term = *plan.chains[chain];
  if (term.steps != 1 || term.step->kind != FW_HADAMARD) return 0;
  int64_t run = term.step->block;
  bool read = false;
  for (int s = 0; s < plan.shape_count; ++s) {
    if (plan.shape_chain[s] != chain) continue;
    // Two inputs would be rotated by different members: once is enough, so only the usual case of one is fused.
    if (read || plan.shapes[s].lane_stride != 1) return 0;
    read = true;
    const int64_t segment = plan.shapes[s].segment;
    if (run % segment != 0 && segment % run != 0) return 0;
    run = std::max(run, segment);
  }
  return read && cols % run == 0 ? run : 0;
}

void rotate(const fw_step& step, const float* x, int64_t first, int64_t last, float* to) {
  std::copy(x + first, x + last, to + first);
  product_kernels().hadamard(to + first, step.values ? step.values + first : nullptr, step.block, last - first);
}

// A member's share of a product, in pieces of some milliseconds between which it can be stopped. Whole pairs, quadruples and
// eights of tiles stay together as the kernels take them.
void product_in_pieces(const LinearWork& work, const fw_operand* operand, const InputShape& shape, const InputBuffers& input,
                       int64_t tokens, int64_t first, int64_t last, const Output& out, void* own) {
  constexpr int64_t kTogether = 8, kProducts = int64_t{1} << 27;
  if (!work.stop || tokens == 1) return product_share(operand, shape, input, tokens, first, last, out, own);
  const int64_t piece = round_up(kProducts / (kTileRows * operand->cols * tokens) + 1, kTogether);
  for (int64_t at = first; at < last && work.stop->load(std::memory_order_relaxed) == 0; at += piece)
    product_share(operand, shape, input, tokens, at, std::min(last, at + piece), out, own);
}

void sparse_product(const fw_term& term, const float* x, int64_t x_stride, int64_t tokens, int64_t first, int64_t last,
                    const Output& out) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0.0F;
      for (int32_t e = term.row_pointers[row]; e < term.row_pointers[row + 1]; ++e)
        sum += term.values[e] * x[t * x_stride + term.columns[e]];
      float& to = out.values[t * out.stride + row];
      to = out.accumulate ? to + sum : sum;
    }
}

}  // namespace

void linear_reserve(LinearWork& work, const LinearCall* calls, int count, int64_t tokens, int precision, int threads) {
  reserve(work.buffers(), calls, count, tokens, precision, threads);
}

void linear_apply(Team& team, LinearWork& work, const LinearCall* calls, int count, const float* x, int64_t tokens,
                  int64_t x_stride, int precision) {
  LinearWork::Buffers& buffers = work.buffers();
  Plan plan;
  make_plan(calls, count, precision, plan);
  const int64_t cols = calls[0].linear->cols;
  char* own = static_cast<char*>(buffers.member[static_cast<size_t>(team.index())].get());
  float* spare = reinterpret_cast<float*>(own + round_up(buffers.member_bytes - cols * 4 - 64, 64));

  const auto stepped = [&](int chain, int64_t t) { return buffers.stepped[static_cast<size_t>(chain)].get() + t * cols; };
  bool wait = false;
  for (int c = 0; c < plan.chain_count; ++c) {
    if (fused_run(plan, c, cols) > 0) continue;
    // A token's chain is not divided: members take tokens, and chains in turn.
    wait = true;
    for (int64_t t = 0; t < tokens; ++t)
      if ((t + c) % team.size() == team.index()) run_steps(*plan.chains[c], x + t * x_stride, cols, stepped(c, t), spare);
  }
  if (wait) team.barrier();
  const auto row = [&](int chain, int64_t t) -> const float* { return chain < 0 ? x + t * x_stride : stepped(chain, t); };
  for (int s = 0; s < plan.shape_count; ++s) {
    const InputShape& shape = plan.shapes[s];
    const int chain = plan.shape_chain[s];
    // Of a fused chain members take whole runs, rotated just before they are rounded.
    const int64_t run = chain < 0 ? 0 : fused_run(plan, chain, cols);
    const int64_t together = run > 0 ? run / shape.segment : 1, pieces = shape.segments / together;
    const auto [first, last] = team.share(tokens * pieces);
    for (int64_t at = first; at < last;) {
      const int64_t t = at / pieces, piece = at % pieces, end = std::min(pieces, piece + last - at);
      if (run > 0) rotate(*plan.chains[chain]->step, x + t * x_stride, piece * run, end * run, stepped(chain, t));
      prepare_input(shape, row(chain, t), t, tokens, buffers.inputs[static_cast<size_t>(s)], piece * together, end * together);
      at += end - piece;
    }
  }
  team.barrier();

  for (int i = 0; i < plan.count; ++i) {
    const Item& item = plan.items[i];
    const fw_linear& linear = *item.call->linear;
    const fw_term& term = *item.term;
    const Output out = {item.call->out, item.call->out_stride, &term != linear.term};
    const int64_t tiles = divide_up(linear.rows, kTileRows);
    const auto [first, last] = team.share(tiles);
    if (term.kind == FW_TERM_SPARSE) {
      sparse_product(term, row(item.steps, 0), item.steps < 0 ? x_stride : cols, tokens, first * kTileRows,
                     std::min(linear.rows, last * kTileRows), out);
    } else if (term.kind == FW_TERM_LOW_RANK) {
      const fw_operand* right = static_cast<const fw_operand*>(term.right);
      const fw_operand* left = static_cast<const fw_operand*>(term.operand);
      const auto [begin, end] = team.share(right->tiles);
      team.barrier();  // the last product may still be read
      product_in_pieces(work, right, plan.shapes[item.source], buffers.inputs[static_cast<size_t>(item.source)], tokens, begin,
                        end, {buffers.ranks.get(), right->rows, 0}, own);
      team.barrier();
      const InputShape shape = input_shape(left, FW_ACTIVATION_FLOAT);
      const auto [from, to] = team.share(tokens);
      for (int64_t t = from; t < to; ++t)
        prepare_input(shape, buffers.ranks.get() + t * right->rows, t, tokens, buffers.rank_input, 0, shape.segments);
      team.barrier();
      product_in_pieces(work, left, shape, buffers.rank_input, tokens, first, last, out, own);
    } else {
      product_in_pieces(work, static_cast<const fw_operand*>(term.operand), plan.shapes[item.source],
                        buffers.inputs[static_cast<size_t>(item.source)], tokens, first, last, out, own);
    }
    if (linear.bias && &term == linear.term + linear.terms - 1)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = first * kTileRows; r < std::min(linear.rows, last * kTileRows); ++r)
          item.call->out[t * item.call->out_stride + r] += linear.bias[r];
  }
}

int32_t fw_linear_apply(const fw_linear* linear, const float* x, int64_t tokens, int64_t x_stride, float* out,
                        int64_t out_stride, int32_t precision, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!linear || !x || !out || tokens < 0 || linear->terms < 1 || linear->terms > kMostTerms) return FW_INVALID;
    if (tokens == 0) return FW_OK;
    threads = std::max(1, threads);
    LinearWork work;
    const LinearCall call = {linear, out, out_stride};
    reserve(work.buffers(), &call, 1, tokens, precision, threads);
    run_team(threads, [&](Team& team) { linear_apply(team, work, &call, 1, x, tokens, x_stride, precision); });
    return FW_OK;
  });
}
