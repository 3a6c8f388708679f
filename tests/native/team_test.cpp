// The pool of threads: barriers, nested regions, more threads than processors, exceptions, callers side by side, forks; how many
// members pay.
#include "team.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "checks.h"
#include "paying_members.h"

namespace {

void check(bool holds, const char* what) { expect(holds, "team", what); }

void test_shares() {
  for (int size : {1, 2, 3, 7, 64})
    for (int64_t items : {0, 1, 5, 64, 1000})
      for (int64_t block : {1, 4, 16, 4096}) {
        int64_t next = 0;
        for (int index = 0; index < size; ++index) {
          const auto [first, last] = Team(nullptr, index, size).share(items, block);
          check(first == next || (first == items && last == items), "shares follow each other");
          check(first % block == 0 || first == items, "shares begin at blocks");
          next = last;
        }
        check(next == items, "shares cover all items");
      }
}

void test_members_and_barriers() {
  for (int threads : {1, 2, 5, 16}) {
    std::vector<int> seen(static_cast<size_t>(threads));
    std::atomic<int> members{0}, errors{0};
    run_team(threads, [&](Team& team) {
      if (team.index() == 0) members = team.size();
      // Every round each member writes its own place, then reads all: without the barriers somebody sees an old number.
      for (int round = 1; round <= 20; ++round) {
        seen[static_cast<size_t>(team.index())] = round;
        team.barrier();
        for (int other = 0; other < team.size(); ++other) errors += seen[static_cast<size_t>(other)] != round;
        team.barrier();
      }
    });
    check(members >= 1 && members <= threads, "no more members than asked for");
    check(errors == 0, "barriers hold");
  }
}

void test_nested() {
  std::atomic<int> inner{0}, outer{0}, wide{0};
  run_team(3, [&](Team&) {
    ++outer;
    for (int i = 0; i < 2; ++i)
      run_team(4, [&](Team& team) {
        wide += team.size() != 1;
        team.barrier();
        run_team(2, [&](Team&) { ++inner; });
      });
  });
  check(wide == 0, "a region within a region has one member");
  check(inner == 2 * outer, "every nested region ran once");
  std::atomic<int> after{0};
  run_team(3, [&](Team& team) { after = team.size(); });
  check(after == outer, "after nested regions teams are as large as before");
}

void test_exceptions() {
  for (int threads : {1, 2, 5})
    for (int thrower = 0; thrower < threads; ++thrower) {
      std::atomic<int> ran{0}, size{0};
      std::string caught;
      try {
        run_team(threads, [&](Team& team) {
          ++ran;
          size = team.size();
          team.barrier();
          if (team.index() == thrower) throw std::runtime_error("member");
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      check(ran == size, "all members ran to their end");
      check(caught == (thrower < size ? "member" : ""), "a member's exception reaches the caller");
    }
  bool caught = false;
  try {
    run_team(2, [](Team& team) {
      run_team(2, [&](Team&) {
        if (team.index() == 0) throw 7;
      });
    });
  } catch (int seven) {
    caught = seven == 7;
  }
  check(caught, "an exception of a nested region reaches the caller");
  std::atomic<int> ran{0};
  run_team(2, [&](Team&) { ++ran; });
  check(ran >= 1, "the pool works after exceptions");
}

void test_callers_side_by_side() {
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 30; ++i)
        run_team(1 + (caller + i) % 4, [&](Team& team) {
          const auto [first, last] = team.share(100);
          total += last - first;
          team.barrier();
        });
    });
  for (std::thread& caller : callers) caller.join();
  check(total == 3 * 30 * 100, "regions of several callers");
}

// The threads of a pool do not live on in a forked child, which must find that out, also while they sleep in the parent.
void test_fork() {
  run_team(4, [](Team&) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    for (int i = 0; i < 5; ++i) {
      std::atomic<int> ran{0}, size{0};
      run_team(3, [&](Team& team) {
        ++ran;
        size = team.size();
        team.barrier();
      });
      if (ran != size) _exit(1);
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    }
    _exit(0);
  }
  int status = -1;
  check(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a forked child has a pool of its own");
  std::atomic<int> ran{0};
  run_team(2, [&](Team&) { ++ran; });
  check(ran >= 1, "the parent's pool works on");
}

// A member that arrives late finds the others asleep; all get on. Longer than members wait in a loop, and often enough for a
// member to fall asleep just as the last arrives.
void test_late_members() {
  std::atomic<int> passed{0}, members{0};
  run_team(3, [&](Team& team) {
    if (team.index() == 0) members = team.size();
    for (int round = 0; round < 60; ++round) {
      if (team.index() == round % team.size()) std::this_thread::sleep_for(std::chrono::microseconds(10 * round));
      team.barrier();
    }
    ++passed;
  });
  check(passed == members, "late members are waited for");
  bool caught = false;
  try {
    run_team(2, [](Team& team) {
      if (team.index() == team.size() - 1) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        throw 7;
      }
      team.barrier();
    });
  } catch (int) {
    caught = true;
  }
  check(caught, "a member that throws wakes those who sleep at a barrier");
}

// Members that `paying` has after `passes` that take seconds(members), and how many passes had others.
template <typename Seconds>
int settle(PayingMembers& paying, int most, int passes, int* others, const Seconds& seconds) {
  std::vector<int> chosen;
  for (int i = 0; i < passes; ++i) {
    chosen.push_back(paying.choose(most));
    paying.took(seconds(chosen.back()));
  }
  std::vector<int> sorted = chosen;
  std::nth_element(sorted.begin(), sorted.begin() + passes / 2, sorted.end());
  const int usual = sorted[sorted.size() / 2];
  if (others) *others = static_cast<int>(std::count_if(chosen.begin(), chosen.end(), [&](int n) { return n != usual; }));
  return usual;
}

void test_paying_members() {
  const auto idle = [](int members) { return 1.0 / members; };
  const auto busy = [](int members) { return members == 1 ? 1.0 : 5.0 * members; };  // each barrier waits for somebody
  const auto half_free = [](int members) { return members > 4 ? 9.0 : 1.0 / members; };
  int others = 0;
  PayingMembers paying;
  check(settle(paying, 8, 1000, &others, idle) == 8 && others <= 10, "idle processors: all members, and few tries of fewer");
  check(settle(paying, 8, 400, nullptr, busy) == 1, "busy processors: one member");
  check(settle(paying, 8, 3000, nullptr, idle) == 8, "processors that are idle again: all members again");
  check(settle(paying, 8, 400, nullptr, half_free) == 4, "half of the processors busy: as many members as find one");
  PayingMembers fresh;
  check(settle(fresh, 2, 400, &others, busy) == 1, "busy from the start: one member");
  check(settle(fresh, 1, 50, &others, idle) == 1 && others == 0, "one thread: one member");
  check(settle(fresh, 2, 50, nullptr, idle) == 2, "another number of threads: from the start");
}

}  // namespace

// "emulated": without forks, after which neither QEMU's user mode nor the thread sanitizer let threads be started.
int main(int argc, char** argv) {
  test_shares();
  test_members_and_barriers();
  test_nested();
  test_exceptions();
  test_callers_side_by_side();
  test_late_members();
  test_paying_members();
  if (argc < 2 || std::string(argv[1]) != "emulated") test_fork();
  std::printf(failures ? "%d failures\n" : "all team tests passed\n", failures);
  return failures ? 1 : 0;
}
