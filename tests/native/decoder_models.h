// Random models for the decoder's tests: every layer with a recipe of its own, small enough that thousands take minutes.
#ifndef FEATHERWEIGHT_TESTS_DECODER_MODELS_H
#define FEATHERWEIGHT_TESTS_DECODER_MODELS_H

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <numeric>
#include <string>
#include <vector>

#include "decoder.h"
#include "packing.h"
#include "parallel.h"
#include "product_cases.h"
#include "product_layout.h"

// Keeps what the structs of a model point to: a deque does not move what is in it.
struct Store {
  std::deque<std::vector<float>> floats;
  std::deque<std::vector<int32_t>> integers;
  std::deque<std::vector<fw_step>> steps;
  std::deque<std::vector<fw_term>> terms;
  std::deque<Memory> operands;
  std::deque<fw_linear> linears;
};

class LinearMaker {
 public:
  LinearMaker(Random& random, Store& store) : random_(random), store_(store), make_(random) {}

  // A layer of one to three random terms, now and then of dozens.
  const fw_linear* linear(int64_t rows, int64_t cols) {
    const int count = random_.below(120) == 0 ? 23 + random_.below(10) : random_.one_of({1, 1, 1, 2, 3});
    std::vector<fw_term> terms;
    for (int i = 0; i < count; ++i) terms.push_back(term(rows, cols));
    return finished(rows, cols, std::move(terms), random_.below(3) == 0);
  }

  // A layer of one uniform operand, of `bits` bits in groups of `group` columns.
  const fw_linear* uniform(int64_t rows, int64_t cols, int bits, int64_t group) {
    fw_term t = {};
    t.kind = FW_TERM_OPERAND;
    t.operand = packed(make_.uniform(rows, cols, group, bits, false, FW_FLOAT32, Fill::kRandom), 0, &t.operand_bytes);
    return finished(rows, cols, {t}, false);
  }

  const fw_linear* finished(int64_t rows, int64_t cols, std::vector<fw_term> terms, bool with_bias) {
    store_.terms.push_back(std::move(terms));
    fw_linear linear = {rows, cols, static_cast<int64_t>(store_.terms.back().size()), store_.terms.back().data(), nullptr};
    if (with_bias) linear.bias = floats(rows, 0.1F);
    store_.linears.push_back(linear);
    return &store_.linears.back();
  }

  const float* floats(int64_t count, float size, float middle = 0.0F) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = middle + size * random_.symmetric();
    store_.floats.push_back(std::move(values));
    return store_.floats.back().data();
  }

  // What an embedding is, and a term of a layer is most often.
  const void* operand(int64_t rows, int64_t cols, int64_t* bytes) {
    const int64_t segment_of = random_.below(3);
    Matrix m = matrix(rows, cols);
    int64_t segment = 0;
    const int64_t group = std::min(m.source.group_size, cols), divisor = random_.one_of<int64_t>({1, 2, 4});
    const bool free = m.source.kind == FW_TRIT_PLANES || m.source.kind == FW_UNIFORM;
    if (segment_of == 0 && free && group % (4 * divisor) == 0) segment = group / divisor;
    return packed(std::move(m), segment, bytes);
  }

  fw_term term(int64_t rows, int64_t cols) {
    fw_term t = {};
    const int kind = random_.below(9);
    t.kind = kind == 0 ? FW_TERM_LOW_RANK : kind == 1 ? FW_TERM_SPARSE : FW_TERM_OPERAND;
    add_steps(t, cols);
    if (t.kind == FW_TERM_SPARSE) {
      add_sparse(t, rows, cols);
    } else if (t.kind == FW_TERM_LOW_RANK) {
      const int64_t rank = random_.one_of<int64_t>({1, 3, 8, 17});
      t.right = operand(rank, cols, &t.right_bytes);
      t.operand = operand(rows, rank, &t.operand_bytes);
    } else {
      t.operand = operand(rows, cols, &t.operand_bytes);
    }
    return t;
  }

  void add_sparse(fw_term& t, int64_t rows, int64_t cols) {
    std::vector<int32_t> pointers = {0}, columns;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < cols; ++col)
        if (random_.below(8) == 0) columns.push_back(static_cast<int32_t>(col));
      pointers.push_back(static_cast<int32_t>(columns.size()));
    }
    t.entries = static_cast<int64_t>(columns.size());
    t.pointers = rows + 1;
    t.values = floats(t.entries, 0.5F);
    store_.integers.push_back(std::move(pointers));
    t.row_pointers = store_.integers.back().data();
    store_.integers.push_back(std::move(columns));
    t.columns = store_.integers.back().data();
  }

 private:
  // Chains are often those of an earlier term, at the same place or as a copy: terms then share what they lead to.
  void add_steps(fw_term& t, int64_t cols) {
    if (random_.below(2) == 0) return;
    std::vector<const std::vector<fw_step>*> known;
    for (const std::vector<fw_step>& chain : store_.steps)
      if (!chain.empty() && chain.front().reserved == static_cast<int32_t>(cols)) known.push_back(&chain);
    if (!known.empty() && random_.below(3) > 0) {
      const std::vector<fw_step>& chain = *known[static_cast<size_t>(random_.below(static_cast<int>(known.size())))];
      t.steps = static_cast<int32_t>(chain.size());
      t.step = chain.data();
      return;
    }
    std::vector<fw_step> chain;
    const int count = random_.one_of({1, 1, 2, 3});
    for (int i = 0; i < count; ++i) chain.push_back(step(cols));
    store_.steps.push_back(std::move(chain));
    t.steps = count;
    t.step = store_.steps.back().data();
  }

  fw_step step(int64_t cols) {
    fw_step s = {};
    s.kind = random_.one_of<int32_t>({FW_PERMUTE, FW_SCALE, FW_HADAMARD, FW_HADAMARD, FW_ROUND});
    s.reserved = static_cast<int32_t>(cols);  // for add_steps alone
    s.count = cols;
    if (s.kind == FW_PERMUTE) {
      std::vector<int32_t> order(static_cast<size_t>(cols));
      std::iota(order.begin(), order.end(), 0);
      for (int64_t i = cols - 1; i > 0; --i) std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random_.below(static_cast<int>(i + 1)))]);
      store_.integers.push_back(std::move(order));
      s.order = store_.integers.back().data();
    } else if (s.kind == FW_SCALE) {
      s.values = floats(cols, 0.5F, 1.0F);
    } else if (s.kind == FW_HADAMARD) {
      std::vector<int32_t> blocks;
      for (int64_t block = 1; block <= cols; ++block)
        if (hadamard_fits(block, cols)) blocks.push_back(static_cast<int32_t>(block));
      s.block = blocks[static_cast<size_t>(random_.below(static_cast<int>(blocks.size())))];
      if (random_.below(4)) {
        std::vector<float> signs(static_cast<size_t>(cols));
        for (float& sign : signs) sign = random_.below(2) ? 1.0F : -1.0F;
        store_.floats.push_back(std::move(signs));
        s.values = store_.floats.back().data();
      } else {
        s.count = 0;
      }
    } else {
      s.block = random_.one_of<int32_t>({1, 8, 32, 1000});
      s.bits = random_.one_of<int32_t>({2, 4, 8, 16});
      s.count = 0;
    }
    return s;
  }

  int64_t group_for(int64_t cols, int64_t multiple) {
    const int64_t group = multiple * random_.one_of<int64_t>({1, 2, 4, 8, 8, 16, 25, 32});
    return random_.below(4) == 0 ? cols : group;
  }

  Matrix matrix(int64_t rows, int64_t cols) {
    const int32_t dtype = random_.one_of<int32_t>({FW_FLOAT32, FW_BFLOAT16, FW_FLOAT16, FW_LOG8});
    const int32_t float_type = dtype == FW_LOG8 ? FW_BFLOAT16 : dtype;
    const int64_t multiple = random_.one_of<int64_t>({1, 4, 4});
    const int packing = random_.below(2), planes = 1 + random_.below(3), bits = 1 + random_.below(8);
    switch (random_.below(9)) {
      case 0: return make_.trits(rows, cols, group_for(cols, multiple), planes, packing, {}, dtype, Fill::kRandom);
      case 1: {
        static const std::vector<int> kWeights[] = {{1}, {3, 1}, {3, 2}, {9, 3, 1}};
        const std::vector<int> weights = kWeights[random_.below(4)];
        return make_.trits(rows, cols, group_for(cols, 4), static_cast<int>(weights.size()), packing, weights, dtype, Fill::kRandom);
      }
      case 2: return make_.codebook(rows, cols, group_for(cols, multiple), bits, float_type);
      case 3: {
        const int stride = random_.one_of({1, 1, 2, 8});
        return make_.sherry(rows, cols, group_for(cols, random_.below(3) ? 4 * stride : 1), stride, dtype, Fill::kRandom);
      }
      case 4: return make_.dense(rows, cols, float_type);
      case 5: return make_.uniform_with_offsets(rows, cols, group_for(cols, multiple), bits, float_type, Fill::kRandom);
      default: return make_.uniform(rows, cols, group_for(cols, multiple), bits, random_.below(2) == 1, dtype, Fill::kRandom);
    }
  }

  // The numbers of a matrix are drawn anew, of a size that keeps the results of a layer near 1.
  void scale_down(Matrix& m) {
    const bool dense = m.source.kind == FW_DENSE, free = dense || m.source.kind == FW_CODEBOOK;
    const float levels = m.source.kind == FW_UNIFORM ? static_cast<float>(1 << m.source.bits) / 4.0F : 1.0F;
    const float size = 1.5F / (std::sqrt(static_cast<float>(m.source.cols)) * levels);
    if (m.source.scale_dtype == FW_LOG8) {
      m.source.scale_exponent = static_cast<int32_t>(std::floor(std::log2(size)));
      return;
    }
    draw(dense ? m.codes : m.stored_scales, m, [&] { return size * (free ? random_.symmetric() : 0.5F + random_.uniform()); });
    // So that weights lie about 0, as they do with the middle one of the codes for a zero point.
    draw(m.stored_offsets, m, [&] { return -2.0F * levels * size * (0.5F + random_.uniform()); });
  }

  template <typename Number>
  static void draw(std::vector<uint8_t>& bytes, const Matrix& m, const Number& number) {
    const int64_t width = scale_bytes(m.source.scale_dtype), count = static_cast<int64_t>(bytes.size()) / width;
    for (int64_t i = 0; i < count; ++i) {
      const float value = number();
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const auto half = static_cast<uint16_t>(m.source.scale_dtype == FW_FLOAT16 ? half_from_float(value) : bits >> 16);
      if (m.source.scale_dtype == FW_FLOAT32)
        std::memcpy(bytes.data() + 4 * i, &value, 4);
      else
        std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }

  const void* packed(Matrix m, int64_t segment, int64_t* bytes) {
    scale_down(m);
    m.finish();
    m.source.segment = segment;
    std::vector<int32_t> layouts = {FW_AUTO};
    for (const int32_t layout : m.layouts)
      if (fw_operand_bytes(&m.source, layout) > 0) layouts.push_back(layout);
    const int32_t layout = layouts[static_cast<size_t>(random_.below(static_cast<int>(layouts.size())))];
    *bytes = fw_operand_bytes(&m.source, layout);
    if (*bytes < 0) {  // groups that have no layout: as one group
      std::printf("no layout for %s\n", m.name.c_str());
      std::abort();
    }
    Memory memory = allocate(*bytes);
    int64_t bad = -1;
    if (fw_operand_pack(&m.source, layout, memory.get(), *bytes, 1, &bad) != FW_OK) std::abort();
    store_.operands.push_back(std::move(memory));
    return store_.operands.back().get();
  }

  Random& random_;
  Store& store_;
  Maker make_;
};

// A model, and the settings to make decoders of it from.
struct Model {
  Store store;
  std::vector<fw_layer> layers;
  fw_decoder_settings settings = {};
  std::string name;

  Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  int64_t vocabulary() const { return settings.vocabulary; }
};

struct Sizes {
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary;
};

inline Sizes random_sizes(Random& random) {
  Sizes s = {};
  s.layers = 1 + random.below(3);
  s.hidden = random.one_of<int64_t>({8, 12, 20, 24, 32, 40, 48, 64});
  s.kv_heads = 1 + random.below(3);
  s.heads = s.kv_heads * (1 + random.below(3));
  s.head_dim = random.one_of<int64_t>({4, 4, 6, 8, 8, 16, 18});
  s.ffn = random.one_of<int64_t>({4, 17, 24, 32, 56, 64, 100});
  s.vocabulary = random.one_of<int64_t>({5, 17, 33, 50, 70});
  return s;
}

// Layers of the seven roles by `make(rows, cols)`, a layer's role and number being of no matter to it.
template <typename Make>
void fill_model(Model& model, Random& random, const Sizes& sizes, const Make& make) {
  LinearMaker maker(random, model.store);
  fw_decoder_settings& s = model.settings;
  const int64_t query = sizes.heads * sizes.head_dim, key = sizes.kv_heads * sizes.head_dim;
  for (int64_t i = 0; i < sizes.layers; ++i) {
    fw_layer layer = {};
    layer.attention_norm = maker.floats(sizes.hidden, 0.3F, 1.0F);
    layer.mlp_norm = maker.floats(sizes.hidden, 0.3F, 1.0F);
    if (random.below(3) == 0) layer.query_norm = maker.floats(sizes.head_dim, 0.3F, 1.0F);
    if (random.below(3) == 0) layer.key_norm = maker.floats(sizes.head_dim, 0.3F, 1.0F);
    layer.query = make(maker, query, sizes.hidden);
    layer.key = make(maker, key, sizes.hidden);
    layer.value = make(maker, key, sizes.hidden);
    layer.output = make(maker, sizes.hidden, query);
    layer.gate = make(maker, sizes.ffn, sizes.hidden);
    layer.up = make(maker, sizes.ffn, sizes.hidden);
    layer.down = make(maker, sizes.hidden, sizes.ffn);
    layer.window = random.one_of<int64_t>({0, 0, 0, 1, 5, 60, 200});
    model.layers.push_back(layer);
  }
  s.layers = sizes.layers;
  s.hidden = sizes.hidden;
  s.heads = sizes.heads;
  s.kv_heads = sizes.kv_heads;
  s.head_dim = sizes.head_dim;
  s.ffn = sizes.ffn;
  s.vocabulary = sizes.vocabulary;
  s.layer = model.layers.data();
  int64_t bytes = 0;
  s.embedding = maker.operand(sizes.vocabulary, sizes.hidden, &bytes);
  s.norm = maker.floats(sizes.hidden, 0.3F, 1.0F);
  s.head = make(maker, sizes.vocabulary, sizes.hidden);
  std::vector<float> frequencies;
  for (int64_t i = 0; i < sizes.head_dim / 2; ++i)
    frequencies.push_back(std::pow(10000.0F, -2.0F * static_cast<float>(i) / static_cast<float>(sizes.head_dim)));
  model.store.floats.push_back(std::move(frequencies));
  s.frequencies = model.store.floats.back().data();
  s.rope_scale = random.below(4) ? 1.0 : 1.25;
  s.epsilon = 1e-5;
  s.context = 600;
  s.sequences = 4;
  s.chunk = 64;
  s.cache = random.one_of<int32_t>({FW_FLOAT16, FW_INT8});
  s.precision = random.one_of<int32_t>({FW_ACTIVATION_INT8, FW_ACTIVATION_FLOAT});
  s.threads = 1;
}

inline void random_model(Model& model, Random& random) {
  fill_model(model, random, random_sizes(random),
             [](LinearMaker& maker, int64_t rows, int64_t cols) { return maker.linear(rows, cols); });
  if (random.below(4) == 0) {
    model.settings.dynamic_base = 10000.0;
    model.settings.dynamic_factor = random.one_of({1.0, 2.0, 4.0});
    model.settings.dynamic_length = random.one_of<int64_t>({4, 16, 40});
  }
}

#endif
