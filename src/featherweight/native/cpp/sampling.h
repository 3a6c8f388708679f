// Choosing a token from logits. In simple steps of fixed order: every machine takes the same one from the same logits.
#ifndef FEATHERWEIGHT_SAMPLING_H
#define FEATHERWEIGHT_SAMPLING_H

#include <stdint.h>

#include <vector>

#include "decoder.h"

// Whether all settings are numbers in their ranges.
bool valid_sampling(const fw_sampling& sampling);

class Sampler {
 public:
  explicit Sampler(int64_t vocabulary);

  // The token that `sampling` takes after `history`, or -1 if a logit is NaN or +Inf, or all are -Inf. Changes the logits.
  int32_t take(float* logits, const int32_t* history, int64_t length, const fw_sampling& sampling, uint64_t drawn);

 private:
  struct Candidate {
    float weight;  // e^((logit - largest) / temperature)
    int32_t token;
  };
  void penalise(float* logits, const int32_t* history, int64_t length, double penalty);
  void keep_top_k(const float* logits, int64_t count);
  void keep_top_p(double share);
  int32_t draw(const fw_sampling& sampling, uint64_t drawn) const;

  int64_t vocabulary_;
  std::vector<uint8_t> seen_;
  std::vector<Candidate> candidates_;  // in the order of tokens
  std::vector<float> heap_, sorted_;
};

#endif
