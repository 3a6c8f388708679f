// How many members of a team pay where the processors have other work, too. Members meet at barriers, so one that waits for a
// processor stops all; then fewer get on faster, on two processors beside two busy processes one ten times as fast as two.
#ifndef FEATHERWEIGHT_PAYING_MEMBERS_H
#define FEATHERWEIGHT_PAYING_MEMBERS_H

#include <algorithm>
#include <limits>

// For passes one after the other that do the same but for their amount of work. All members take part at first; now and then, and
// soon when passes have become much slower, half as many or twice as many are tried, and kept if they are faster.
class PayingMembers {
 public:
  PayingMembers() = default;
  explicit PayingMembers(int most) : most_(most) {}

  // For the next pass, at most `most`; `took` says what came of it.
  int choose(int most) {
    if (most != most_) *this = PayingMembers(most);
    return std::max(1, most_ >> (trials_left_ ? trial_ : level_));
  }

  // Seconds of the pass by its work, in any unit.
  void took(double seconds) {
    if (most_ < 2) return;
    if (trials_left_) {
      tried_ = std::min(tried_, seconds);
      if (--trials_left_ == 0 || seconds > typical_) judge();
      return;
    }
    typical_ += typical_ > 0 ? (seconds - typical_) / 4 : seconds;
    best_ = best_ > 0 ? std::min(kForget * best_, seconds) : seconds;
    if (typical_ > kSlower * best_) pause_ = std::min(pause_, kPause);
    if (--pause_ <= 0) try_other();
  }

 private:
  static constexpr double kSlower = 1.5, kForget = 1.002, kFaster = 0.8;
  static constexpr int kTrials = 2, kPause = 8, kLongestPause = 1024;  // passes

  // Half as many and twice as many in turns, where there are both.
  void try_other() {
    const bool fewer = most_ >> (level_ + 1) > 0, more = level_ > 0;
    fewer_ = fewer && (!more || !fewer_);
    trial_ = fewer_ ? level_ + 1 : level_ - 1;
    trials_left_ = kTrials;
    tried_ = std::numeric_limits<double>::infinity();
  }

  void judge() {
    trials_left_ = 0;
    const bool faster = tried_ < kFaster * typical_;
    longest_ = faster ? kPause : std::min(4 * longest_, kLongestPause);
    pause_ = longest_;
    if (!faster) return;
    level_ = trial_;
    typical_ = best_ = tried_;
  }

  int most_ = 0, level_ = 0, trial_ = 0, trials_left_ = 0, pause_ = kPause, longest_ = kPause;
  double best_ = 0, typical_ = 0, tried_ = 0;
  bool fewer_ = false;
};

#endif
