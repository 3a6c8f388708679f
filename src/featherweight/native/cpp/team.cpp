#include "team.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

// How long is waited in a loop before the processor is given back: longer than the parts between the barriers of a decoder
// differ, and than the gaps between its regions. Where other processes keep the processors busy, a member that loops for one
// that has none keeps both from going on, and one that yields waits for the others' whole time slices: only sleep helps there.
constexpr std::chrono::microseconds kPatience(100);
constexpr int kLooksBetweenClocks = 16;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `done()` within the time for which looping pays.
template <typename Done>
bool soon(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    for (int looks = 0; looks < kLooksBetweenClocks; ++looks) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Something that members wait for and one of them makes true: in a loop at first, asleep if it takes long, since a member that
// has no processor is not there sooner for another's looping.
class Event {
 public:
  template <typename Done>
  void wait(const Done& done) {
    if (done() || soon(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    happened_.wait(lock, done);
    sleepers_.fetch_sub(1);
  }

  // After what is waited for has become true by a sequentially consistent store.
  void tell() {
    if (sleepers_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    happened_.notify_all();
  }

 private:
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable happened_;
};

}  // namespace

struct alignas(64) Team::Shared {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> round{0};
  std::atomic<bool> failed{false};  // a member has thrown: it will not arrive at any further barrier
  Event changed;                    // `round` or `failed`
  std::mutex failure;
  std::exception_ptr error;
};

namespace {

thread_local bool inside_region = false;

// Thrown by the barriers of a region in which another member has thrown; the other's exception is the one that counts.
struct RegionEnded {};

}  // namespace

void Team::barrier() {
  if (size_ == 1) return;
  const unsigned round = shared_->round.load(std::memory_order_relaxed);
  if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    shared_->arrived.store(0, std::memory_order_relaxed);
    shared_->round.store(round + 1);
    shared_->changed.tell();
    return;
  }
  bool failed = false;
  shared_->changed.wait([&] {
    if (shared_->round.load() != round) return true;
    failed = shared_->failed.load();
    return failed;
  });
  if (failed) throw RegionEnded();
}

namespace {

void run_member(const Region& region, Team::Shared& shared, int index, int size) {
  Team team(&shared, index, size);
  inside_region = true;
  try {
    region(team);
  } catch (const RegionEnded&) {
  } catch (...) {
    const std::lock_guard<std::mutex> lock(shared.failure);
    if (!shared.error) shared.error = std::current_exception();
    shared.failed.store(true);  // those who wait at a barrier wait no longer
    shared.changed.tell();
  }
  inside_region = false;
}

class Pool {
  static constexpr uint64_t kMostMembers = 1024;

 public:
  static Pool& instance() {
    // Never destroyed: its threads may outlive static destructors. A forked child starts a pool of its own and leaves its
    // parent's alone: the threads of that stayed behind, its locks may be held by them, and its condition variable counts
    // sleepers that are not there to be woken.
    static std::atomic<Pool*> current{new Pool};
    Pool* pool = current.load();
    if (pool->process_ == getpid()) return *pool;
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
    return *pool;
  }

  void run(int threads, const Region& region) {
    const std::lock_guard<std::mutex> turn(turn_);
    const int members = 1 + grow(threads - 1);
    Team::Shared shared;
    region_ = &region;
    shared_ = &shared;
    left_.store(members - 1, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(sleep_);
      const uint64_t number = job_.load(std::memory_order_relaxed) / kMostMembers + 1;
      job_.store(number * kMostMembers + static_cast<uint64_t>(members), std::memory_order_release);
    }
    if (members > 1) wake_.notify_all();
    run_member(region, shared, 0, members);
    ended_.wait([this] { return left_.load() == 0; });
    if (shared.error) std::rethrow_exception(shared.error);
  }

 private:
  // Threads beside the caller that can be had, at most `wanted`.
  int grow(int wanted) {
    if (wanted > static_cast<int>(kMostMembers) - 2) wanted = static_cast<int>(kMostMembers) - 2;
    try {
      while (started_ < wanted) {
        std::thread(&Pool::serve, this, started_ + 1, job_.load()).detach();
        ++started_;
      }
    } catch (const std::system_error&) {  // no more threads, or no memory for them: fewer members do it as well
    } catch (const std::bad_alloc&) {
    }
    return started_ < wanted ? started_ : wanted;
  }

  void serve(int index, uint64_t seen) {
    while (true) {
      wait(seen);
      seen = job_.load(std::memory_order_acquire);
      if (index >= static_cast<int>(seen % kMostMembers)) continue;  // not of this team: touches nothing of it
      run_member(*region_, *shared_, index, static_cast<int>(seen % kMostMembers));
      left_.fetch_sub(1);
      ended_.tell();
    }
  }

  void wait(uint64_t seen) {
    if (soon([&] { return job_.load(std::memory_order_acquire) != seen; })) return;
    std::unique_lock<std::mutex> lock(sleep_);
    wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != seen; });
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> job_{0};  // the number of the region and how many members it has, in one word
  std::atomic<int> left_{0};
  Event ended_;  // `left_` has become less
  const Region* region_ = nullptr;
  Team::Shared* shared_ = nullptr;
  int started_ = 0;
  const pid_t process_ = getpid();
};

}  // namespace

void run_team(int threads, const Region& region) {
  if (threads <= 1 || inside_region) {
    Team::Shared shared;
    const bool nested = inside_region;
    run_member(region, shared, 0, 1);
    inside_region = nested;
    if (shared.error) std::rethrow_exception(shared.error);
    return;
  }
  Pool::instance().run(threads, region);
}
