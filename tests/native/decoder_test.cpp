// The decoder, its cache, its layers and its sampling without Python: buffers for the calls that are made, refusals, memory that
// runs out at every place, the choice of tokens.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "decoder_runs.h"

// ---- memory that runs out ----

// Clang's thread sanitizer brings `operator new` itself, in a library that is linked whole: nothing can replace it there.
#if defined(__clang__) && defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FEATHERWEIGHT_FOREIGN_NEW
#endif
#endif

#ifndef FEATHERWEIGHT_FOREIGN_NEW
namespace {

constexpr int64_t kNever = INT64_MAX;
std::atomic<int64_t> allocations_left{kNever};

void* allocated(std::size_t size, std::size_t alignment) {
  if (allocations_left.load() != kNever && allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), size ? size : 1) != 0) throw std::bad_alloc();
  return memory;
}

// Not inlined: GCC would see memory of `new` in the hands of `free`, and warn, though both are replaced here.
[[gnu::noinline]] void given_back(void* memory) noexcept { std::free(memory); }

}  // namespace

void* operator new(std::size_t size) { return allocated(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocated(size, static_cast<std::size_t>(alignment)); }
void operator delete(void* memory) noexcept { given_back(memory); }
void operator delete(void* memory, std::size_t) noexcept { given_back(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { given_back(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { given_back(memory); }
#endif

namespace {

// Two layers whose queries, keys and values need inputs in the layouts of their groups.
void mixed_model(Model& model, int64_t query_group, int64_t key_group, int64_t value_group) {
  Random random;
  const Sizes sizes = {2, 128, 4, 2, 16, 64, 50};
  int role = 0;
  fill_model(model, random, sizes, [&](LinearMaker& maker, int64_t rows, int64_t cols) {
    const int64_t group = role % 7 == 0 ? query_group : role % 7 == 1 ? key_group : role % 7 == 2 ? value_group : 64;
    ++role;
    return maker.uniform(rows, cols, 4, group);
  });
  model.settings.precision = FW_ACTIVATION_INT8;
  model.name = "groups of " + std::to_string(query_group) + ", " + std::to_string(key_group) + ", " + std::to_string(value_group);
}

void test_mixed_layouts() {
  for (const std::vector<int64_t>& groups :
       {std::vector<int64_t>{128, 32, 128}, {128, 128, 4}, {8, 128, 4}, {128, 4, 8}, {4, 128, 128}, {128, 12, 20}}) {
    Model model;
    mixed_model(model, groups[0], groups[1], groups[2]);
    Random random;
    const Tokens tokens = random_tokens(random, model.vocabulary(), 40);
    Decoder whole(model, 1, 64), last(model, 2, 64), chunks(model, 3, 13);
    const Logits expected = whole.feed(0, tokens, true);
    const Logits tail(expected.end() - model.vocabulary(), expected.end());
    check(same_bits(last.feed(0, tokens), tail), model.name + ": the last token's logits alone");
    check(same_bits(chunks.feed(0, tokens, true), expected), model.name + ": in chunks");
    chunks.feed_quietly(1, tokens);
    check(chunks.length(1) == 40, model.name + ": a prompt without logits");
  }
}

// What there is no room for is refused by all members alike, before anything is written.
void test_room() {
  Model model;
  mixed_model(model, 128, 32, 16);
  const fw_layer& layer = model.layers[0];
  const fw_linear *both[] = {layer.key, layer.value}, *swapped[] = {layer.value, layer.key};
  const LinearPlan plan(both, 2, FW_ACTIVATION_INT8), other(swapped, 2, FW_ACTIVATION_INT8);
  LinearWork work;
  linear_reserve(work, plan, 3, 2);
  std::vector<float> x(5 * 128, 0.5F), out(2 * 5 * 32, 7.0F);
  const LinearOutput outputs[] = {{out.data(), 32}, {out.data() + 160, 32}};
  const auto apply = [&](const LinearPlan& wanted, int64_t tokens, int threads) {
    std::atomic<int32_t> status{FW_OK};
    run_team(threads, [&](Team& team) {
      const int32_t own = linear_apply(team, work, wanted, outputs, x.data(), tokens, 128);
      if (own != FW_OK) status.store(own);
    });
    return status.load();
  };
  check(apply(plan, 4, 2) == FW_INVALID, "more tokens than there is room for");
  check(apply(other, 3, 2) == FW_INVALID, "layers in another order than there is room for");
  check(apply(LinearPlan(), 1, 1) == FW_INVALID, "a plan without layers");
  check(std::all_of(out.begin(), out.end(), [](float v) { return v == 7.0F; }), "nothing is written without room");
  check(apply(plan, 3, 2) == FW_OK && apply(plan, 1, 1) == FW_OK, "what there is room for");
  linear_reserve(work, other, 3, 2);
  check(apply(other, 3, 2) == FW_OK && apply(plan, 3, 2) == FW_OK, "room for one call takes none from another");
}

void test_refused_layers() {
  Random random;
  Store store;
  LinearMaker maker(random, store);
  fw_term sparse = {};
  sparse.kind = FW_TERM_SPARSE;
  maker.add_sparse(sparse, 20, 60);
  const fw_linear* good = maker.finished(20, 60, {sparse}, true);
  check(fw_linear_check(good) == FW_OK, "a sparse layer");
  const auto refused = [&](const char* what, const auto& change) {
    fw_term t = sparse;
    std::vector<int32_t> pointers(t.row_pointers, t.row_pointers + t.pointers), columns(t.columns, t.columns + t.entries);
    t.row_pointers = pointers.data();
    t.columns = columns.data();
    fw_step step = {FW_HADAMARD, 4, 0, 0, 0, nullptr, nullptr};
    change(t, pointers, columns, step);
    if (t.steps > 0) t.step = &step;
    fw_linear linear = {20, 60, 1, &t, nullptr};
    std::vector<float> x(60), y(20);
    check(fw_linear_check(&linear) == FW_INVALID, std::string("refused: ") + what);
    check(fw_linear_apply(&linear, x.data(), 60, 1, 60, y.data(), 20, 20, FW_ACTIVATION_FLOAT, 1) == FW_INVALID,
          std::string("not applied: ") + what);
  };
  using Ints = std::vector<int32_t>;
  refused("pointers that fall", [](fw_term&, Ints& p, Ints&, fw_step&) { std::swap(p[3], p[9]); });
  refused("a first pointer below 0", [](fw_term&, Ints& p, Ints&, fw_step&) { p[0] = -5; });
  refused("a last pointer past the entries", [](fw_term&, Ints& p, Ints&, fw_step&) { p[20] += 1000000; });
  refused("a pointer far out", [](fw_term&, Ints& p, Ints&, fw_step&) { p[10] = INT32_MAX; });
  refused("a column past the input", [](fw_term&, Ints&, Ints& c, fw_step&) { c[1] = 60; });
  refused("a column below 0", [](fw_term&, Ints&, Ints& c, fw_step&) { c[0] = INT32_MIN; });
  refused("too few pointers", [](fw_term& t, Ints&, Ints&, fw_step&) { t.pointers = 20; });
  refused("no values", [](fw_term& t, Ints&, Ints&, fw_step&) { t.values = nullptr; });
  refused("another kind", [](fw_term& t, Ints&, Ints&, fw_step&) { t.kind = 3; });
  refused("no operand", [](fw_term& t, Ints&, Ints&, fw_step&) { t.kind = FW_TERM_OPERAND; });
  refused("a number of steps below 0", [](fw_term& t, Ints&, Ints&, fw_step&) { t.steps = -1; });
  for (const int32_t block : {0, -4, 7, 9, 36, 45, 100, 120, 8, INT32_MAX, INT32_MIN})
    refused("an order that the columns do not have", [block](fw_term& t, Ints&, Ints&, fw_step& s) {
      t.steps = 1;
      s.block = block;
    });
  check(!hadamard_order(65) && !hadamard_order(67 * 4) && !hadamard_order(INT64_MAX) && !hadamard_order(INT64_MIN),
        "orders of a large odd part");
  refused("a permutation that leaves the input", [](fw_term& t, Ints&, Ints& c, fw_step& s) {
    t.steps = 1;
    s = {FW_PERMUTE, 0, 0, 0, 60, c.data(), nullptr};
    std::fill(c.begin(), c.end(), 0);
    c[59] = 60;
  });
  refused("factors that are too few", [](fw_term& t, Ints&, Ints&, fw_step& s) {
    t.steps = 1;
    s = {FW_SCALE, 0, 0, 0, 59, nullptr, t.values};
  });
  refused("rounding to no bits", [](fw_term& t, Ints&, Ints&, fw_step& s) {
    t.steps = 1;
    s = {FW_ROUND, 8, 1, 0, 0, nullptr, nullptr};
  });
  std::vector<float> x(120), y(40);
  const auto apply = [&](int64_t x_count, int64_t tokens, int64_t x_stride, int64_t out_count, int64_t out_stride, int32_t precision) {
    return fw_linear_apply(good, x.data(), x_count, tokens, x_stride, y.data(), out_count, out_stride, precision, 1);
  };
  check(apply(120, 2, 60, 40, 20, 1) == FW_OK, "lengths and strides that fit");
  check(apply(119, 2, 60, 40, 20, 1) == FW_INVALID && apply(120, 2, 60, 39, 20, 1) == FW_INVALID, "memory that is too short");
  check(apply(120, 2, 59, 40, 20, 1) == FW_INVALID && apply(120, 2, 60, 40, 19, 1) == FW_INVALID, "strides below the width");
  check(apply(120, -1, 60, 40, 20, 1) == FW_INVALID && apply(INT64_MAX, INT64_MAX, 60, INT64_MAX, 20, 1) == FW_INVALID,
        "numbers of tokens");
  check(apply(120, 2, 60, 40, 20, 7) == FW_INVALID, "a precision that there is not");
}

// As many terms as one likes, each with its part of the result, and the bias.
void test_many_terms() {
  Random random;
  Store store;
  LinearMaker maker(random, store);
  std::vector<fw_term> terms;
  std::vector<float> expected(20), x(60), found(20);
  for (float& v : x) v = random.symmetric();
  for (int i = 0; i < 150; ++i) {
    fw_term t = maker.term(20, 60);
    const fw_linear* alone = maker.finished(20, 60, {t}, false);
    check(fw_linear_apply(alone, x.data(), 60, 1, 60, found.data(), 20, 20, FW_ACTIVATION_FLOAT, 2) == FW_OK, "one term");
    for (size_t r = 0; r < 20; ++r) expected[r] = i == 0 ? found[r] : expected[r] + found[r];
    terms.push_back(t);
  }
  const fw_linear* all = maker.finished(20, 60, std::move(terms), true);
  for (size_t r = 0; r < 20; ++r) expected[r] += all->bias[r];
  check(fw_linear_apply(all, x.data(), 60, 1, 60, found.data(), 20, 20, FW_ACTIVATION_FLOAT, 3) == FW_OK, "150 terms");
  check(same_bits(found, expected), "150 terms and the bias are all in the sum");
}

// ---- refusals of the decoder ----

void test_refused_settings() {
  Model model;
  mixed_model(model, 64, 64, 64);
  const auto refused = [&](const char* what, const auto& change) {
    fw_decoder_settings s = model.settings;
    std::vector<fw_layer> layers = model.layers;
    s.layer = layers.data();
    change(s, layers);
    fw_decoder* decoder = nullptr;
    check(fw_decoder_new(&s, &decoder) == FW_INVALID && !decoder, std::string("refused: ") + what);
    fw_decoder_free(decoder);
  };
  using Layers = std::vector<fw_layer>;
  const double nan = std::nan("");
  refused("no layers", [](fw_decoder_settings& s, Layers&) { s.layers = 0; });
  refused("a context below 1", [](fw_decoder_settings& s, Layers&) { s.context = -1; });
  refused("a context past all counting", [](fw_decoder_settings& s, Layers&) { s.context = INT64_MAX; });
  refused("an epsilon that is no number", [nan](fw_decoder_settings& s, Layers&) { s.epsilon = nan; });
  refused("a scale that is no number", [nan](fw_decoder_settings& s, Layers&) { s.rope_scale = nan; });
  refused("a base that is no number", [nan](fw_decoder_settings& s, Layers&) { s.dynamic_base = nan; });
  refused("heads that do not divide", [](fw_decoder_settings& s, Layers&) { s.kv_heads = 3; });
  refused("no embedding", [](fw_decoder_settings& s, Layers&) { s.embedding = nullptr; });
  const Memory zeros = allocate(1024);
  std::memset(zeros.get(), 0, 1024);
  refused("an embedding that is no operand", [&zeros](fw_decoder_settings& s, Layers&) { s.embedding = zeros.get(); });
  refused("no norm", [](fw_decoder_settings&, Layers& l) { l[1].mlp_norm = nullptr; });
  refused("a layer of another shape", [](fw_decoder_settings&, Layers& l) { std::swap(l[1].gate, l[1].down); });
  refused("a window below 0", [](fw_decoder_settings&, Layers& l) { l[0].window = -1; });
  refused("a precision that there is not", [](fw_decoder_settings& s, Layers&) { s.precision = 9; });
  fw_linear cut = *model.layers[0].query;
  fw_term term = *cut.term;
  term.operand_bytes -= 1;
  cut.term = &term;
  refused("a cut operand", [&cut](fw_decoder_settings&, Layers& l) { l[0].query = &cut; });
  fw_decoder_get_stats(nullptr, nullptr, 0);
  Decoder decoder(model, 1, 8);
  const int32_t tokens[] = {1, 2, 50, -1};
  const int64_t twice[] = {0, 0};
  Logits logits(100);
  check(fw_decoder_feed(decoder.get(), 4, tokens, 1, nullptr, 0) == FW_INVALID, "a sequence that there is not");
  check(fw_decoder_feed(decoder.get(), 0, tokens, 3, nullptr, 0) == FW_INVALID, "a token that there is not");
  check(fw_decoder_feed(decoder.get(), 0, tokens + 3, 1, nullptr, 0) == FW_INVALID, "a token below 0");
  check(fw_decoder_feed(decoder.get(), 0, tokens, 601, nullptr, 0) == FW_INVALID, "more tokens than the context");
  check(fw_decoder_step(decoder.get(), twice, tokens, 2, logits.data()) == FW_INVALID, "one sequence twice");
  check(decoder.length(0) == 0 && decoder.length(-1) == -1, "nothing has been fed");
}

// ---- tokens ----

int32_t sampled(const Logits& logits, const fw_sampling& sampling, uint64_t drawn = 0, const Tokens& history = {}) {
  return fw_sample(logits.data(), static_cast<int64_t>(logits.size()), history.data(), Decoder::count(history), &sampling, drawn);
}

void test_sampling() {
  const fw_sampling greedy = {0.0, 1.0, 0.0, 1.0, 0, 1};
  const float infinity = std::numeric_limits<float>::infinity();
  Logits logits = {0.0F, 3.0F, 1.0F, 3.0F, -infinity, 2.0F};
  check(sampled(logits, greedy) == 1, "the first of the likeliest");
  fw_sampling s = greedy;
  s.repetition_penalty = 2.0;
  check(sampled(logits, s, 0, {1}) == 3, "a token that has occurred is less likely");
  std::vector<int> drawn(6);
  s = {1.0, 1.0, 0.0, 1.0, 0, 7};
  for (uint64_t i = 0; i < 2000; ++i) ++drawn[static_cast<size_t>(sampled(logits, s, i))];
  check(drawn[4] == 0 && drawn[1] > 600 && drawn[3] > 600 && drawn[0] > 10 && drawn[5] > drawn[2], "tokens by their weights");
  for (const fw_sampling& narrow : {fw_sampling{1.0, 1.0, 0.0, 1.0, 2, 7}, {1.0, 0.6, 0.0, 1.0, 0, 7}, {1.0, 1.0, 0.9, 1.0, 0, 7},
                                    {1.0, 0.0, 0.0, 1.0, 0, 7}, {1e-300, 1.0, 0.0, 1.0, 0, 7}, {5e-324, 1.0, 0.0, 1.0, 0, 7}})
    for (uint64_t i = 0; i < 200; ++i) {
      const int32_t token = sampled(logits, narrow, i);
      check(token == 1 || token == 3, "only the likeliest are left");
    }
  const double nan = std::nan("");
  for (const fw_sampling& none : {fw_sampling{nan, 1.0, 0.0, 1.0, 0, 7}, {-1.0, 1.0, 0.0, 1.0, 0, 7}, {1.0, nan, 0.0, 1.0, 0, 7},
                                  {1.0, 1.5, 0.0, 1.0, 0, 7}, {1.0, 1.0, 2.0, 1.0, 0, 7}, {1.0, 1.0, nan, 1.0, 0, 7},
                                  {1.0, 1.0, 0.0, 0.0, 0, 7}, {1.0, 1.0, 0.0, nan, 0, 7}, {1.0, 1.0, 0.0, 1.0, -1, 7}})
    check(sampled(logits, none) == -1, "settings that are none");
  logits[2] = std::nanf("");
  check(sampled(logits, greedy) == -1, "a logit that is no number");
  logits[2] = infinity;
  check(sampled(logits, greedy) == -1, "a logit without bound");
  check(sampled(Logits(40, -infinity), greedy) == -1, "nothing likely at all");
  check(sampled(Logits(3, 1.0F), greedy, 0, {-5, 7, INT32_MAX}) == 0, "a history of tokens that there are not");
}

// ---- the cache ----

void test_cache() {
  Model model;
  mixed_model(model, 64, 64, 64);
  Random random;
  Decoder decoder(model, 2, 64);
  const Tokens text = random_tokens(random, model.vocabulary(), 300);
  const Logits expected = decoder.feed(0, text);
  fw_decoder_stats stats = {};
  fw_decoder_get_stats(decoder.get(), &stats, 1);
  const int64_t bytes = stats.cache_bytes;
  check(stats.prompt_tokens == 300 && bytes > 0, "what has been done is counted");
  decoder.truncate(0, 128);  // the end of a page
  check(same_bits(decoder.feed(0, Tokens(text.begin() + 128, text.end())), expected), "from the end of a page");
  decoder.truncate(0, 0);
  decoder.feed_quietly(2, random_tokens(random, model.vocabulary(), 290));  // on pages that held something else
  check(same_bits(decoder.feed(1, text), expected), "on pages that were used before");
  fw_decoder_get_stats(decoder.get(), &stats, 0);
  check(stats.cache_bytes <= 2 * bytes, "no more pages than tokens need");
  check(fw_decoder_truncate(decoder.get(), 1, 301) == FW_INVALID && fw_decoder_truncate(decoder.get(), 1, -1) == FW_INVALID,
        "no length that there is not");
}

// ---- memory that runs out ----

#ifndef FEATHERWEIGHT_FOREIGN_NEW
// Whichever allocation fails, the call says so, nobody waits for ever, and the next call finds all as it was.
void test_no_memory() {
  Model model;
  {
    Random random;
    random.state = 5;
    random_model(model, random);
  }
  model.name = "memory runs out";
  model.settings.dynamic_base = 0;
  Random random;
  const Tokens text = random_tokens(random, model.vocabulary(), 20);
  Decoder reference(model, 2, 64);
  const Logits expected = reference.feed(0, text);
  int refused = 0;
  for (int64_t left = 0; left < 200; left += 1 + left / 8) {
    fw_decoder_settings settings = model.settings;
    settings.threads = 2;
    fw_decoder* decoder = nullptr;
    allocations_left.store(left);
    int32_t status = fw_decoder_new(&settings, &decoder);
    allocations_left.store(kNever);
    if (status != FW_OK) {
      check(status == FW_NO_MEMORY, "a decoder that cannot be made says why");
      ++refused;
      continue;
    }
    decoder->use_all_threads();
    for (const int64_t after : {left, left / 2, int64_t{0}}) {
      Logits logits(static_cast<size_t>(model.vocabulary()));
      allocations_left.store(after);
      status = fw_decoder_feed(decoder, 0, text.data(), Decoder::count(text), logits.data(), 0);
      allocations_left.store(kNever);
      check(status == FW_OK || status == FW_NO_MEMORY, "a pass that cannot be made says why");
      refused += status != FW_OK;
      check(fw_decoder_truncate(decoder, 0, 0) == FW_OK, "the decoder goes on");
      check(fw_decoder_feed(decoder, 0, text.data(), Decoder::count(text), logits.data(), 0) == FW_OK, "the decoder works");
      check(same_bits(logits, expected), "the same logits after memory ran out");
      fw_decoder_truncate(decoder, 0, 0);
      fw_decoder_feed(decoder, 1, text.data(), 3, logits.data(), 0);  // leaves room for few
      fw_decoder_truncate(decoder, 1, 0);
    }
    fw_decoder_free(decoder);
  }
  check(refused > 20, "memory did run out");
}
#endif

// A region in which one member finds no memory ends for all, at whichever barrier the others are.
void test_no_memory_in_a_region() {
  for (int size = 2; size < 5; ++size)
    for (int thrower = 0; thrower < size; ++thrower)
      for (int round = 0; round < 3; ++round) {
        bool caught = false;
        std::atomic<int> members{0};
        try {
          run_team(size, [&](Team& team) {
            members = team.size();
            for (int i = 0; i < 3; ++i) {
              if (team.index() == thrower && i == round % 3) throw std::bad_alloc();
              team.barrier();
            }
          });
        } catch (const std::bad_alloc&) {
          caught = true;
        }
        check(caught || thrower >= members, "the caller learns of it");
      }
}

}  // namespace

int main() {
  test_mixed_layouts();
  test_room();
  test_refused_layers();
  test_many_terms();
  test_refused_settings();
  test_sampling();
  test_cache();
  test_no_memory_in_a_region();
#ifndef FEATHERWEIGHT_FOREIGN_NEW
  test_no_memory();
#endif
  std::printf("decoder: %s\n", failures ? "FAILED" : "all tests passed");
  return failures ? 1 : 0;
}
