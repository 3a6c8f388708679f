#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>

namespace {

// e^x for x <= 0 in float32, 0 below -87; without the standard library's, whose last bits differ between systems.
float exp_below(float x) {
  const float bounded = x < -87.0F ? -87.0F : x;
  const float shifted = bounded * 1.44269504F + 12582912.0F, n = shifted - 12582912.0F;
  const float r = (bounded - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.38888889e-3F;
  p = p * r + 8.33333333e-3F;
  p = p * r + 4.16666667e-2F;
  p = p * r + 1.66666667e-1F;
  p = p * r + 0.5F;
  p = (p * r) * r + r + 1.0F;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000U;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0F ? 0.0F : p * scale;
}

// Number `index` of the generator SplitMix64 (Steele, Lea and Flood, 2014) started at `seed`, in [0, 1).
double uniform(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

// The first of the largest; -1 if there is a NaN or +Inf, or nothing but -Inf.
int32_t largest(const float* logits, int64_t count) {
  constexpr int kLanes = 16;
  float most[kLanes], bad[kLanes] = {};
  std::fill(most, most + kLanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = logits[i + lane];
      most[lane] = value > most[lane] ? value : most[lane];
      bad[lane] += value > -std::numeric_limits<float>::infinity() ? value - value : value != value ? value : 0.0F;
    }
  for (int lane = 0; i < count; ++i, ++lane) {
    const float value = logits[i];
    most[lane] = value > most[lane] ? value : most[lane];
    bad[lane] += value > -std::numeric_limits<float>::infinity() ? value - value : value != value ? value : 0.0F;
  }
  const float best = *std::max_element(most, most + kLanes);
  for (float sum : bad)
    if (sum != 0.0F) return -1;
  if (best == -std::numeric_limits<float>::infinity()) return -1;
  return static_cast<int32_t>(std::find(logits, logits + count, best) - logits);
}

}  // namespace

bool valid_sampling(const fw_sampling& s) {
  if (!(s.temperature >= 0) || std::isinf(s.temperature) || !(s.top_p >= 0 && s.top_p <= 1)) return false;
  return s.min_p >= 0 && s.min_p <= 1 && s.repetition_penalty > 0 && std::isfinite(s.repetition_penalty) && s.top_k >= 0;
}

Sampler::Sampler(int64_t vocabulary) : vocabulary_(vocabulary), seen_(static_cast<size_t>(vocabulary)) {
  candidates_.reserve(static_cast<size_t>(vocabulary));
  sorted_.reserve(static_cast<size_t>(vocabulary));
}

// Keskar et al., arXiv:1909.05858: once for every token that has occurred.
void Sampler::penalise(float* logits, const int32_t* history, int64_t length, double penalty) {
  const float factor = static_cast<float>(penalty);
  for (int64_t i = 0; i < length; ++i) {
    const int32_t token = history[i];
    if (token < 0 || token >= vocabulary_ || seen_[static_cast<size_t>(token)]) continue;
    seen_[static_cast<size_t>(token)] = 1;
    logits[token] = logits[token] < 0 ? logits[token] * factor : logits[token] / factor;
  }
  for (int64_t i = 0; i < length; ++i)
    if (history[i] >= 0 && history[i] < vocabulary_) seen_[static_cast<size_t>(history[i])] = 0;
}

// Those not below the k-th largest logit; equals of it stay.
void Sampler::keep_top_k(const float* logits, int64_t count) {
  heap_.assign(logits, logits + count);
  std::make_heap(heap_.begin(), heap_.end(), std::greater<float>());
  for (int64_t i = count; i < vocabulary_; ++i) {
    if (!(logits[i] > heap_.front())) continue;
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<float>());
    heap_.back() = logits[i];
    std::push_heap(heap_.begin(), heap_.end(), std::greater<float>());
  }
  const float bound = heap_.front();
  candidates_.clear();
  for (int64_t i = 0; i < vocabulary_; ++i)
    if (logits[i] >= bound) candidates_.push_back({0.0F, static_cast<int32_t>(i)});
}

// The fewest likeliest candidates that together have this share (Holtzman et al., arXiv:1904.09751); equals of the last of
// them stay. Weights fall off quickly, so only those above a bound are sorted, which is lowered until it suffices.
void Sampler::keep_top_p(double share) {
  double total = 0;
  for (const Candidate& candidate : candidates_) total += static_cast<double>(candidate.weight);
  float bound = 0x1p-6F, last = 0.0F;
  for (;; bound = bound > 0x1p-30F ? bound * 0x1p-8F : 0.0F) {
    sorted_.clear();
    for (const Candidate& candidate : candidates_)
      if (candidate.weight >= bound) sorted_.push_back(candidate.weight);
    std::sort(sorted_.begin(), sorted_.end(), std::greater<float>());
    double sum = 0;
    size_t i = 0;
    while (i < sorted_.size() && sum < share * total) sum += static_cast<double>(sorted_[i++]);
    last = i ? sorted_[i - 1] : 1.0F;
    if (sum >= share * total || bound == 0.0F) break;
  }
  candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                   [last](const Candidate& candidate) { return candidate.weight < last; }),
                    candidates_.end());
}

int32_t Sampler::draw(const fw_sampling& sampling, uint64_t drawn) const {
  double total = 0;
  for (const Candidate& candidate : candidates_) total += static_cast<double>(candidate.weight);
  const double place = uniform(sampling.seed, drawn) * total;
  double sum = 0;
  int32_t token = -1;
  for (const Candidate& candidate : candidates_) {
    if (candidate.weight <= 0.0F) continue;
    token = candidate.token;
    sum += static_cast<double>(candidate.weight);
    if (sum > place) break;
  }
  return token;
}

int32_t Sampler::take(float* logits, const int32_t* history, int64_t length, const fw_sampling& sampling, uint64_t drawn) {
  if (sampling.repetition_penalty != 1.0) penalise(logits, history, length, sampling.repetition_penalty);
  const int32_t best = largest(logits, vocabulary_);
  if (best < 0 || sampling.temperature == 0.0 || sampling.top_k == 1) return best;
  if (sampling.top_k > 0 && sampling.top_k < vocabulary_) {
    keep_top_k(logits, sampling.top_k);
  } else {
    candidates_.resize(static_cast<size_t>(vocabulary_));
    for (int64_t i = 0; i < vocabulary_; ++i) candidates_[static_cast<size_t>(i)] = {0.0F, static_cast<int32_t>(i)};
  }
  // Of a temperature so low that its inverse is no float, 0 times the inverse must still be 0.
  constexpr double kFastest = std::numeric_limits<float>::max();
  const float most = logits[best], rate = static_cast<float>(std::min(1.0 / sampling.temperature, kFastest));
  for (Candidate& candidate : candidates_) candidate.weight = exp_below((logits[candidate.token] - most) * rate);
  if (sampling.top_p < 1.0) keep_top_p(sampling.top_p);
  if (sampling.min_p > 0.0) {
    const double bound = sampling.min_p;  // the likeliest has weight 1
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                     [bound](const Candidate& candidate) {
                                       return static_cast<double>(candidate.weight) < bound;
                                     }),
                      candidates_.end());
  }
  return draw(sampling, drawn);
}

int32_t fw_sample(const float* logits, int64_t vocabulary, const int32_t* history, int64_t history_length,
                  const fw_sampling* sampling, uint64_t drawn) {
  if (!logits || !sampling || vocabulary < 1 || vocabulary > INT32_MAX || !valid_sampling(*sampling)) return -1;
  if (history_length < 0 || (history_length && !history)) return -1;
  try {
    std::vector<float> copy(logits, logits + vocabulary);
    return Sampler(vocabulary).take(copy.data(), history, history_length, *sampling, drawn);
  } catch (const std::exception&) {
    return -1;
  }
}
