// Compiled once for every instruction set, with FW_ISA naming it, and with products and sums contracted to fused
// multiply-adds where there are any: attention over a long prompt is bound by them. Like kernels.cpp, only C headers and
// code with internal linkage.
#include "decoder_loops.h"

#include <math.h>
#include <string.h>

#include "decoder_lanes.h"

#define FW_JOIN(a, b) a##b
#define FW_NAME(isa) FW_JOIN(decoder_loops_, isa)

namespace {

// ---- normalisation, activation, rotation ----

void add(float* x, const float* delta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += delta[i];
}

// 1 / root mean square, the sum in double: it is short beside the products around it.
float inverse_rms(const float* x, int64_t n, double epsilon) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const double value = (double)x[i + lane];
      sums[lane] += value * value;
    }
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += (double)x[i] * (double)x[i];
  double total = 0;
  for (int lane = 0; lane < 16; ++lane) total += sums[lane];
  return (float)(1.0 / sqrt(total / (double)n + epsilon));
}

void add_norm(float* x, const float* delta, const float* weight, int64_t n, double epsilon, float* out) {
  if (delta) add(x, delta, n);
  const float factor = inverse_rms(x, n, epsilon);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
}

inline Float swiglu_of(Float gate, Float up) { return gate / (1.0F + exp_of(-gate)) * up; }

void swiglu(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(gate + i, swiglu_of(load<Float>(gate + i), load<Float>(up + i)));
  if (i == n) return;
  float rest[2][kWidth] = {};
  memcpy(rest[0], gate + i, (size_t)(n - i) * sizeof(float));
  memcpy(rest[1], up + i, (size_t)(n - i) * sizeof(float));
  store(rest[0], swiglu_of(load<Float>(rest[0]), load<Float>(rest[1])));
  memcpy(gate + i, rest[0], (size_t)(n - i) * sizeof(float));
}

void rotate(float* head, const float* norm, double epsilon, const float* cosines, const float* sines, int64_t head_dim,
            float factor) {
  if (norm) add_norm(head, nullptr, norm, head_dim, epsilon, head);
  const int64_t half = head_dim / 2;
  float* other = head + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = other[i];
    head[i] = (a * cosines[i] - b * sines[i]) * factor;
    other[i] = (b * cosines[i] + a * sines[i]) * factor;
  }
}

// ---- the cache ----

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Codes of one head and token, x / scale to the nearest; the scale maps the largest magnitude to 127.
struct Codes {
  float scale, inverse;

  Codes(const float* x, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    scale = most / 127.0F;
    inverse = most > 0 ? 127.0F / most : 0.0F;
  }
  int8_t operator()(float value) const {
    const float code = value * inverse;
    return (int8_t)(code == code ? (int)lrintf(code) : 0);
  }
};

// Position of an element in a matrix of panels, see decoder_loops.h.
inline int64_t place(int64_t rows, int64_t columns, int64_t row, int64_t column) {
  const int64_t first = column / kPanel * kPanel, width = least(kPanel, columns - first);
  return first * rows + row * width + column - first;
}

void store_key(const float* key, int64_t head_dim, int64_t slot, CacheType type, unsigned char* keys) {
  if (type == CacheType::kInt8) {
    const Codes codes(key, head_dim);
    ((float*)(keys + head_dim * kPage))[slot] = codes.scale;
    for (int64_t d = 0; d < head_dim; ++d) ((int8_t*)keys)[place(head_dim, kPage, d, slot)] = codes(key[d]);
  } else {
    for (int64_t d = 0; d < head_dim; ++d) ((uint16_t*)keys)[place(head_dim, kPage, d, slot)] = to_half(key[d]);
  }
}

void store_value(const float* value, int64_t head_dim, int64_t padded_dim, int64_t slot, CacheType type,
                 unsigned char* values) {
  if (type == CacheType::kInt8) {
    const Codes codes(value, head_dim);
    ((float*)(values + kPage * padded_dim))[slot] = codes.scale;
    for (int64_t d = 0; d < head_dim; ++d) ((int8_t*)values)[place(kPage, padded_dim, slot, d)] = codes(value[d]);
  } else {
    for (int64_t d = 0; d < head_dim; ++d) ((uint16_t*)values)[place(kPage, padded_dim, slot, d)] = to_half(value[d]);
  }
}

// ---- attention ----

// c[r, :] (+)= a[r, :k] b[:k, :] for kRows rows and kVectors vectors of columns, all sums in registers. Every element is
// one chain over k, so that the width of the vectors does not show in it. Meanwhile memory that is needed next is fetched,
// `ahead`, as many bytes as are read.
template <int kRows, int kVectors, typename Element>
inline void product_tile(const float* const* a, const Element* b, int64_t b_stride, int64_t k, float* c, int64_t c_stride,
                         bool accumulate, const unsigned char* ahead) {
  Float sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = accumulate ? load<Float>(c + r * c_stride + v * kWidth) : Float{};
  for (int64_t i = 0; i < k; ++i) {
    if (ahead)
      for (int64_t line = 0; line < kVectors * kWidth * (int64_t)sizeof(Element); line += 64)
        __builtin_prefetch(ahead + i * b_stride * (int64_t)sizeof(Element) + line);
    Float values[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) values[v] = values_at(b + i * b_stride + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r][i] * values[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + r * c_stride + v * kWidth, sums[r][v]);
}

// As many sums as the registers hold beside a row of b.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif

// Rows first_row .. first_row + k of a matrix of panels.
template <typename Element>
struct Panels {
  const Element* data;
  int64_t rows, columns, first_row, k;
  const unsigned char* ahead;  // or null

  int64_t width(int64_t first) const { return least(kPanel, columns - first); }
  int64_t offset(int64_t first) const { return first * rows + first_row * width(first); }
};

template <int kRows, typename Element>
void product_rows(const float* const* a, const Panels<Element>& b, int64_t columns, float* c, int64_t c_stride,
                  bool accumulate) {
  for (int64_t panel = 0; panel < columns; panel += kPanel) {
    const int64_t width = b.width(panel), wanted = least(width, columns - panel), offset = b.offset(panel);
    const Element* data = b.data + offset;
    const unsigned char* ahead = b.ahead ? b.ahead + offset * (int64_t)sizeof(Element) : nullptr;
    int64_t j = 0;
    for (; j + kTile * kWidth <= wanted; j += kTile * kWidth)
      product_tile<kRows, kTile>(a, data + j, width, b.k, c + panel + j, c_stride, accumulate,
                                 ahead ? ahead + j * (int64_t)sizeof(Element) : nullptr);
    for (; j < wanted; j += kWidth)
      product_tile<kRows, 1>(a, data + j, width, b.k, c + panel + j, c_stride, accumulate, nullptr);
  }
}

// c [rows, columns] (+)= a [rows, k] b [k, :columns]; columns is a multiple of kPadding, and so of the width of a vector.
template <typename Element>
void product(const float* const* a, int64_t rows, const Panels<Element>& b, int64_t columns, float* c, int64_t c_stride,
             bool accumulate) {
  Panels<Element> rest = b;
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    product_rows<4>(a + row, rest, columns, c + row * c_stride, c_stride, accumulate);
    rest.ahead = nullptr;  // fetched by now
  }
  if (rows - row == 3) product_rows<3>(a + row, rest, columns, c + row * c_stride, c_stride, accumulate);
  if (rows - row == 2) product_rows<2>(a + row, rest, columns, c + row * c_stride, c_stride, accumulate);
  if (rows - row == 1) product_rows<1>(a + row, rest, columns, c + row * c_stride, c_stride, accumulate);
}

// Few rows take cached elements as they come; many would convert them again and again, so that a copy is made.
constexpr int64_t kFewRows = 8;

template <typename Element>
void product_cached(const float* const* a, int64_t rows, const Panels<Element>& b, int64_t columns, float* c,
                    int64_t c_stride, bool accumulate, float* copy) {
  if (rows <= kFewRows) return product(a, rows, b, columns, c, c_stride, accumulate);
  for (int64_t panel = 0; panel < columns; panel += kPanel) {
    const int64_t width = b.width(panel);
    const Element* data = b.data + b.offset(panel);
    for (int64_t i = 0; i < b.k * width; i += kWidth) store(copy + panel * b.k + i, values_at(data + i));
  }
  const Panels<float> copied = {copy, b.k, b.columns, 0, b.k, nullptr};
  product(a, rows, copied, columns, c, c_stride, accumulate);
}

// Keys or values of a page, of which rows first_row .. first_row + k take part.
struct Cached {
  const unsigned char* data;
  int64_t rows, columns, first_row, k;
  const unsigned char* ahead;
};

void product_with_cache(const AttentionBlock& block, const float* const* a, const Cached& b, int64_t columns, float* c,
                        int64_t c_stride, bool accumulate) {
  if (block.type == CacheType::kInt8) {
    const Panels<int8_t> panels = {(const int8_t*)b.data, b.rows, b.columns, b.first_row, b.k, b.ahead};
    product_cached(a, block.rows, panels, columns, c, c_stride, accumulate, block.work);
  } else {
    const Panels<uint16_t> panels = {(const uint16_t*)b.data, b.rows, b.columns, b.first_row, b.k, b.ahead};
    product_cached(a, block.rows, panels, columns, c, c_stride, accumulate, block.work);
  }
}

// One row's scores of a page, [columns], become e^(score - most); scores outside [low, high) become 0. Moves `most`,
// `total` and what has been summed so far to the new maximum.
void soften(float* scores, int64_t columns, int64_t low, int64_t high, float* most, float* total, float* sums, int64_t n) {
  for (int64_t i = 0; i < low; ++i) scores[i] = -INFINITY;
  for (int64_t i = high; i < columns; ++i) scores[i] = -INFINITY;
  Float peaks = splat(*most);
  for (int64_t i = 0; i < columns; i += kWidth) {
    const Float values = load<Float>(scores + i);
    peaks = values > peaks ? values : peaks;
  }
  float peak = peaks[0];
  for (int i = 1; i < kWidth; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
  Float added[kParts] = {};
  for (int64_t i = 0; i < columns; i += kPadding)
    for (int part = 0; part < kParts; ++part) {
      const Float weights = exp_of(load<Float>(scores + i + part * kWidth) - peak);
      added[part] += weights;
      store(scores + i + part * kWidth, weights);
    }
  if (peak > *most) {
    const float shrink = exp_of(splat(*most - peak))[0];
    *total *= shrink;
    for (int64_t i = 0; i < n; ++i) sums[i] *= shrink;
    *most = peak;
  }
  *total += sum_of(added);
}

// What a part of the positions comes to, for each row: [rows][padded_dim] sums of values, then the largest scores, then the
// sums of e^(score - largest).
struct Partial {
  float *sums, *most, *total;

  Partial(float* memory, int64_t rows, int64_t padded_dim)
      : sums(memory), most(memory + rows * padded_dim), total(most + rows) {}
};

inline int64_t first_position(const AttentionBlock& block) {
  return block.window ? greatest(0, block.position[0] - block.window + 1) : 0;
}

// Softmax of scores and sum of values, page by page ("online", Milakov and Gimelshein, arXiv:1805.02867), over the positions
// of one part.
void attend_part(const AttentionBlock& block, int64_t part, float* to) {
  float* scores = block.work + kPage * block.padded_dim;  // [rows, kPage]
  const Partial p(to, block.rows, block.padded_dim);
  const float* weights[kMostRows];
  for (int64_t r = 0; r < block.rows; ++r) {
    p.most[r] = -INFINITY;
    p.total[r] = 0;
  }
  memset(p.sums, 0, (size_t)(block.rows * block.padded_dim) * sizeof(float));
  const int64_t all = block.position[block.rows - 1] + 1, last = least(all, (part + 1) * kPart);
  const int64_t first = greatest(first_position(block), part * kPart);
  for (int64_t page = first / kPage; page * kPage < last; ++page) {
    const int64_t begin = page * kPage, count = least(kPage, last - begin), skip = greatest(0, first - begin);
    const int64_t columns = (count + kPadding - 1) / kPadding * kPadding;
    const unsigned char *keys = block.pages[page] + block.keys_at, *values = block.pages[page] + block.values_at;
    product_with_cache(block, block.query, {keys, block.head_dim, kPage, 0, block.head_dim, values}, columns, scores, kPage,
                       false);
    const float* key_scales = (const float*)(keys + block.head_dim * kPage);
    const float* value_scales = (const float*)(values + block.padded_dim * kPage);
    for (int64_t r = 0; r < block.rows; ++r) {
      float* row = scores + r * kPage;
      const int64_t low = block.window ? greatest(0, block.position[r] - block.window + 1 - begin) : 0;
      const int64_t high = least(count, block.position[r] + 1 - begin);
      weights[r] = row + skip;
      if (low >= high) {
        memset(row, 0, (size_t)columns * sizeof(float));
        continue;
      }
      if (block.type == CacheType::kInt8)
        for (int64_t i = low; i < high; ++i) row[i] *= key_scales[i];
      soften(row, columns, low, high, p.most + r, p.total + r, p.sums + r * block.padded_dim, block.padded_dim);
      if (block.type == CacheType::kInt8)
        for (int64_t i = low; i < high; ++i) row[i] *= value_scales[i];
    }
    // Most likely the next part is this thread's as well.
    const unsigned char* next = begin + kPage < all ? block.pages[page + 1] + block.keys_at : nullptr;
    product_with_cache(block, weights, {values, kPage, block.padded_dim, skip, count - skip, next}, block.padded_dim, p.sums,
                       block.padded_dim, true);
  }
}

// Adds a part to what the parts before it came to. One function for all callers, so that its roundings are the same for all.
__attribute__((noinline)) void merge(const Partial& to, const Partial& part, int64_t rows, int64_t padded_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.total[r] == 0) continue;  // this row sees none of the part's positions
    float* sums = to.sums + r * padded_dim;
    const float* added = part.sums + r * padded_dim;
    if (to.total[r] == 0) {
      memcpy(sums, added, (size_t)padded_dim * sizeof(float));
      to.most[r] = part.most[r];
      to.total[r] = part.total[r];
      continue;
    }
    const float peak = part.most[r] > to.most[r] ? part.most[r] : to.most[r];
    const float before = exp_of(splat(to.most[r] - peak))[0], factor = exp_of(splat(part.most[r] - peak))[0];
    for (int64_t d = 0; d < padded_dim; ++d) sums[d] = sums[d] * before + added[d] * factor;
    to.total[r] = to.total[r] * before + part.total[r] * factor;
    to.most[r] = peak;
  }
}

void finish(const AttentionBlock& block, const Partial& all) {
  for (int64_t r = 0; r < block.rows; ++r) {
    const float factor = 1.0F / all.total[r];
    for (int64_t d = 0; d < block.head_dim; ++d) block.out[r][d] = all.sums[r * block.padded_dim + d] * factor;
  }
}

void merge_parts(const AttentionBlock& block, float* partials, int64_t count) {
  const Partial all(partials, block.rows, block.padded_dim);
  for (int64_t i = 1; i < count; ++i)
    merge(all, Partial(partials + i * partial_floats(block.rows, block.padded_dim), block.rows, block.padded_dim), block.rows,
          block.padded_dim);
  finish(block, all);
}

void attend(const AttentionBlock& block) {
  float* memory = block.work + kPage * block.padded_dim + kMostRows * kPage;
  float* other = memory + partial_floats(kMostRows, block.padded_dim);
  const Partial all(memory, block.rows, block.padded_dim), added(other, block.rows, block.padded_dim);
  const int64_t first = first_position(block) / kPart, last = block.position[block.rows - 1] / kPart;
  attend_part(block, first, memory);
  for (int64_t part = first + 1; part <= last; ++part) {
    attend_part(block, part, other);
    merge(all, added, block.rows, block.padded_dim);
  }
  finish(block, all);
}

constexpr DecoderLoops kLoops = {add_norm, add, swiglu, rotate, store_key, store_value, attend,
                                 attend_part, merge_parts};

}  // namespace

const DecoderLoops* FW_NAME(FW_ISA)() { return &kLoops; }
