// Keys and values of the sequences of a decoder, in pages that are handed out as sequences grow.
#ifndef FEATHERWEIGHT_KV_CACHE_H
#define FEATHERWEIGHT_KV_CACHE_H

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "decoder.h"
#include "decoder_loops.h"

// Keys and values of kPage positions of a sequence, in all layers: for every layer and head the keys, then the values.
struct PageLayout {
  int64_t kv_heads = 0, key_bytes = 0, value_bytes = 0, bytes = 0;

  PageLayout(const fw_decoder_settings& settings, int64_t padded_dim) : kv_heads(settings.kv_heads) {
    const bool int8 = settings.cache == FW_INT8;
    const int64_t element = int8 ? 1 : 2, scales = int8 ? kPage * 4 : 0;
    key_bytes = settings.head_dim * kPage * element + scales;  // kPage makes all of it multiples of 64
    value_bytes = padded_dim * kPage * element + scales;
    bytes = settings.layers * kv_heads * (key_bytes + value_bytes);
  }
  int64_t keys_at(int64_t layer, int64_t head) const { return (layer * kv_heads + head) * (key_bytes + value_bytes); }
  int64_t values_at(int64_t layer, int64_t head) const { return keys_at(layer, head) + key_bytes; }
};

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<unsigned char*> pages;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

class KvCache {
 public:
  KvCache(const fw_decoder_settings& settings, int64_t padded_dim);
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;
  ~KvCache();

  const PageLayout& layout() const { return layout_; }
  CacheType type() const { return type_; }
  int64_t bytes() const { return pages_ * layout_.bytes; }
  Sequence& operator[](int64_t index) { return sequences_[static_cast<size_t>(index)]; }
  const Sequence& operator[](int64_t index) const { return sequences_[static_cast<size_t>(index)]; }

  // A page for a position of a sequence, and for all before it.
  void make_room(int64_t sequence, int64_t position);
  unsigned char* page(int64_t sequence, int64_t position) {
    return sequences_[static_cast<size_t>(sequence)].pages[static_cast<size_t>(position / kPage)];
  }
  // Pages behind `length` are kept for what comes next, until trim.
  void truncate(int64_t sequence, int64_t length);
  // Gives the system back what no sequence needs.
  void trim();

 private:
  PageLayout layout_;
  CacheType type_;
  std::vector<Sequence> sequences_;
  int64_t pages_ = 0;  // of the sequences and free ones
  std::vector<unsigned char*> free_;
};

#endif
