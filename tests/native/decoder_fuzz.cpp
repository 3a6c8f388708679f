// Random models through the decoder: whatever the recipe of a layer, results have the same bits for all numbers of threads, all
// chunks, in all batches, from a reused prefix, and for all instruction sets of which that is promised.
//
//     decoder_fuzz SEED COUNT    models SEED .. SEED + COUNT - 1; prints the number of the first one that fails
//
// The same arguments give the same models everywhere.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "decoder_runs.h"

namespace {

// Relative differences of logits that rounding may make.
constexpr double kExact = 1e-3, kRounded = 0.2;

// What is done with a model: two or more parts of a prompt, steps, a return to an earlier place, texts.
struct Script {
  std::vector<Tokens> prompts, continued;  // of each sequence
  std::vector<int64_t> cuts, kept;
  std::vector<Tokens> steps;  // [steps][sequences]
  std::vector<fw_sampling> sampling;
  Tokens stops;
  int64_t most = 0;
};

Script random_script(Random& random, int64_t vocabulary) {
  Script script;
  const int sequences = 1 + random.below(3);
  for (int i = 0; i < sequences; ++i) {
    const int64_t length = 1 + random.below(random.one_of({1, 3, 8, 16})) + (i == 0 && random.below(40) == 0 ? 270 : 0);
    script.prompts.push_back(random_tokens(random, vocabulary, length));
    script.cuts.push_back(random.below(static_cast<int>(length)));
    script.continued.push_back(random_tokens(random, vocabulary, 1 + random.below(4)));
    fw_sampling sampling = {0.0, 1.0, 0.0, 1.0, 0, random.bits()};
    if (random.below(3)) {
      sampling.temperature = random.one_of({0.3, 0.8, 1.5});
      sampling.top_k = random.one_of<int64_t>({0, 0, 1, 3, 40});
      sampling.top_p = random.one_of({1.0, 0.9, 0.5});
      sampling.min_p = random.one_of({0.0, 0.05});
      sampling.repetition_penalty = random.one_of({1.0, 1.2});
    }
    script.sampling.push_back(sampling);
  }
  const int steps = 1 + random.below(2);
  for (int i = 0; i < steps; ++i) script.steps.push_back(random_tokens(random, vocabulary, sequences));
  for (const Tokens& prompt : script.prompts) script.kept.push_back(random.below(static_cast<int>(prompt.size()) + steps));
  if (random.below(2)) script.stops = random_tokens(random, vocabulary, 1 + random.below(3));
  script.most = 1 + random.below(3);
  return script;
}

struct Variant {
  int threads;
  int64_t chunk;
  bool batched;
};

struct Outcome {
  Logits logits, of_steps;  // all; [steps][sequences][vocabulary]
  std::vector<Tokens> texts;
};

std::vector<Tokens> texts_of(Decoder& decoder, const Script& script, const std::vector<Tokens>& prompts, bool batched) {
  if (batched) return decoder.generate(prompts, script.sampling, script.stops, script.most);
  std::vector<Tokens> texts;  // one after the other, all in the decoder's first sequence
  for (size_t i = 0; i < prompts.size(); ++i)
    texts.push_back(decoder.generate({prompts[i]}, {script.sampling[i]}, script.stops, script.most)[0]);
  return texts;
}

Outcome play(const Model& model, const Script& script, const Variant& variant) {
  Outcome out;
  Decoder decoder(model, variant.threads, variant.chunk);
  const size_t count = script.prompts.size();
  std::vector<int64_t> all;
  for (size_t i = 0; i < count; ++i) {
    const auto sequence = static_cast<int64_t>(i);
    const Tokens& prompt = script.prompts[i];
    decoder.feed_quietly(sequence, Tokens(prompt.begin(), prompt.begin() + script.cuts[i]));
    append(out.logits, decoder.feed(sequence, Tokens(prompt.begin() + script.cuts[i], prompt.end())));
    all.push_back(sequence);
  }
  for (const Tokens& tokens : script.steps) {
    if (variant.batched)
      append(out.of_steps, decoder.step(all, tokens));
    else
      for (size_t i = 0; i < count; ++i) append(out.of_steps, decoder.step({all[i]}, {tokens[i]}));
  }
  append(out.logits, out.of_steps);
  for (size_t i = 0; i < count; ++i) {
    decoder.truncate(all[i], script.kept[i]);
    append(out.logits, decoder.feed(all[i], script.continued[i], true));
  }
  // Texts whose prompts begin like what is in the cache, then like each other.
  out.texts = texts_of(decoder, script, script.prompts, variant.batched);
  std::vector<Tokens> longer = script.prompts;
  for (size_t i = 0; i < count; ++i) {
    longer[i].insert(longer[i].end(), out.texts[i].begin(), out.texts[i].end());
    longer[i].insert(longer[i].end(), script.continued[i].begin(), script.continued[i].end());
  }
  const std::vector<Tokens> more = texts_of(decoder, script, longer, variant.batched);
  out.texts.insert(out.texts.end(), more.begin(), more.end());
  return out;
}

void compare(const Model& model, const Outcome& found, const Outcome& expected, const std::string& what) {
  check(same_bits(found.logits, expected.logits), model.name + ": logits, " + what);
  check(found.texts == expected.texts, model.name + ": texts, " + what);
}

// All tokens of a sequence at once, and as the script does it: part of the prompt, its rest, steps.
void compare_with_whole(const Model& model, const Script& script, const Outcome& expected) {
  if (model.settings.dynamic_base != 0) return;  // keys depend on how long the text was when they were made
  Tokens tokens = script.prompts[0];
  for (const Tokens& step : script.steps) tokens.push_back(step[0]);
  Decoder decoder(model, 2, 7);
  const Logits whole = decoder.feed(0, tokens, true);
  const auto vocabulary = static_cast<size_t>(model.vocabulary());
  const size_t before = script.prompts[0].size();
  const auto row = [&](const Logits& logits, size_t i) {
    return Logits(logits.begin() + static_cast<int64_t>(i * vocabulary), logits.begin() + static_cast<int64_t>((i + 1) * vocabulary));
  };
  check(same_bits(row(whole, before - 1), row(expected.logits, 0)), model.name + ": a prompt in two parts or with what follows");
  for (size_t i = 0; i < script.steps.size(); ++i)
    check(same_bits(row(whole, before + i), row(expected.of_steps, i * script.prompts.size())),
          model.name + ": tokens one by one or together");
  // Continued from a prefix that is found in the cache.
  Tokens other(tokens.begin(), tokens.begin() + static_cast<int64_t>(before / 2));
  other.insert(other.end(), script.continued[0].begin(), script.continued[0].end());
  int64_t kept = decoder.keep_prefix(0, other);
  if (kept == Decoder::count(other)) decoder.truncate(0, --kept);
  const Logits reused = decoder.feed(0, Tokens(other.begin() + kept, other.end()));
  Decoder fresh(model, 1, 64);
  check(kept >= static_cast<int64_t>(before / 2) - 1, model.name + ": a prefix is found");
  check(same_bits(reused, fresh.feed(3, other)), model.name + ": from a reused prefix or from the beginning");
}

// What `generate` does, step by step.
void compare_with_sampling_by_hand(const Model& model, const Script& script, const Outcome& expected) {
  Decoder decoder(model, 1, 64);
  Tokens text = script.prompts[0], made;
  Logits logits = decoder.feed(0, text);
  while (true) {
    const int32_t token = fw_sample(logits.data(), model.vocabulary(), text.data(), Decoder::count(text), &script.sampling[0],
                                    made.size());
    check(token >= 0, model.name + ": a token is drawn");
    if (token < 0 || std::find(script.stops.begin(), script.stops.end(), token) != script.stops.end()) break;
    text.push_back(token);
    made.push_back(token);
    if (Decoder::count(made) == script.most) break;
    logits = decoder.step({0}, {token});
  }
  check(made == expected.texts[0], model.name + ": texts, by generate or step by step");
}

double difference(const Logits& a, const Logits& b) {
  double missed = 0, all = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    missed += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    all += double{b[i]} * b[i];
  }
  return std::sqrt(missed / std::max(all, 1e-30));
}

// Largest relative differences between instruction sets that agree to rounding only.
double largest_rounded = 0, largest_exact = 0;

// Whether any operand holds bfloat16 values as they are, with which inputs may be rounded by pairs.
bool has_plain_bfloats(const Model& model) {
  for (const Memory& memory : model.store.operands) {
    const auto* header = static_cast<const fw_operand*>(memory.get());
    if (header->layout == FW_PLAIN && header->scale_dtype == FW_BFLOAT16) return true;
  }
  return false;
}

// The same bits of all instruction sets with fused multiply-adds. Without these, which is "baseline", attention and products
// of plain values round twice; and "bf16" and "amx" add products of bfloat16 in pairs, where inputs may be rounded. There the
// difference is one of rounding, which 8-bit activations and keys multiply where a code flips.
void compare_instruction_sets(const Model& model, const Script& script) {
  Outcome first, fused;
  const bool pairs = model.settings.precision == FW_ACTIVATION_INT8 && has_plain_bfloats(model);
  const bool eight_bits = model.settings.precision == FW_ACTIVATION_INT8 || model.settings.cache == FW_INT8;
  for (const char* isa : kIsas) {
    fw_select_isa(isa);
    const Outcome found = play(model, script, {1, 64, true});
    const std::string name = isa;
    if (first.logits.empty()) first = found;
    if (name != "baseline" && fused.logits.empty()) fused = found;
    if (name != "baseline" && !(pairs && (name == "bf16" || name == "amx"))) {
      compare(model, found, fused, "instruction sets with fused multiply-adds");
      continue;
    }
    const double d = difference(found.logits, first.logits);
    (eight_bits ? largest_rounded : largest_exact) = std::max(eight_bits ? largest_rounded : largest_exact, d);
    check(d <= (eight_bits ? kRounded : kExact), model.name + ": logits near those of other instruction sets");
  }
  fw_select_isa("auto");
}

void test_model(uint64_t seed) {
  Random random;
  random.state ^= seed * 0xd1342543de82ef95U;
  for (int i = 0; i < 8; ++i) random.bits();
  Model model;
  model.name = "model " + std::to_string(seed);
  random_model(model, random);
  const Script script = random_script(random, model.vocabulary());
  const Outcome expected = play(model, script, {1, 64, true});
  bool finite = true;
  for (const float logit : expected.logits) finite &= std::isfinite(logit);
  check(finite, model.name + ": all logits are finite");
  const bool longer = script.prompts[0].size() > 100;
  compare(model, play(model, script, {1, longer ? 30 : 1, true}), expected, "token by token");
  compare(model, play(model, script, {2, 64, false}), expected, "2 threads, sequence by sequence");
  compare(model, play(model, script, {3, 5 + random.below(20), true}), expected, "3 threads, in chunks");
  compare(model, play(model, script, {5, 64, true}), expected, "5 threads");
  compare_with_whole(model, script, expected);
  compare_with_sampling_by_hand(model, script, expected);
  compare_instruction_sets(model, script);
  add_to_hash(expected.logits);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 10;
  for (uint64_t model = seed; model < seed + count; ++model) {
    test_model(model);
    if ((model - seed) % 20 == 19) {
      std::printf("%llu models\n", static_cast<unsigned long long>(model - seed + 1));
      std::fflush(stdout);
    }
    if (!failures) continue;
    std::printf("the model of seed %llu fails: decoder_fuzz %llu 1\n", static_cast<unsigned long long>(model),
                static_cast<unsigned long long>(model));
    break;
  }
  std::printf("%llu models; instruction sets without the same bits differ by up to %.2g, in 8 bits %.2g\n",
              static_cast<unsigned long long>(count), largest_exact, largest_rounded);
  return report("decoder");
}
