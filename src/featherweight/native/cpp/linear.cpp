#include "linear.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"
#include "product_input.h"
#include "product_layout.h"

namespace {

const fw_operand* left_operand(const fw_term& term) { return static_cast<const fw_operand*>(term.operand); }
const fw_operand* first_operand(const fw_term& term) {
  return static_cast<const fw_operand*>(term.kind == FW_TERM_LOW_RANK ? term.right : term.operand);
}

bool same_step(const fw_step& s, const fw_step& t, int64_t cols) {
  if (s.kind != t.kind || s.block != t.block || s.bits != t.bits) return false;
  if (s.kind == FW_PERMUTE) return s.order == t.order || std::equal(s.order, s.order + cols, t.order);
  if (s.kind == FW_SCALE || s.kind == FW_HADAMARD) {
    if (!s.values || !t.values) return s.values == t.values;
    return s.values == t.values || std::equal(s.values, s.values + cols, t.values);
  }
  return true;
}

bool same_steps(const fw_term& a, const fw_term& b, int64_t cols) {
  if (a.steps != b.steps) return false;
  for (int i = 0; i < a.steps; ++i)
    if (!same_step(a.step[i], b.step[i], cols)) return false;
  return true;
}

int find_chain(LinearPlan& plan, const fw_term& term) {
  if (term.steps == 0) return -1;
  for (size_t i = 0; i < plan.chains.size(); ++i)
    if (same_steps(*plan.chains[i].term, term, plan.cols)) return static_cast<int>(i);
  plan.chains.push_back({&term, 0});
  return static_cast<int>(plan.chains.size()) - 1;
}

int find_source(LinearPlan& plan, const fw_term& term, int chain, int precision) {
  if (term.kind == FW_TERM_SPARSE) return -1;
  const InputShape shape = input_shape(first_operand(term), precision);
  for (size_t i = 0; i < plan.shapes.size(); ++i)
    if (plan.shapes[i].chain == chain && plan.shapes[i].shape == shape) return static_cast<int>(i);
  plan.shapes.push_back({shape, chain});
  return static_cast<int>(plan.shapes.size()) - 1;
}

// Columns that a chain of one Hadamard step and all inputs made from it can be done in, one run after the other; 0 if the
// chain must be done as a whole.
int64_t fused_run(const LinearPlan& plan, int chain) {
  const fw_term& term = *plan.chains[static_cast<size_t>(chain)].term;
  if (term.steps != 1 || term.step->kind != FW_HADAMARD) return 0;
  int64_t run = term.step->block;
  bool read = false;
  for (const LinearPlan::Shape& s : plan.shapes) {
    if (s.chain != chain) continue;
    // Two inputs would be rotated by different members: once is enough, so only the usual case of one is fused.
    if (read || s.shape.lane_stride != 1) return 0;
    read = true;
    const int64_t segment = s.shape.segment;
    if (run % segment != 0 && segment % run != 0) return 0;
    run = std::max(run, segment);
  }
  return read && plan.cols % run == 0 ? run : 0;
}

}  // namespace

LinearPlan::LinearPlan(const fw_linear* const* layers, int count, int precision) {
  cols = layers[0]->cols;
  for (int i = 0; i < count; ++i)
    for (int64_t k = 0; k < layers[i]->terms; ++k) {
      const fw_term& term = layers[i]->term[k];
      const int chain = find_chain(*this, term), source = find_source(*this, term, chain, precision);
      items.push_back({i, layers[i], &term, source, chain});
    }
  for (size_t i = 0; i < chains.size(); ++i) chains[i].run = fused_run(*this, static_cast<int>(i));
}

// ---- room ----

namespace {

struct Rows {  // float rows that grow
  Memory memory;
  int64_t count = 0;
  float* get() const { return static_cast<float*>(memory.get()); }
  void reserve(int64_t wanted) {
    if (wanted <= count) return;
    memory = allocate(wanted * 4 + 128);
    count = wanted;
  }
};

// What a plan takes for some tokens; of floats, unless it says bytes.
struct Need {
  int64_t work_bytes = 64, spare = 0, ranks = 0;

  Need(const LinearPlan& plan, int64_t tokens) : spare(plan.cols) {
    for (const LinearPlan::Shape& s : plan.shapes) spare = std::max(spare, s.shape.padded);
    for (const LinearPlan::Item& item : plan.items) {
      if (item.term->kind == FW_TERM_SPARSE) continue;
      work_bytes = std::max(work_bytes, product_work_bytes(first_operand(*item.term), tokens));
      if (item.term->kind != FW_TERM_LOW_RANK) continue;
      const fw_operand* left = left_operand(*item.term);
      work_bytes = std::max(work_bytes, product_work_bytes(left, tokens));
      ranks = std::max(ranks, tokens * left->cols);
      spare = std::max(spare, left->steps * 4);
    }
  }
};

}  // namespace

struct LinearWork::Buffers {
  struct Member {
    Memory work;
    int64_t work_bytes = 0;
    Rows spare;  // steps go through a second row, and so do columns that are put in another order
  };
  std::vector<Member> members;
  std::vector<InputBuffers> inputs;
  std::vector<Rows> stepped;  // inputs after steps
  Rows ranks;                 // low rank: products with the right factors
  InputBuffers rank_input;

  void reserve(const LinearPlan& plan, int64_t tokens, int threads);
  bool hold(const LinearPlan& plan, int64_t tokens, int threads) const;
};

LinearWork::LinearWork() : buffers_(new Buffers) {}
LinearWork::~LinearWork() = default;

// In any order with others: nothing that there is room for now needs more room after this.
void LinearWork::Buffers::reserve(const LinearPlan& plan, int64_t tokens, int threads) {
  if (inputs.size() < plan.shapes.size()) inputs.resize(plan.shapes.size());
  if (stepped.size() < plan.chains.size()) stepped.resize(plan.chains.size());
  if (members.size() < static_cast<size_t>(threads)) members.resize(static_cast<size_t>(threads));
  for (size_t s = 0; s < plan.shapes.size(); ++s) inputs[s].reserve(plan.shapes[s].shape, tokens);
  for (size_t c = 0; c < plan.chains.size(); ++c) stepped[c].reserve(tokens * plan.cols);
  const Need need(plan, tokens);
  for (Member& member : members) {
    member.spare.reserve(need.spare);
    if (need.work_bytes <= member.work_bytes) continue;
    member.work = allocate(need.work_bytes);
    member.work_bytes = need.work_bytes;
  }
  ranks.reserve(need.ranks);
  for (const LinearPlan::Item& item : plan.items)
    if (item.term->kind == FW_TERM_LOW_RANK)
      rank_input.reserve(input_shape(left_operand(*item.term), FW_ACTIVATION_FLOAT), tokens);
}

bool LinearWork::Buffers::hold(const LinearPlan& plan, int64_t tokens, int threads) const {
  if (inputs.size() < plan.shapes.size() || stepped.size() < plan.chains.size()) return false;
  if (members.size() < static_cast<size_t>(threads)) return false;
  for (size_t s = 0; s < plan.shapes.size(); ++s)
    if (!inputs[s].holds(plan.shapes[s].shape, tokens)) return false;
  for (size_t c = 0; c < plan.chains.size(); ++c)
    if (stepped[c].count < tokens * plan.cols) return false;
  const Need need(plan, tokens);
  for (int i = 0; i < threads; ++i) {
    const Member& member = members[static_cast<size_t>(i)];
    if (member.work_bytes < need.work_bytes || member.spare.count < need.spare) return false;
  }
  if (ranks.count < need.ranks) return false;
  return std::all_of(plan.items.begin(), plan.items.end(), [&](const LinearPlan::Item& item) {
    return item.term->kind != FW_TERM_LOW_RANK ||
           rank_input.holds(input_shape(left_operand(*item.term), FW_ACTIVATION_FLOAT), tokens);
  });
}

void linear_reserve(LinearWork& work, const LinearPlan& plan, int64_t tokens, int threads) {
  work.buffers().reserve(plan, tokens, threads);
}

// ---- products ----

namespace {

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

void rotate(const fw_step& step, const float* x, int64_t first, int64_t last, float* to) {
  std::copy(x + first, x + last, to + first);
  product_kernels().hadamard(to + first, step.values ? step.values + first : nullptr, step.block, last - first);
}

// A member's share of a product, in pieces of some milliseconds between which it can be stopped. Whole pairs, quadruples and
// eights of tiles stay together as the kernels take them.
void product_in_pieces(const std::atomic<int32_t>* stop, const fw_operand* operand, const InputShape& shape,
                       const InputBuffers& input, int64_t tokens, int64_t first, int64_t last, const Output& out, void* own) {
  constexpr int64_t kTogether = 8, kProducts = int64_t{1} << 27;
  if (!stop || tokens == 1) return product_share(operand, shape, input, tokens, first, last, out, own);
  const int64_t piece = round_up(kProducts / (kTileRows * operand->cols * tokens) + 1, kTogether);
  for (int64_t at = first; at < last && stop->load(std::memory_order_relaxed) == 0; at += piece)
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

// One call, as one member sees it.
class Application {
 public:
  Application(Team& team, LinearWork& work, const LinearPlan& plan, const float* x, int64_t tokens, int64_t x_stride)
      : team_(team),
        stop_(work.stop),
        buffers_(work.buffers()),
        plan_(plan),
        x_(x),
        tokens_(tokens),
        x_stride_(x_stride),
        work_(buffers_.members[static_cast<size_t>(team.index())].work.get()),
        spare_(buffers_.members[static_cast<size_t>(team.index())].spare.get()) {}

  void prepare() {
    bool wait = false;
    for (size_t c = 0; c < plan_.chains.size(); ++c) {
      if (plan_.chains[c].run > 0) continue;
      // A token's chain is not divided: members take tokens, and chains in turn.
      wait = true;
      for (int64_t t = 0; t < tokens_; ++t)
        if ((t + static_cast<int64_t>(c)) % team_.size() == team_.index())
          run_steps(*plan_.chains[c].term, x_ + t * x_stride_, plan_.cols, stepped(static_cast<int>(c), t), spare_);
    }
    if (wait) team_.barrier();
    for (size_t s = 0; s < plan_.shapes.size(); ++s) prepare_shape(plan_.shapes[s], buffers_.inputs[s]);
    team_.barrier();
  }

  void multiply(const LinearPlan::Item& item, const LinearOutput& output) {
    const fw_linear& linear = *item.linear;
    const fw_term& term = *item.term;
    const Output out = {output.values, output.stride, &term != linear.term};
    const auto [first, last] = team_.share(divide_up(linear.rows, kTileRows));
    const int64_t begin = first * kTileRows, end = std::min(linear.rows, last * kTileRows);
    if (term.kind == FW_TERM_SPARSE)
      sparse_product(term, row(item.chain, 0), item.chain < 0 ? x_stride_ : plan_.cols, tokens_, begin, end, out);
    else if (term.kind == FW_TERM_LOW_RANK)
      multiply_factors(item, first, last, out);
    else
      product_in_pieces(stop_, left_operand(term), shape_of(item), input_of(item), tokens_, first, last, out, work_);
    if (linear.bias && &term == linear.term + linear.terms - 1)
      for (int64_t t = 0; t < tokens_; ++t)
        for (int64_t r = begin; r < end; ++r) output.values[t * output.stride + r] += linear.bias[r];
  }

 private:
  const InputShape& shape_of(const LinearPlan::Item& item) const { return plan_.shapes[static_cast<size_t>(item.source)].shape; }
  InputBuffers& input_of(const LinearPlan::Item& item) const { return buffers_.inputs[static_cast<size_t>(item.source)]; }
  float* stepped(int chain, int64_t t) const { return buffers_.stepped[static_cast<size_t>(chain)].get() + t * plan_.cols; }
  const float* row(int chain, int64_t t) const { return chain < 0 ? x_ + t * x_stride_ : stepped(chain, t); }

  void prepare_shape(const LinearPlan::Shape& s, InputBuffers& to) {
    const InputShape& shape = s.shape;
    // Of a fused chain members take whole runs, rotated just before they are rounded.
    const int64_t run = s.chain < 0 ? 0 : plan_.chains[static_cast<size_t>(s.chain)].run;
    const int64_t together = run > 0 ? run / shape.segment : 1, pieces = shape.segments / together;
    const auto [first, last] = team_.share(tokens_ * pieces);
    for (int64_t at = first; at < last;) {
      const int64_t t = at / pieces, piece = at % pieces, end = std::min(pieces, piece + last - at);
      if (run > 0) {
        const fw_step& step = *plan_.chains[static_cast<size_t>(s.chain)].term->step;
        rotate(step, x_ + t * x_stride_, piece * run, end * run, stepped(s.chain, t));
      }
      prepare_input(shape, row(s.chain, t), t, tokens_, to, piece * together, end * together, spare_);
      at += end - piece;
    }
  }

  void multiply_factors(const LinearPlan::Item& item, int64_t first, int64_t last, const Output& out) {
    const fw_operand *right = first_operand(*item.term), *left = left_operand(*item.term);
    const auto [begin, end] = team_.share(right->tiles);
    team_.barrier();  // the last product may still be read
    product_in_pieces(stop_, right, shape_of(item), input_of(item), tokens_, begin, end, {buffers_.ranks.get(), right->rows, 0},
                      work_);
    team_.barrier();
    const InputShape shape = input_shape(left, FW_ACTIVATION_FLOAT);
    const auto [from, to] = team_.share(tokens_);
    for (int64_t t = from; t < to; ++t)
      prepare_input(shape, buffers_.ranks.get() + t * right->rows, t, tokens_, buffers_.rank_input, 0, shape.segments, spare_);
    team_.barrier();
    product_in_pieces(stop_, left, shape, buffers_.rank_input, tokens_, first, last, out, work_);
  }

  Team& team_;
  const std::atomic<int32_t>* stop_;
  LinearWork::Buffers& buffers_;
  const LinearPlan& plan_;
  const float* x_;
  int64_t tokens_, x_stride_;
  void* work_;
  float* spare_;
};

}  // namespace

int32_t linear_apply(Team& team, LinearWork& work, const LinearPlan& plan, const LinearOutput* outputs, const float* x,
                     int64_t tokens, int64_t x_stride) {
  LinearWork::Buffers& buffers = work.buffers();
  if (plan.items.empty() || !buffers.hold(plan, tokens, team.size())) return FW_INVALID;
  Application application(team, work, plan, x, tokens, x_stride);
  application.prepare();
  for (const LinearPlan::Item& item : plan.items) application.multiply(item, outputs[item.layer]);
  return FW_OK;
}

int32_t fw_linear_check(const fw_linear* linear) { return check_linear(linear); }

int32_t fw_linear_apply(const fw_linear* linear, const float* x, int64_t x_count, int64_t tokens, int64_t x_stride, float* out,
                        int64_t out_count, int64_t out_stride, int32_t precision, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    const int32_t status = check_linear(linear);
    if (status != FW_OK) return status;
    if (precision != FW_ACTIVATION_INT8 && precision != FW_ACTIVATION_FLOAT) return FW_INVALID;
    if (!holds_rows(x, x_count, tokens, x_stride, linear->cols)) return FW_INVALID;
    if (!holds_rows(out, out_count, tokens, out_stride, linear->rows)) return FW_INVALID;
    if (tokens == 0) return FW_OK;
    threads = fair_threads(threads);
    const LinearPlan plan(&linear, 1, precision);
    LinearWork work;
    linear_reserve(work, plan, tokens, threads);
    const LinearOutput output = {out, out_stride};
    std::atomic<int32_t> result{FW_OK};
    run_team(threads, [&](Team& team) {
      const int32_t own = linear_apply(team, work, plan, &output, x, tokens, x_stride);
      if (team.index() == 0) result.store(own);
    });
    return result.load();
  });
}
