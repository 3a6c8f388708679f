// Threads, memory and the border to C, for the files of the C interface.
#ifndef FEATHERWEIGHT_PARALLEL_H
#define FEATHERWEIGHT_PARALLEL_H

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "featherweight.h"

struct Aligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
using Memory = std::unique_ptr<void, Aligned>;

inline Memory allocate(int64_t bytes) { return Memory(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})); }

// The largest size of anything that is asked for: sums and products of a few such numbers and of element sizes do not overflow.
constexpr int64_t kLargestSize = int64_t{1} << 44;
constexpr int kMostThreads = 1024;

inline int fair_threads(int32_t threads) { return std::min(std::max(threads, 1), kMostThreads); }

// Whether rows times columns is a size that can be counted with.
inline bool fair_size(int64_t rows, int64_t columns) {
  return rows >= 0 && columns >= 0 && columns <= kLargestSize && (columns == 0 || rows <= kLargestSize / columns);
}

// The same of a matrix with rows `stride` apart, of which there may be one, with any stride.
inline bool fair_matrix(int64_t rows, int64_t stride, int64_t columns) {
  return rows == 0 || rows == 1 ? fair_size(rows, columns) : stride >= columns && fair_size(rows, stride);
}

// Whether `count` elements from `memory` on hold rows of `columns` elements that begin `stride` apart.
inline bool holds_rows(const void* memory, int64_t count, int64_t rows, int64_t stride, int64_t columns) {
  if (!memory || count < 0 || columns < 1 || stride < columns || !fair_size(rows, stride)) return false;
  return rows == 0 || (rows - 1) * stride + columns <= count;
}

namespace {

// Run body(worker, item) for all items on up to `threads` threads. An exception of a worker ends the loop and is thrown here.
[[maybe_unused]] void parallel_for(int64_t items, int threads, const std::function<void(int, int64_t)>& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&](int worker) {
    try {
      for (int64_t item = next++; item < items && !failed; item = next++) body(worker, item);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  const int64_t count = std::min<int64_t>(threads, items);
  try {
    others.reserve(static_cast<size_t>(count));
    for (int worker = 1; worker < count; ++worker) others.emplace_back(work, worker);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  } catch (const std::bad_alloc&) {
  }
  work(0);
  for (std::thread& other : others) other.join();
  if (failed) std::rethrow_exception(error);
}

// Run body(first, last, work) for all rows, `together` at a time, on up to `threads` threads with a work space of their own
// each, of work_bytes, aligned to 64 bytes.
template <typename Body>
[[maybe_unused]] void parallel_rows(int64_t rows, int64_t together, int32_t threads, int64_t work_bytes, const Body& body) {
  const int64_t parts = (rows + together - 1) / together;
  const int workers = static_cast<int>(std::min<int64_t>(fair_threads(threads), std::max<int64_t>(parts, 1)));
  std::vector<Memory> work(static_cast<size_t>(workers));
  parallel_for(parts, workers, [&](int worker, int64_t part) {
    Memory& mine = work[static_cast<size_t>(worker)];
    if (!mine) mine = allocate(work_bytes);
    body(part * together, std::min(rows, (part + 1) * together), mine.get());
  });
}

template <typename Body>
[[maybe_unused]] int32_t guarded_call(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return FW_NO_MEMORY;
  } catch (...) {
    return FW_INVALID;
  }
}

}  // namespace

#endif
