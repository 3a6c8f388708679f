// One pool of threads for the whole library. A region is run by all members of a team at once; they divide the work among
// themselves by their index and meet at barriers. Between regions the threads wait briefly in a loop, then sleep.
#ifndef FEATHERWEIGHT_TEAM_H
#define FEATHERWEIGHT_TEAM_H

#include <stdint.h>

#include <functional>
#include <utility>

class Team;
using Region = std::function<void(Team&)>;

class Team {
 public:
  int index() const { return index_; }
  int size() const { return size_; }
  // All members have arrived, and what they wrote is visible to all. If a member has thrown instead, this throws too, and the
  // region ends for all.
  void barrier();
  // This member's contiguous share of `items`, in whole blocks of `block`.
  std::pair<int64_t, int64_t> share(int64_t items, int64_t block = 1) const {
    const int64_t blocks = (items + block - 1) / block;
    const int64_t first = blocks * index_ / size_ * block, last = blocks * (index_ + 1) / size_ * block;
    return {first < items ? first : items, last < items ? last : items};
  }

  struct Shared;
  Team(Shared* shared, int index, int size) : shared_(shared), index_(index), size_(size) {}

 private:
  Shared* shared_;
  int index_, size_;
};

// Runs `region` with up to `threads` members (fewer if the system has no more threads to give, or if the calling thread is
// itself in a region). One region runs at a time: a second caller waits. An exception of any member is thrown here, the first
// where there are several; nobody waits at a barrier for the one who threw it.
void run_team(int threads, const Region& region);

#endif
