// The loops of the decoder outside matrix products; compiled once for every instruction set.
#ifndef FEATHERWEIGHT_DECODER_LOOPS_H
#define FEATHERWEIGHT_DECODER_LOOPS_H

#include <stdint.h>

// The cache consists of pages of so many positions. Keys of a head lie transposed, [head_dim, kPage], values as
// [kPage, padded_dim]: products with both then need no sums across lanes. Both are cut into panels of kPanel columns, one
// behind the other, so that a product, which goes down the columns that its sums have room for, reads along memory.
constexpr int64_t kPage = 128;
constexpr int64_t kPanel = 64;
constexpr int64_t kMostRows = 64;  // query heads of one attention block
constexpr int64_t kPadding = 16;   // padded_dim is head_dim rounded up to this
// Attention goes over positions in parts of so many, whose results are merged in their order. Parts can be given to different
// threads; who does which has no influence on the result.
constexpr int64_t kPart = 2 * kPage;

// Cached keys or values of one head in one page; int8 codes are followed by a float scale for every position.
enum class CacheType { kHalf, kInt8 };

struct AttentionBlock {
  const float* const* query;  // [rows], head_dim values each, already divided by the root of head_dim
  float* const* out;          // [rows]
  const int64_t* position;    // [rows], ascending
  int64_t rows;
  const unsigned char* const* pages;  // of the sequence
  int64_t keys_at, values_at;         // bytes from the beginning of a page
  int64_t head_dim, padded_dim;
  int64_t window;  // 0: all
  CacheType type;
  float* work;  // attention_floats(padded_dim)
};

constexpr int64_t partial_floats(int64_t rows, int64_t padded_dim) { return rows * (padded_dim + 2); }

constexpr int64_t attention_floats(int64_t padded_dim) {
  return kPage * padded_dim + kMostRows * kPage + 2 * partial_floats(kMostRows, padded_dim);
}

struct DecoderLoops {
  // x += delta (if any), out = x / rms(x) * weight.
  void (*add_norm)(float* x, const float* delta, const float* weight, int64_t n, double epsilon, float* out);
  void (*add)(float* x, const float* delta, int64_t n);
  // gate = gate / (1 + exp(-gate)) * up.
  void (*swiglu)(float* gate, const float* up, int64_t n);
  // RMSNorm (if any), rotation of the two halves of a head, factor.
  void (*rotate)(float* head, const float* norm, double epsilon, const float* cosines, const float* sines, int64_t head_dim,
                 float factor);
  // Put a key or value of one position of a page into the cache.
  void (*store_key)(const float* key, int64_t head_dim, int64_t slot, CacheType type, unsigned char* keys);
  void (*store_value)(const float* value, int64_t head_dim, int64_t padded_dim, int64_t slot, CacheType type,
                      unsigned char* values);
  void (*attend)(const AttentionBlock& block);
  // The same in pieces: what the positions [part * kPart, (part + 1) * kPart) come to, partial_floats(rows, padded_dim) floats,
  // of which some must be seen by a row; and the result of consecutive parts, one behind the other in memory.
  void (*attend_part)(const AttentionBlock& block, int64_t part, float* partial);
  void (*merge_parts)(const AttentionBlock& block, float* partials, int64_t count);
};

const DecoderLoops* decoder_loops_baseline();
const DecoderLoops* decoder_loops_avx2();
const DecoderLoops* decoder_loops_avx512();

#endif
