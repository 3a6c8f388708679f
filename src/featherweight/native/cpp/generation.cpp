#include <algorithm>
#include <cmath>
#include <iterator>
#include <new>

#include "decoder_network.h"
#include "parallel.h"
#include "product_header.h"

int64_t fw_decoder::keep_prefix(int64_t index, const int32_t* tokens, int64_t count) {
  const std::vector<int32_t>& cached = cache_[index].tokens;
  const int64_t length = cache_[index].length();
  int64_t same = 0;
  while (same < std::min(count, length) && cached[static_cast<size_t>(same)] == tokens[same]) ++same;
  // Beyond the length that dynamic scaling begins at, keys depend on the length of the whole prompt.
  if (s_.dynamic_base != 0 && std::max(count, length) > s_.dynamic_length) same = 0;
  cache_.truncate(index, same);
  return same;
}

bool fw_decoder::known(const int32_t* tokens, int64_t count) const {
  return std::all_of(tokens, tokens + count, [this](int32_t token) { return token >= 0 && token < s_.vocabulary; });
}

int32_t fw_decoder::feed(int64_t index, const int32_t* tokens, int64_t count, float* logits, bool all) {
  const auto begun = Clock::now();
  const int64_t before = cache_[index].length();
  if (count < 1 || before + count > s_.context || !known(tokens, count)) return FW_INVALID;
  int32_t status = FW_NO_MEMORY;
  try {
    status = feed_chunks(index, tokens, count, logits, all);
  } catch (const std::bad_alloc&) {
  }
  // Of tokens that did not all go through, those that did stay; not where their keys depend on how many there were to be.
  const bool scaled = s_.dynamic_base != 0 && before + count > s_.dynamic_length;
  if (status != FW_OK) cache_.truncate(index, scaled ? before : cache_[index].length());
  stats_.prompt_tokens += cache_[index].length() - before;
  stats_.prompt_seconds += seconds_since(begun);
  return status;
}

int32_t fw_decoder::feed_chunks(int64_t index, const int32_t* tokens, int64_t count, float* logits, bool all) {
  const int64_t before = cache_[index].length();
  cache_[index].tokens.reserve(static_cast<size_t>(before + count));
  for (int64_t first = 0; first < count; first += s_.chunk) {
    const int64_t last = std::min(count, first + s_.chunk);
    tokens_.clear();
    for (int64_t i = first; i < last; ++i) tokens_.push_back({index, before + i, before + count, tokens[i]});
    const Wanted wanted = !logits ? Wanted::kNone : all ? Wanted::kAll : last == count ? Wanted::kLast : Wanted::kNone;
    const int32_t status = pass(wanted, all && logits ? logits + first * s_.vocabulary : logits);
    if (status != FW_OK) return status;
  }
  return FW_OK;
}

int32_t fw_decoder::step(const int64_t* indices, const int32_t* tokens, int64_t count, float* logits) {
  if (count < 1 || count > s_.sequences || !known(tokens, count)) return FW_INVALID;
  for (int64_t first = 0; first < count; first += s_.chunk) {
    tokens_.clear();
    for (int64_t i = first; i < std::min(count, first + s_.chunk); ++i) {
      const int64_t length = cache_[indices[i]].length();
      if (length + 1 > s_.context) return FW_INVALID;
      tokens_.push_back({indices[i], length, length + 1, tokens[i]});
    }
    const int32_t status = pass(Wanted::kAll, logits + first * s_.vocabulary);
    if (status != FW_OK) return status;
  }
  return FW_OK;
}

// Prompts into the cache, as far as they are not there; logits of their last tokens to sampled_.
int32_t fw_decoder::feed_prompts(const fw_generation& request, Texts& texts) {
  const int32_t* prompt = request.prompts;
  for (int64_t i = 0; i < request.count; prompt += request.lengths[i++]) {
    const int64_t length = request.lengths[i];
    if (length < 1 || length > s_.context || !known(prompt, length)) return FW_INVALID;
    int64_t kept = keep_prefix(i, prompt, length);
    if (kept == length) cache_.truncate(i, --kept);  // the last token's logits are needed
    stats_.reused_tokens += kept;
    const int32_t status = feed(i, prompt + kept, length - kept, sampled_.data() + i * s_.vocabulary, false);
    if (status != FW_OK) return status;
    std::vector<int32_t>& text = texts[static_cast<size_t>(i)];
    text.reserve(static_cast<size_t>(std::min(s_.context, length + request.most) + 1));
    text.assign(prompt, prompt + length);
    request.made_lengths[i] = 0;
  }
  return FW_OK;
}

// The next token of sequence i from `logits`, or -1 if it ends here. FW_NON_FINITE if the logits are.
int32_t fw_decoder::choose(const fw_generation& request, int64_t i, float* logits, std::vector<int32_t>& text,
                           int32_t* token) {
  int64_t& made = request.made_lengths[i];
  const int32_t taken = sampler_.take(logits, text.data(), static_cast<int64_t>(text.size()), request.sampling[i],
                                      static_cast<uint64_t>(made));
  if (taken < 0) return FW_NON_FINITE;
  const int32_t* end = request.stops + request.stop_count;
  *token = std::find(request.stops, end, taken) != end ? -1 : taken;
  if (*token < 0) return FW_OK;
  request.made[i * request.most + made++] = taken;
  text.push_back(taken);
  ++stats_.new_tokens;
  return FW_OK;
}

int32_t fw_decoder::generate(const fw_generation& request) {
  if (request.count < 1 || request.count > s_.sequences || request.most < 1) return FW_INVALID;
  if (!std::all_of(request.sampling, request.sampling + request.count, valid_sampling)) return FW_INVALID;
  const auto count = static_cast<size_t>(request.count);
  sampled_.resize(count * static_cast<size_t>(s_.vocabulary));
  Texts texts(count);
  int32_t status = feed_prompts(request, texts);
  if (status != FW_OK) return status;
  std::vector<int64_t> active(count), going;
  std::vector<int32_t> next, told(count);
  for (size_t i = 0; i < count; ++i) active[i] = static_cast<int64_t>(i);
  while (!active.empty()) {
    const auto begun = Clock::now();
    going.clear();
    next.clear();
    std::fill(told.begin(), told.end(), -1);
    float* logits = sampled_.data();
    for (const int64_t i : active) {
      std::vector<int32_t>& text = texts[static_cast<size_t>(i)];
      int32_t& token = told[static_cast<size_t>(i)];
      status = choose(request, i, logits, text, &token);
      if (status != FW_OK) return status;
      logits += s_.vocabulary;
      if (token < 0 || request.made_lengths[i] == request.most || static_cast<int64_t>(text.size()) > s_.context) continue;
      going.push_back(i);
      next.push_back(token);
    }
    active.swap(going);
    stats_.decode_seconds += seconds_since(begun);
    if (request.on_tokens && request.on_tokens(told.data(), request.context)) return FW_OK;
    if (active.empty()) break;
    const auto stepped = Clock::now();
    status = step(active.data(), next.data(), static_cast<int64_t>(active.size()), sampled_.data());
    if (status != FW_OK) return status;
    stats_.decode_seconds += seconds_since(stepped);
  }
  return FW_OK;
}

// ---- the C interface ----

namespace {

bool fits(const fw_linear* linear, int64_t rows, int64_t cols) {
  return linear && linear->rows == rows && linear->cols == cols && check_linear(linear) == FW_OK;
}

bool fair_numbers(const fw_decoder_settings& s) {
  if (!std::isfinite(s.rope_scale) || !std::isfinite(s.epsilon) || s.epsilon < 0) return false;
  if (!std::isfinite(s.dynamic_base) || !std::isfinite(s.dynamic_factor)) return false;
  const int64_t sizes[] = {s.layers, s.hidden, s.heads, s.kv_heads, s.ffn, s.vocabulary, s.context, s.sequences};
  return std::all_of(std::begin(sizes), std::end(sizes), [](int64_t size) { return size >= 1 && size <= INT32_MAX; });
}

bool valid(const fw_decoder_settings& s) {
  if (!fair_numbers(s) || s.head_dim < 2) return false;
  if (s.heads % s.kv_heads || s.heads / s.kv_heads > kMostRows || s.head_dim % 2 || s.head_dim > 1024) return false;
  if (s.chunk < 1 || s.threads < 1) return false;
  if (s.cache != FW_FLOAT16 && s.cache != FW_INT8) return false;
  if (s.precision != FW_ACTIVATION_INT8 && s.precision != FW_ACTIVATION_FLOAT) return false;
  if (!s.layer || !s.embedding || !s.norm || !s.frequencies || !fits(s.head, s.vocabulary, s.hidden)) return false;
  if (s.dynamic_base != 0 && (s.dynamic_length < 1 || s.head_dim < 4)) return false;
  const auto* embedding = static_cast<const fw_operand*>(s.embedding);
  if (!aligned_operand(embedding) || fw_operand_check(embedding, embedding->bytes) != FW_OK) return false;
  if (embedding->rows != s.vocabulary || embedding->cols != s.hidden) return false;
  const int64_t query = s.heads * s.head_dim, key = s.kv_heads * s.head_dim;
  for (int64_t i = 0; i < s.layers; ++i) {
    const fw_layer& layer = s.layer[i];
    if (!layer.attention_norm || !layer.mlp_norm || layer.window < 0) return false;
    if (!fits(layer.query, query, s.hidden) || !fits(layer.key, key, s.hidden)) return false;
    if (!fits(layer.value, key, s.hidden)) return false;
    if (!fits(layer.output, s.hidden, query) || !fits(layer.gate, s.ffn, s.hidden)) return false;
    if (!fits(layer.up, s.ffn, s.hidden) || !fits(layer.down, s.hidden, s.ffn)) return false;
  }
  return true;
}

bool has(const fw_decoder* decoder, int64_t sequence) {
  return decoder && sequence >= 0 && sequence < decoder->settings().sequences;
}

// A call that changes sequences; when it is over, memory that none of them needs is given back.
template <typename Body>
int32_t changing(fw_decoder* decoder, const Body& body) {
  const int32_t status = guarded_call(body);
  decoder->cache().trim();
  return status;
}

}  // namespace

int32_t fw_decoder_new(const fw_decoder_settings* settings, fw_decoder** decoder) {
  if (!settings || !decoder || !valid(*settings)) return FW_INVALID;
  return guarded_call([&]() -> int32_t {
    *decoder = new fw_decoder(*settings);
    return FW_OK;
  });
}

void fw_decoder_free(fw_decoder* decoder) { delete decoder; }

int64_t fw_decoder_length(const fw_decoder* decoder, int64_t sequence) {
  return has(decoder, sequence) ? decoder->cache()[sequence].length() : -1;
}

int32_t fw_decoder_truncate(fw_decoder* decoder, int64_t sequence, int64_t length) {
  if (!has(decoder, sequence) || length < 0 || length > fw_decoder_length(decoder, sequence)) return FW_INVALID;
  return changing(decoder, [&]() -> int32_t {
    decoder->cache().truncate(sequence, length);
    return FW_OK;
  });
}

int64_t fw_decoder_keep_prefix(fw_decoder* decoder, int64_t sequence, const int32_t* tokens, int64_t count) {
  if (!has(decoder, sequence) || count < 0 || (count && !tokens)) return -1;
  int64_t kept = -1;
  changing(decoder, [&]() -> int32_t {
    kept = decoder->keep_prefix(sequence, tokens, count);
    return FW_OK;
  });
  return kept;
}

int32_t fw_decoder_feed(fw_decoder* decoder, int64_t sequence, const int32_t* tokens, int64_t count, float* logits,
                        int32_t all) {
  if (!has(decoder, sequence) || !tokens) return FW_INVALID;
  return changing(decoder, [&]() -> int32_t { return decoder->feed(sequence, tokens, count, logits, all != 0); });
}

int32_t fw_decoder_step(fw_decoder* decoder, const int64_t* sequences, const int32_t* tokens, int64_t count, float* logits) {
  if (!decoder || !sequences || !tokens || !logits || count < 1) return FW_INVALID;
  for (int64_t i = 0; i < count; ++i)
    if (!has(decoder, sequences[i]) || std::find(sequences, sequences + i, sequences[i]) != sequences + i) return FW_INVALID;
  return changing(decoder, [&]() -> int32_t { return decoder->step(sequences, tokens, count, logits); });
}

int32_t fw_decoder_generate(fw_decoder* decoder, const fw_generation* generation) {
  if (!decoder || !generation || !generation->prompts || !generation->lengths || !generation->sampling) return FW_INVALID;
  if (!generation->made || !generation->made_lengths || generation->stop_count < 0) return FW_INVALID;
  if ((generation->stop_count && !generation->stops) || !fair_size(generation->count, generation->most)) return FW_INVALID;
  return changing(decoder, [&]() -> int32_t { return decoder->generate(*generation); });
}

void fw_decoder_stop(fw_decoder* decoder, int32_t stop) {
  if (decoder) decoder->set_stop(stop != 0);
}

void fw_decoder_get_stats(fw_decoder* decoder, fw_decoder_stats* stats, int32_t reset) {
  if (!decoder || !stats) return;
  *stats = decoder->stats();
  stats->cache_bytes = decoder->cache().bytes();
  if (reset) decoder->stats() = {};
}
