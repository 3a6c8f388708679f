// Keys and values of the sequences of a decoder, in pages that are handed out as sequences grow.
#ifndef FEATHERWEIGHT_KV_CACHE_H
#define FEATHERWEIGHT_KV_CACHE_H

#include <stdint.h>

#include <memory>
#include <new>
#include <vector>

#include "decoder.h"
#include "decoder_loops.h"

// Zeroed memory of the cache. Attention goes through all of it for every token: huge pages of the system double its speed.
class Page {
 public:
  explicit Page(int64_t bytes);
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  ~Page() { ::operator delete(data_, alignment_); }
  unsigned char* data() const { return data_; }

 private:
  static constexpr int64_t kHuge = int64_t{1} << 21;
  std::align_val_t alignment_;
  unsigned char* data_;
};

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

  const PageLayout& layout() const { return layout_; }
  CacheType type() const { return type_; }
  int64_t bytes() const { return static_cast<int64_t>(pages_.size()) * layout_.bytes; }
  Sequence& operator[](int64_t index) { return sequences_[static_cast<size_t>(index)]; }
  const Sequence& operator[](int64_t index) const { return sequences_[static_cast<size_t>(index)]; }

  // A page for a position of a sequence, and for all before it.
  void make_room(int64_t sequence, int64_t position);
  unsigned char* page(int64_t sequence, int64_t position) {
    return sequences_[static_cast<size_t>(sequence)].pages[static_cast<size_t>(position / kPage)];
  }
  void truncate(int64_t sequence, int64_t length);

 private:
  PageLayout layout_;
  CacheType type_;
  std::vector<Sequence> sequences_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<unsigned char*> free_;
};

#endif
