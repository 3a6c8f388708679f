#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "decoder_network.h"
#include "parallel.h"

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

const DecoderLoops& loops_of_processor() {
#if defined(FW_X86)
  if (std::strcmp(fw_isa(), "avx512") == 0) return *decoder_loops_avx512();
  if (std::strcmp(fw_isa(), "avx2") == 0) return *decoder_loops_avx2();
#endif
  return *decoder_loops_baseline();
}

int64_t weight_bytes(const fw_linear* linear) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < linear->terms; ++i)
    for (const void* operand : {linear->term[i].operand, linear->term[i].right})
      if (operand) bytes += static_cast<const fw_operand*>(operand)->weight_bytes;
  return bytes;
}

// Whether half precision, in which keys and values are cached, holds them all.
bool half_holds(const float* values, int64_t count) {
  int beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond |= static_cast<int>(std::fabs(values[i]) > 65504.0F);
  return beyond == 0;
}

}  // namespace

fw_decoder::fw_decoder(const fw_decoder_settings& settings)
    : s_(settings),
      layers_(settings.layer, settings.layer + settings.layers),
      loops_(loops_of_processor()),
      padded_dim_(round_up(settings.head_dim, kPadding)),
      query_width_(settings.heads * settings.head_dim),
      key_width_(settings.kv_heads * settings.head_dim),
      cache_(settings, padded_dim_),
      sampler_(settings.vocabulary),
      sampled_(static_cast<size_t>(settings.vocabulary)),
      next_(new std::atomic<int64_t>[static_cast<size_t>(settings.layers)]) {
  s_.layer = nullptr;
  work_.stop = &stop_;
  s_.threads = std::min(s_.threads, kMostThreads);
  const auto plan = [this](std::initializer_list<const fw_linear*> together) {
    return LinearPlan(together.begin(), static_cast<int>(together.size()), s_.precision);
  };
  for (const fw_layer& layer : layers_) {
    LayerPlans plans;
    plans.query_key_value = plan({layer.query, layer.key, layer.value});
    if (&layer == &layers_.back()) {
      plans.key_value = plan({layer.key, layer.value});
      plans.query = plan({layer.query});
    }
    plans.output = plan({layer.output});
    plans.gate_up = plan({layer.gate, layer.up});
    plans.down = plan({layer.down});
    plans_.push_back(std::move(plans));
  }
  head_plan_ = plan({s_.head});
  scratch_.reserve(s_.threads * attention_floats(padded_dim_));
  frequencies_.resize(static_cast<size_t>(s_.threads * s_.head_dim / 2));
  for (const fw_layer& layer : layers_)
    for (const fw_linear* linear : {layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down})
      weight_bytes_ += weight_bytes(linear);
}

// Pages for the tokens of a pass, and buffers for so many of them.
void fw_decoder::make_room(int64_t count) {
  int64_t parts = 0;
  for (const Token& token : tokens_) {
    cache_.make_room(token.sequence, token.position);
    // Room for what joins the sequence after the pass, which then cannot fail halfway.
    std::vector<int32_t>& known = cache_[token.sequence].tokens;
    const auto wanted = static_cast<size_t>(token.position) + 1;
    if (wanted > known.capacity()) known.reserve(std::max(wanted, 2 * known.capacity()));
    parts += token.position / kPart + 1;
  }
  if (count <= s_.sequences)  // else it is no pass of one token of every sequence
    partials_.reserve(parts * s_.kv_heads * partial_floats(s_.heads / s_.kv_heads, padded_dim_));
  const ProductKernels* kernels = &product_kernels();
  if (count <= room_ && kernels == room_kernels_) return;
  room_ = 0;  // until all of it is there: memory may run out in between
  for (Buffer<float>* buffer : {&x_, &normed_, &delta_}) buffer->reserve(count * s_.hidden);
  for (Buffer<float>* buffer : {&query_, &mixed_}) buffer->reserve(count * query_width_);
  for (Buffer<float>* buffer : {&key_, &value_}) buffer->reserve(count * key_width_);
  for (Buffer<float>* buffer : {&gate_, &up_}) buffer->reserve(count * s_.ffn);
  for (Buffer<float>* buffer : {&cosines_, &sines_}) buffer->reserve(count * s_.head_dim / 2);
  for (const LayerPlans& plans : plans_)
    for (const LinearPlan* plan :
         {&plans.query_key_value, &plans.key_value, &plans.query, &plans.output, &plans.gate_up, &plans.down})
      linear_reserve(work_, *plan, count, s_.threads);
  linear_reserve(work_, head_plan_, count, s_.threads);
  room_ = count;
  room_kernels_ = kernels;
}

// ---- a pass through the network ----

// Rows from `first` on, cut where the sequence changes and so that a block of attention does not get too many queries.
void fw_decoder::make_spans(std::vector<Span>& spans, int64_t first) {
  const int64_t most = std::max<int64_t>(1, kMostRows / (s_.heads / s_.kv_heads));
  spans.clear();
  for (int64_t i = first; i < static_cast<int64_t>(tokens_.size()); ++i) {
    const int64_t row = i - first;
    const bool same = row > 0 && tokens_[static_cast<size_t>(i)].sequence == tokens_[static_cast<size_t>(i - 1)].sequence;
    if (same && spans.back().count < most)
      ++spans.back().count;
    else
      spans.push_back({row, 1});
  }
}

// Logits of the last token, of all, or of none, for what is in tokens_; then these tokens belong to their sequences.
int32_t fw_decoder::pass(Wanted wanted, float* logits) {
  if (stopped()) return FW_STOPPED;
  const auto count = static_cast<int64_t>(tokens_.size());
  make_room(count);
  wanted_rows_ = wanted == Wanted::kAll ? count : wanted == Wanted::kLast ? 1 : 0;
  logits_ = logits;
  rows_ = count;
  token_of_row_.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) token_of_row_[static_cast<size_t>(i)] = i;
  make_spans(spans_, 0);
  make_spans(last_spans_, count - wanted_rows_);
  one_each_ = static_cast<int64_t>(spans_.size()) == count && wanted_rows_ == count;
  for (int64_t i = 1; i < count && one_each_; ++i)
    one_each_ = tokens_[static_cast<size_t>(i)].sequence != tokens_[static_cast<size_t>(i - 1)].sequence;
  for (int64_t i = 0; i < s_.layers; ++i) next_[static_cast<size_t>(i)].store(0, std::memory_order_relaxed);
  status_.store(FW_OK, std::memory_order_relaxed);
  given_up_ = false;
  int64_t read = count * weight_bytes_;
  for (const Token& token : tokens_) read += (token.position / kPage + 1) * cache_.layout().bytes;
  const int64_t useful = 1 + read / bytes_per_thread_;
  run_by_those_who_pay(static_cast<int>(std::min<int64_t>(s_.threads, useful)), static_cast<double>(read));
  if (stopped()) return FW_STOPPED;
  ++stats_.passes;
  if (status_.load() != FW_OK) return status_.load();
  for (const Token& token : tokens_) cache_[token.sequence].tokens.push_back(token.id);
  return FW_OK;
}

// Passes of few tokens have little to do between barriers: there members without a processor of their own are in the way.
void fw_decoder::run_by_those_who_pay(int most, double read) {
  const auto whole = [this](Team& team) { run(team); };
  if (rows_ > kFewTokens || all_members_) return run_team(most, whole);
  if (rows_ != rows_before_) members_ = PayingMembers();
  rows_before_ = rows_;
  const int members = members_.choose(most);
  const auto begun = Clock::now();
  run_team(members, whole);
  if (!stopped()) members_.took(seconds_since(begun) / read);
}

void fw_decoder::run(Team& team) {
  begin(team);
  for (int64_t i = 0; i < s_.layers; ++i) {
    run_layer(team, i);
    if (rows_ == 0) return;
  }
  finish(team);
}

// cos and sin of position times frequency, the product rounded to float32 as the reference implementation does.
void fw_decoder::find_angles(int64_t index, double* frequencies) {
  const Token& token = tokens_[static_cast<size_t>(index)];
  const int64_t half = s_.head_dim / 2;
  const bool dynamic = s_.dynamic_base != 0 && token.length > s_.dynamic_length;
  if (dynamic) {  // bloc97's "NTK-aware" scaling of the base
    const auto dim = static_cast<double>(s_.head_dim);
    const double stretch = s_.dynamic_factor * static_cast<double>(token.length) / static_cast<double>(s_.dynamic_length) -
                           (s_.dynamic_factor - 1);
    const double base = s_.dynamic_base * std::pow(stretch, dim / (dim - 2));
    for (int64_t i = 0; i < half; ++i) frequencies[i] = 1 / std::pow(base, static_cast<double>(2 * i) / dim);
  }
  const auto position = static_cast<float>(token.position);
  for (int64_t i = 0; i < half; ++i) {
    const float angle = position * (dynamic ? static_cast<float>(frequencies[i]) : s_.frequencies[i]);
    cosines_.at(index * half)[i] = static_cast<float>(std::cos(static_cast<double>(angle)) * s_.rope_scale);
    sines_.at(index * half)[i] = static_cast<float>(std::sin(static_cast<double>(angle)) * s_.rope_scale);
  }
}

// Every member looks after its own tokens here and in norm_rows; nothing is shared yet.
void fw_decoder::begin(Team& team) {
  const auto [first, last] = team.share(rows_);
  for (int64_t i = first; i < last && !stopped(); ++i) {
    const int64_t id = tokens_[static_cast<size_t>(i)].id;
    operand_rows(static_cast<const fw_operand*>(s_.embedding), id, id + 1, x_.at(i * s_.hidden));
    find_angles(i, frequencies_.data() + team.index() * s_.head_dim / 2);
  }
  norm_rows(team, nullptr, layers_[0].attention_norm);
}

void fw_decoder::norm_rows(Team& team, const float* delta, const float* weight) {
  const auto [first, last] = team.share(rows_);
  for (int64_t i = first; i < last; ++i)
    loops_.add_norm(x_.at(i * s_.hidden), delta ? delta + i * s_.hidden : nullptr, weight, s_.hidden, s_.epsilon,
                    normed_.at(i * s_.hidden));
  meet(team);
}

// A barrier behind which all members know the same of whether the pass is to be given up. Another barrier lies between any
// two of these, so that all have read given_up_ before it is written again.
void fw_decoder::meet(Team& team) {
  if (team.index() == 0) given_up_ = stopped();
  team.barrier();
}

// `outputs` of the plan's layers. Without room for the call, which all members find alike, it computes nothing and the pass
// fails.
void fw_decoder::linear(Team& team, const LinearPlan& plan, std::initializer_list<LinearOutput> outputs, const float* x,
                        int64_t tokens) {
  const bool timed = team.index() == 0;
  const Clock::time_point begun = timed ? Clock::now() : Clock::time_point();
  if (!given_up_) {
    const int32_t status = linear_apply(team, work_, plan, outputs.begin(), x, tokens, plan.cols);
    if (status != FW_OK) status_.store(status);
  }
  team.barrier();
  if (timed) stats_.linear_seconds += seconds_since(begun);
}

void fw_decoder::run_layer(Team& team, int64_t index) {
  const fw_layer& layer = layers_[static_cast<size_t>(index)];
  const LayerPlans& plans = plans_[static_cast<size_t>(index)];
  const bool last = index + 1 == s_.layers;
  const int64_t hidden = s_.hidden, all = rows_;
  const LinearOutput query = {query_.data(), query_width_};
  const LinearOutput key = {key_.data(), key_width_}, value = {value_.data(), key_width_};
  if (last && wanted_rows_ < all) {  // behind the last keys and values only the wanted rows matter
    linear(team, plans.key_value, {key, value}, normed_.data(), all);
    compact(team);
    if (wanted_rows_ > 0) linear(team, plans.query, {query}, normed_.data(), rows_);
  } else {
    linear(team, plans.query_key_value, {query, key, value}, normed_.data(), all);
  }
  attention(team, index);
  if (rows_ == 0) return;
  linear(team, plans.output, {{delta_.data(), hidden}}, mixed_.data(), rows_);
  norm_rows(team, delta_.data(), layer.mlp_norm);
  linear(team, plans.gate_up, {{gate_.data(), s_.ffn}, {up_.data(), s_.ffn}}, normed_.data(), rows_);
  const auto [from, to] = team.share(rows_ * s_.ffn, 64);
  if (!stopped()) loops_.swiglu(gate_.at(from), up_.at(from), to - from);
  meet(team);
  linear(team, plans.down, {{delta_.data(), hidden}}, gate_.data(), rows_);
  norm_rows(team, delta_.data(), last ? s_.norm : layers_[static_cast<size_t>(index + 1)].attention_norm);
}

// The last rows_ become the wanted ones; the keys and values of all tokens are still to be stored.
void fw_decoder::compact(Team& team) {
  if (team.index() == 0) {
    const int64_t first = rows_ - wanted_rows_;
    for (int64_t i = 0; i < wanted_rows_; ++i) {
      std::copy_n(x_.at((first + i) * s_.hidden), s_.hidden, x_.at(i * s_.hidden));
      std::copy_n(normed_.at((first + i) * s_.hidden), s_.hidden, normed_.at(i * s_.hidden));
      token_of_row_[static_cast<size_t>(i)] = first + i;
    }
    rows_ = wanted_rows_;
  }
  team.barrier();
}

void fw_decoder::finish(Team& team) {
  linear(team, head_plan_, {{logits_, s_.vocabulary}}, normed_.data(), rows_);
}

// ---- attention ----

// Not if the pass is given up: what its inputs hold then may be no numbers, and pages must hold nothing but numbers. What
// the cache cannot hold ends the pass with an error, instead of another value in its place.
void fw_decoder::store(int64_t layer, int64_t index, int64_t head) {
  if (stopped()) return;
  const Token& token = tokens_[static_cast<size_t>(index)];
  const int64_t half = s_.head_dim / 2, slot = token.position % kPage;
  unsigned char* page = cache_.page(token.sequence, token.position);
  float* key = key_.at(index * key_width_ + head * s_.head_dim);
  loops_.rotate(key, layers_[static_cast<size_t>(layer)].key_norm, s_.epsilon, cosines_.at(index * half),
                sines_.at(index * half), s_.head_dim, 1.0F);
  const float* value = value_.at(index * key_width_ + head * s_.head_dim);
  if (cache_.type() == CacheType::kHalf && !(half_holds(key, s_.head_dim) && half_holds(value, s_.head_dim)))
    status_.store(FW_CACHE_RANGE);
  loops_.store_key(key, s_.head_dim, slot, cache_.type(), page + cache_.layout().keys_at(layer, head));
  loops_.store_value(value, s_.head_dim, padded_dim_, slot, cache_.type(), page + cache_.layout().values_at(layer, head));
}

// Of all queries that share a key head.
void fw_decoder::rotate_queries(const fw_layer& layer, int64_t row, int64_t kv_head) {
  const int64_t index = token_of_row_[static_cast<size_t>(row)], half = s_.head_dim / 2, group = s_.heads / s_.kv_heads;
  const auto factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(s_.head_dim)));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    loops_.rotate(query_.at(row * query_width_ + head * s_.head_dim), layer.query_norm, s_.epsilon,
                  cosines_.at(index * half), sines_.at(index * half), s_.head_dim, factor);
}

// The block of the queries of a span that share a key head; `rows` is memory for it to point to.
AttentionBlock fw_decoder::attention_block(Team& team, int64_t layer, const Span& span, int64_t kv_head, BlockRows& rows) {
  const int64_t group = s_.heads / s_.kv_heads;
  int64_t count = 0;
  for (int64_t row = span.first; row < span.first + span.count; ++row)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head, ++count) {
      rows.query[count] = query_.at(row * query_width_ + head * s_.head_dim);
      rows.out[count] = mixed_.at(row * query_width_ + head * s_.head_dim);
      rows.position[count] = token_of(row).position;
    }
  const Token& token = token_of(span.first);
  AttentionBlock block = {};
  block.query = rows.query;
  block.out = rows.out;
  block.position = rows.position;
  block.rows = count;
  block.pages = cache_[token.sequence].pages.data();
  block.keys_at = cache_.layout().keys_at(layer, kv_head);
  block.values_at = cache_.layout().values_at(layer, kv_head);
  block.head_dim = s_.head_dim;
  block.padded_dim = padded_dim_;
  block.window = layers_[static_cast<size_t>(layer)].window;
  block.type = cache_.type();
  block.work = scratch_.at(team.index() * attention_floats(padded_dim_));
  return block;
}

void fw_decoder::attend(Team& team, int64_t layer, const Span& span, int64_t kv_head) {
  for (int64_t row = span.first; row < span.first + span.count; ++row)
    rotate_queries(layers_[static_cast<size_t>(layer)], row, kv_head);
  BlockRows rows;
  loops_.attend(attention_block(team, layer, span, kv_head, rows));
}

// The parts (decoder_loops.h) that a row's token sees: the first, and how many.
std::pair<int64_t, int64_t> fw_decoder::parts_of(int64_t layer, int64_t row) const {
  const int64_t window = layers_[static_cast<size_t>(layer)].window, position = token_of(row).position;
  const int64_t first = window ? std::max<int64_t>(0, position - window + 1) / kPart : 0;
  return {first, position / kPart - first + 1};
}

// Whether units, divided among the members as they are, would leave some of them idle for long: few key heads, or sequences of
// different lengths.
bool fw_decoder::uneven(const Team& team, int64_t layer) const {
  const int64_t units = rows_ * s_.kv_heads;
  int64_t all = 0, most = 0;
  for (int member = 0; member < team.size(); ++member) {
    int64_t own = 0;
    for (int64_t unit = units * member / team.size(); unit < units * (member + 1) / team.size(); ++unit)
      own += parts_of(layer, unit / s_.kv_heads).second;
    all += own;
    most = std::max(most, own);
  }
  return most * team.size() > all + all / 8;
}

// One token of every sequence, units cut into parts that are divided evenly.
void fw_decoder::attend_in_parts(Team& team, int64_t layer) {
  const int64_t units = rows_ * s_.kv_heads, group = s_.heads / s_.kv_heads, size = partial_floats(group, padded_dim_);
  const auto [first_unit, last_unit] = team.share(units);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    store(layer, unit / s_.kv_heads, unit % s_.kv_heads);
    rotate_queries(layers_[static_cast<size_t>(layer)], unit / s_.kv_heads, unit % s_.kv_heads);
  }
  team.barrier();
  BlockRows rows;
  // Calls body(unit, its first part, parts, parts of the units before).
  const auto each_unit = [&](const auto& body) {
    int64_t before = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      const auto [first, count] = parts_of(layer, unit / s_.kv_heads);
      body(unit, first, count, before);
      before += count;
    }
    return before;
  };
  const auto block_of = [&](int64_t unit) {
    return attention_block(team, layer, spans_[static_cast<size_t>(unit / s_.kv_heads)], unit % s_.kv_heads, rows);
  };
  const int64_t parts = each_unit([](int64_t, int64_t, int64_t, int64_t) {});
  const auto [begin, end] = team.share(parts);
  each_unit([&, begin = begin, end = end](int64_t unit, int64_t first, int64_t count, int64_t before) {
    const int64_t from = std::max(begin, before), to = std::min(end, before + count);
    if (from >= to) return;
    const AttentionBlock block = block_of(unit);
    for (int64_t part = from; part < to && !stopped(); ++part)
      loops_.attend_part(block, first + part - before, partials_.at(part * size));
  });
  team.barrier();
  each_unit([&, first_unit = first_unit, last_unit = last_unit](int64_t unit, int64_t, int64_t count, int64_t before) {
    if (unit >= first_unit && unit < last_unit) loops_.merge_parts(block_of(unit), partials_.at(before * size), count);
  });
}

// With one token of every sequence a unit's key and value are its own affair, unless there are too few units. Otherwise all keys and values are stored
// first, and units are taken from the longest to the shortest, since the later tokens see more.
void fw_decoder::attention(Team& team, int64_t layer) {
  const bool timed = team.index() == 0;
  const Clock::time_point begun = timed ? Clock::now() : Clock::time_point();
  if (one_each_ && uneven(team, layer)) {
    attend_in_parts(team, layer);
  } else if (one_each_) {
    const auto [first, last] = team.share(rows_ * s_.kv_heads);
    for (int64_t unit = first; unit < last && !stopped(); ++unit) {
      store(layer, unit / s_.kv_heads, unit % s_.kv_heads);
      attend(team, layer, spans_[static_cast<size_t>(unit / s_.kv_heads)], unit % s_.kv_heads);
    }
  } else {
    const auto [first, last] = team.share(static_cast<int64_t>(tokens_.size()) * s_.kv_heads);
    for (int64_t unit = first; unit < last; ++unit) store(layer, unit / s_.kv_heads, unit % s_.kv_heads);
    team.barrier();
    const bool compacted = layer + 1 == s_.layers;
    const std::vector<Span>& spans = compacted ? last_spans_ : spans_;
    const auto units = static_cast<int64_t>(spans.size()) * s_.kv_heads;
    std::atomic<int64_t>& next = next_[static_cast<size_t>(layer)];
    for (int64_t unit = next++; unit < units && !stopped(); unit = next++)
      attend(team, layer, spans[spans.size() - 1 - static_cast<size_t>(unit / s_.kv_heads)], unit % s_.kv_heads);
  }
  meet(team);
  if (timed) stats_.attention_seconds += seconds_since(begun);
}
