// What the machine can do: reading of memory, and products in registers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "parallel.h"
#include "product_input.h"
#include "product_kernels.h"
#include "team.h"

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

typedef int64_t Wide __attribute__((vector_size(64)));

// Sums `bytes` bytes as `Streams` streams side by side.
template <int Streams>
int64_t read_all(const char* from, int64_t bytes) {
  const int64_t stretch = bytes / Streams / 256 * 256;
  Wide sum[Streams] = {};
  for (int64_t at = 0; at < stretch; at += 64)
    for (int s = 0; s < Streams; ++s) {
      const char* place = from + s * stretch + at;
      __builtin_prefetch(place + 1024);
      Wide value;
      std::memcpy(&value, place, sizeof value);
      sum[s] += value;
    }
  int64_t all = 0;
  for (int s = 0; s < Streams; ++s)
    for (int i = 0; i < 8; ++i) all += sum[s][i];
  return all;
}

}  // namespace

double fw_read_bandwidth(int64_t bytes, int32_t repeats, int32_t threads) {
  double best = 0.0;
  guarded_call([&]() -> int32_t {
    if (bytes < 1 || bytes > kLargestSize) return FW_INVALID;
    threads = fair_threads(threads);
    const Memory memory = allocate(bytes);
    char* data = static_cast<char*>(memory.get());
    advise_huge(data, bytes);
    std::atomic<int64_t> sink{0};
    run_team(threads, [&](Team& team) {
      const auto [first, last] = team.share(bytes, 4096);
      std::memset(data + first, 1, static_cast<size_t>(last - first));
    });
    for (int64_t round = 0; round < int64_t{3} * repeats; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      run_team(threads, [&](Team& team) {
        const auto [first, last] = team.share(bytes, 4096);
        const int64_t length = last - first;
        sink += round % 3 == 0   ? read_all<1>(data + first, length)
                : round % 3 == 1 ? read_all<2>(data + first, length)
                                 : read_all<4>(data + first, length);
      });
      best = std::max(best, static_cast<double>(bytes) / seconds_since(begin));
    }
    return FW_OK;
  });
  return best;
}

namespace {

double peak(int64_t (*spin)(int64_t rounds), int32_t threads) {
  double best = 0.0;
  guarded_call([&]() -> int32_t {
    for (int round = 0; round < 5; ++round) {
      std::atomic<int64_t> work{0};
      const auto begin = std::chrono::steady_clock::now();
      run_team(fair_threads(threads), [&](Team&) { work += spin(1 << 20); });
      best = std::max(best, static_cast<double>(work.load()) / seconds_since(begin));
    }
    return FW_OK;
  });
  return best;
}

}  // namespace

double fw_int8_peak(int32_t threads) { return peak(product_kernels().spin, threads); }
double fw_bf16_peak(int32_t threads) { return peak(product_kernels().plain_spin, threads); }
