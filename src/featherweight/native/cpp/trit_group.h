// PTQTP for one group, weight by weight as it is defined: the general path, for what the sorted one does not cover.
#ifndef FEATHERWEIGHT_TRIT_GROUP_H
#define FEATHERWEIGHT_TRIT_GROUP_H

#include <stdint.h>

// fw_trit_settings with what a solve adds.
struct TritJob {
  double tolerance_squared;
  double ridge;
  double ridge_max;
  double condition_threshold;
  int32_t planes;
  int32_t tied;
  int32_t tie_order;
  int32_t starts;
  int32_t final_least_squares;
  int32_t canonical;
  int32_t cap;
};

// A solution of another start replaces one only if it is better by more than rounding: see ptqtp_reference.py.
constexpr double kStartMargin = 1 - 1e-9;
constexpr double kStartFloor = 1e-12;

// Bytes of work space the functions below need for groups of n weights.
int64_t trit_group_bytes(int64_t n);

// w: n finite weights. Writes codes [n] and scales [planes] (tied: [1]), sets entries of moving [cap + 1]; returns the steps.
int solve_trit_group(const double* w, int64_t n, const TritJob& job, void* work, uint8_t* codes, double* scales,
                     uint8_t* moving);

// The trit step for given scales; planes whose scale is 0 get no trits.
void assign_trit_group(const double* w, int64_t n, const TritJob& job, const double* scales, uint8_t* codes);

// Normal equations (gram upper triangle, then right-hand side) of the greedy residual start.
void greedy_normal_equations(const double* w, int64_t n, int planes, void* work, double* gram, double* right);

#endif
