// Decoders of a model, driven through the C interface; every status is checked.
#ifndef FEATHERWEIGHT_TESTS_DECODER_RUNS_H
#define FEATHERWEIGHT_TESTS_DECODER_RUNS_H

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "decoder_models.h"
#include "decoder_network.h"
#include "product_checks.h"

using Tokens = std::vector<int32_t>;
using Logits = std::vector<float>;

class Decoder {
 public:
  Decoder(const Model& model, int threads, int64_t chunk) : model_(model) {
    fw_decoder_settings settings = model.settings;
    settings.threads = threads;
    settings.chunk = chunk;
    check(fw_decoder_new(&settings, &decoder_) == FW_OK, model.name + ": a decoder is made");
    decoder_->use_all_threads();
  }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;
  ~Decoder() { fw_decoder_free(decoder_); }

  fw_decoder* get() const { return decoder_; }

  // Logits of the last token, or of all.
  Logits feed(int64_t sequence, const Tokens& tokens, bool all = false) {
    Logits logits(static_cast<size_t>(model_.vocabulary()) * (all ? tokens.size() : 1));
    check(fw_decoder_feed(decoder_, sequence, tokens.data(), count(tokens), logits.data(), all) == FW_OK,
          model_.name + ": tokens are fed");
    return logits;
  }
  void feed_quietly(int64_t sequence, const Tokens& tokens) {
    if (tokens.empty()) return;
    check(fw_decoder_feed(decoder_, sequence, tokens.data(), count(tokens), nullptr, 0) == FW_OK,
          model_.name + ": tokens are fed without logits");
  }
  Logits step(const std::vector<int64_t>& sequences, const Tokens& tokens) {
    Logits logits(static_cast<size_t>(model_.vocabulary()) * tokens.size());
    check(fw_decoder_step(decoder_, sequences.data(), tokens.data(), count(tokens), logits.data()) == FW_OK,
          model_.name + ": a step");
    return logits;
  }
  void truncate(int64_t sequence, int64_t length) {
    check(fw_decoder_truncate(decoder_, sequence, length) == FW_OK, model_.name + ": is truncated");
  }
  int64_t length(int64_t sequence) const { return fw_decoder_length(decoder_, sequence); }
  int64_t keep_prefix(int64_t sequence, const Tokens& tokens) {
    return fw_decoder_keep_prefix(decoder_, sequence, tokens.data(), count(tokens));
  }

  std::vector<Tokens> generate(const std::vector<Tokens>& prompts, const std::vector<fw_sampling>& sampling, const Tokens& stops,
                               int64_t most) {
    Tokens flat, made(prompts.size() * static_cast<size_t>(most), -7);
    std::vector<int64_t> lengths, made_lengths(prompts.size());
    for (const Tokens& prompt : prompts) {
      flat.insert(flat.end(), prompt.begin(), prompt.end());
      lengths.push_back(count(prompt));
    }
    fw_generation g = {};
    g.count = static_cast<int64_t>(prompts.size());
    g.prompts = flat.data();
    g.lengths = lengths.data();
    g.sampling = sampling.data();
    g.stops = stops.data();
    g.stop_count = count(stops);
    g.most = most;
    g.made = made.data();
    g.made_lengths = made_lengths.data();
    check(fw_decoder_generate(decoder_, &g) == FW_OK, model_.name + ": texts are generated");
    std::vector<Tokens> texts;
    for (size_t i = 0; i < prompts.size(); ++i)
      texts.emplace_back(made.begin() + static_cast<int64_t>(i) * most, made.begin() + static_cast<int64_t>(i) * most + made_lengths[i]);
    return texts;
  }

  static int64_t count(const Tokens& tokens) { return static_cast<int64_t>(tokens.size()); }

 private:
  const Model& model_;
  fw_decoder* decoder_ = nullptr;
};

inline Tokens random_tokens(Random& random, int64_t vocabulary, int64_t count) {
  Tokens tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = random.below(static_cast<int>(vocabulary));
  return tokens;
}

inline void append(Logits& to, const Logits& more) { to.insert(to.end(), more.begin(), more.end()); }

#endif
