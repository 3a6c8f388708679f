#include "kv_cache.h"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

Page::Page(int64_t bytes) : alignment_(static_cast<std::align_val_t>(bytes < kHuge ? 64 : kHuge)) {
  const auto size = static_cast<size_t>(bytes);
  data_ = static_cast<unsigned char*>(::operator new(size, alignment_));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHuge) madvise(data_, size, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
  std::memset(data_, 0, size);  // attention multiplies what lies behind the last position by 0, which must not be a NaN
}

KvCache::KvCache(const fw_decoder_settings& settings, int64_t padded_dim)
    : layout_(settings, padded_dim),
      type_(settings.cache == FW_INT8 ? CacheType::kInt8 : CacheType::kHalf),
      sequences_(static_cast<size_t>(settings.sequences)) {}

void KvCache::make_room(int64_t sequence, int64_t position) {
  std::vector<unsigned char*>& pages = sequences_[static_cast<size_t>(sequence)].pages;
  while (static_cast<int64_t>(pages.size()) * kPage <= position) {
    if (free_.empty()) {
      auto page = std::make_unique<Page>(layout_.bytes);
      pages_.reserve(pages_.size() + 1);
      free_.reserve(pages_.size() + 1);
      free_.push_back(page->data());
      pages_.push_back(std::move(page));
    }
    pages.push_back(free_.back());
    free_.pop_back();
  }
}

void KvCache::truncate(int64_t index, int64_t length) {
  Sequence& sequence = sequences_[static_cast<size_t>(index)];
  sequence.tokens.resize(static_cast<size_t>(length));
  while (static_cast<int64_t>(sequence.pages.size()) > (length + kPage - 1) / kPage) {
    free_.push_back(sequence.pages.back());
    sequence.pages.pop_back();
  }
}
