// The decoder: its passes through the network (decoder.cpp), and tokens in and out (generation.cpp).
#ifndef FEATHERWEIGHT_DECODER_NETWORK_H
#define FEATHERWEIGHT_DECODER_NETWORK_H

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "decoder.h"
#include "decoder_loops.h"
#include "kv_cache.h"
#include "linear.h"
#include "paying_members.h"
#include "sampling.h"
#include "team.h"

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

// Memory aligned for vectors that only ever grows; what it held is lost.
template <typename Element>
class Buffer {
 public:
  void reserve(int64_t count) {
    if (count <= count_) return;
    memory_.reset();
    count_ = 0;
    memory_.reset(static_cast<Element*>(::operator new(static_cast<size_t>(count) * sizeof(Element), std::align_val_t{64})));
    count_ = count;
  }
  Element* data() { return memory_.get(); }
  Element* at(int64_t index) { return memory_.get() + index; }

 private:
  struct Free {
    void operator()(Element* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  std::unique_ptr<Element, Free> memory_;
  int64_t count_ = 0;
};

// A token on its way through the network. `length`: tokens of the sequence when all that is fed now is in, which dynamic
// rotary scaling goes by.
struct Token {
  int64_t sequence, position, length;
  int32_t id;
};

// The calls of linear_apply in a layer: what there is room for is what is called.
struct LayerPlans {
  LinearPlan query_key_value;   // of the last layer only where all tokens' queries are wanted
  LinearPlan key_value, query;  // of the last layer, where fewer are
  LinearPlan output, gate_up, down;
};

// Consecutive tokens of one sequence whose queries of one head are attended to together.
struct Span {
  int64_t first, count;
};

struct fw_decoder {
 public:
  explicit fw_decoder(const fw_decoder_settings& settings);

  const fw_decoder_settings& settings() const { return s_; }
  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }
  fw_decoder_stats& stats() { return stats_; }
  // From another thread: passes end as soon as they can, and begin no more, until it is called with false.
  void set_stop(bool stop) { stop_.store(stop ? 1 : 0); }

  // For tests: all threads take part in every pass, however little there is to do.
  void use_all_threads() { bytes_per_thread_ = 1, all_members_ = true; }

  int64_t keep_prefix(int64_t sequence, const int32_t* tokens, int64_t count);
  bool known(const int32_t* tokens, int64_t count) const;
  int32_t feed(int64_t sequence, const int32_t* tokens, int64_t count, float* logits, bool all);
  int32_t step(const int64_t* sequences, const int32_t* tokens, int64_t count, float* logits);
  int32_t generate(const fw_generation& request);

 private:
  enum class Wanted { kNone, kLast, kAll };
  using Texts = std::vector<std::vector<int32_t>>;  // prompts and what has been made, by sequence

  int32_t feed_prompts(const fw_generation& request, Texts& texts);
  int32_t choose(const fw_generation& request, int64_t i, float* logits, std::vector<int32_t>& text, int32_t* token);
  bool stopped() const { return stop_.load(std::memory_order_relaxed) != 0; }
  int32_t feed_chunks(int64_t sequence, const int32_t* tokens, int64_t count, float* logits, bool all);
  int32_t pass(Wanted wanted, float* logits);
  void make_room(int64_t count);
  void make_spans(std::vector<Span>& spans, int64_t first);
  void run_by_those_who_pay(int most, double read);
  void run(Team& team);
  void begin(Team& team);
  void run_layer(Team& team, int64_t index);
  void finish(Team& team);
  void linear(Team& team, const LinearPlan& plan, std::initializer_list<LinearOutput> outputs, const float* x, int64_t tokens);
  void compact(Team& team);
  void norm_rows(Team& team, const float* delta, const float* weight);
  void meet(Team& team);
  void store(int64_t layer, int64_t token, int64_t head);
  void rotate_queries(const fw_layer& layer, int64_t row, int64_t head);
  struct BlockRows {  // of an AttentionBlock
    const float* query[kMostRows];
    float* out[kMostRows];
    int64_t position[kMostRows];
  };
  const Token& token_of(int64_t row) const { return tokens_[static_cast<size_t>(token_of_row_[static_cast<size_t>(row)])]; }
  AttentionBlock attention_block(Team& team, int64_t layer, const Span& span, int64_t head, BlockRows& rows);
  std::pair<int64_t, int64_t> parts_of(int64_t layer, int64_t row) const;
  bool uneven(const Team& team, int64_t layer) const;
  void attend_in_parts(Team& team, int64_t layer);
  void attend(Team& team, int64_t layer, const Span& span, int64_t head);
  void attention(Team& team, int64_t layer);
  void find_angles(int64_t token, double* frequencies);

  fw_decoder_settings s_;
  std::vector<fw_layer> layers_;
  std::vector<LayerPlans> plans_;  // [layers]
  LinearPlan head_plan_;
  const DecoderLoops& loops_;
  int64_t padded_dim_, query_width_, key_width_;
  KvCache cache_;
  LinearWork work_;
  fw_decoder_stats stats_ = {};
  Sampler sampler_;
  std::vector<float> sampled_;
  int64_t weight_bytes_ = 0;
  int64_t bytes_per_thread_ = int64_t{1} << 20;  // a thread that has less to read for a pass is not worth its barriers

  static constexpr int64_t kFewTokens = 8;
  PayingMembers members_;
  int64_t rows_before_ = 0;  // of the pass that `members_` knows of
  bool all_members_ = false;

  // One pass. Rows are the tokens whose output is wanted still; in the last layer they can be fewer than the tokens.
  int64_t room_ = 0;                             // tokens that buffers have room for
  const ProductKernels* room_kernels_ = nullptr;  // and the products they have it for
  std::vector<Token> tokens_;
  std::vector<int64_t> token_of_row_;
  std::vector<Span> spans_, last_spans_;
  int64_t rows_ = 0, wanted_rows_ = 0;
  bool one_each_ = false;  // one token of every sequence
  float* logits_ = nullptr;
  Buffer<float> x_, normed_, query_, key_, value_, mixed_, delta_, gate_, up_, cosines_, sines_, scratch_, partials_;
  std::vector<double> frequencies_;
  std::unique_ptr<std::atomic<int64_t>[]> next_;  // of each layer: the next unit of attention to be taken
  std::atomic<int32_t> status_{FW_OK};
  std::atomic<int32_t> stop_{0};
  bool given_up_ = false;  // what the members have agreed on at their last meeting
};

#endif
