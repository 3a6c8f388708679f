#include "kv_cache.h"

#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t kHuge = int64_t{1} << 21;

// Pages are zeroed: attention multiplies what lies behind the last position by 0, which must not be a NaN. It goes through all
// of them for every token, so huge pages of the system double its speed.

unsigned char* ordinary_page(int64_t bytes) {
  auto* page = static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
  std::memset(page, 0, static_cast<size_t>(bytes));
  return page;
}

#if defined(__linux__)

// Larger ones are mapped, since an allocator may keep what it is given back.
constexpr int64_t kMapped = int64_t{1} << 16;

unsigned char* new_page(int64_t bytes) {
  if (bytes < kMapped) return ordinary_page(bytes);
  const int64_t alignment = bytes < kHuge ? 0 : kHuge;
  const auto size = static_cast<size_t>(bytes + alignment);
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  auto* page = static_cast<unsigned char*>(map);
  if (alignment == 0) return page;
  const auto before = static_cast<size_t>(-reinterpret_cast<uintptr_t>(page) & static_cast<uintptr_t>(alignment - 1));
  const size_t whole = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;  // the kernel maps whole pages of its own
  if (before > 0) munmap(page, before);
  if (size > before + whole) munmap(page + before + whole, size - before - whole);
#if defined(MADV_HUGEPAGE)
  madvise(page + before, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
  return page + before;
}

void free_page(unsigned char* page, int64_t bytes) {
  if (bytes < kMapped)
    ::operator delete(page, std::align_val_t{64});
  else
    munmap(page, static_cast<size_t>(bytes));
}

#else

unsigned char* new_page(int64_t bytes) { return ordinary_page(bytes); }
void free_page(unsigned char* page, int64_t) { ::operator delete(page, std::align_val_t{64}); }

#endif

}  // namespace

KvCache::KvCache(const fw_decoder_settings& settings, int64_t padded_dim)
    : layout_(settings, padded_dim),
      type_(settings.cache == FW_INT8 ? CacheType::kInt8 : CacheType::kHalf),
      sequences_(static_cast<size_t>(settings.sequences)) {}

KvCache::~KvCache() {
  for (const Sequence& sequence : sequences_)
    for (unsigned char* page : sequence.pages) free_page(page, layout_.bytes);
  trim();
}

void KvCache::make_room(int64_t sequence, int64_t position) {
  std::vector<unsigned char*>& pages = sequences_[static_cast<size_t>(sequence)].pages;
  pages.reserve(static_cast<size_t>(position / kPage + 1));
  while (static_cast<int64_t>(pages.size()) * kPage <= position) {
    if (free_.empty()) {
      free_.reserve(static_cast<size_t>(pages_ + 1));  // so that giving pages back needs no memory
      pages.push_back(new_page(layout_.bytes));
      ++pages_;
    } else {
      pages.push_back(free_.back());
      free_.pop_back();
    }
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

void KvCache::trim() {
  for (unsigned char* page : free_) free_page(page, layout_.bytes);
  pages_ -= static_cast<int64_t>(free_.size());
  free_.clear();
}
