// Threads, memory and the border to C, for the files of the C interface.
#ifndef FEATHERWEIGHT_PARALLEL_H
#define FEATHERWEIGHT_PARALLEL_H

#include <algorithm>
#include <atomic>
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

namespace {

// Run body(worker, item) for all items on up to `threads` threads. bad_alloc in a worker ends the loop and is thrown here.
[[maybe_unused]] void parallel_for(int64_t items, int threads, const std::function<void(int, int64_t)>& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&](int worker) {
    try {
      for (int64_t item = next++; item < items && !failed; item = next++) body(worker, item);
    } catch (const std::bad_alloc&) {
      failed = true;
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
  if (failed) throw std::bad_alloc();
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
