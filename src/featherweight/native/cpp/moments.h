// Second moments of activations of bfloat16, in float32, where the processor multiplies pairs of bfloat16: AMX, AVX512-BF16.
// Products of two such numbers are exact in float32; the definition is featherweight/native/moments.py, up to the order of sums.
#ifndef FEATHERWEIGHT_MOMENTS_H
#define FEATHERWEIGHT_MOMENTS_H

#include <stdint.h>

#include "featherweight.h"

typedef struct fw_moment_job {
  const void* left;   // bfloat16 [tokens, rows], left_stride apart
  const void* right;  // bfloat16 [tokens, columns], right_stride apart; may be the same memory
  float* sums;        // [rows, columns], sums_stride apart: becomes kept * sums + added * left' right
  void* work;         // of work_bytes, at least moment_work_bytes(rows, columns)
  int64_t tokens, rows, columns, left_stride, right_stride, sums_stride, work_bytes;
  float kept, added;
  int32_t above;  // 1: blocks that lie below the diagonal altogether stay as they are
} fw_moment_job;

// Without tokens the sums stay. FW_INVALID also where the instruction set in use has no products of bfloat16.
FW_API int32_t fw_moment(const fw_moment_job* job, int32_t threads);

constexpr int64_t kMomentTokens = 1024;  // at a time
constexpr int64_t kStrip = 32;           // columns that are packed together: two tile registers
constexpr int64_t kBlockTokens = 32;     // of one instruction
constexpr int64_t kBlockWords = kStrip * kBlockTokens / 2;
constexpr int64_t kStripWords = kBlockWords * (kMomentTokens / kBlockTokens);

inline int64_t moment_strips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }
// With room to begin at a multiple of 64.
inline int64_t moment_work_bytes(int64_t rows, int64_t columns) {
  return 4 * kStripWords * (moment_strips(rows) + moment_strips(columns)) + 64;
}

// Columns of some tokens as pairs of tokens, [block of 32 tokens][two times 16 columns][256 words]: as the first factor
// [16 columns][16 pairs], as the second [16 pairs][16 columns]. What is not there are zeros.
struct MomentStrip {
  const uint16_t* values;  // of the first column
  int64_t stride, tokens, columns;
  bool first;
  uint32_t* to;
};

struct MomentBlock {  // up to 32 rows by 32 columns
  const uint32_t *left, *right;
  int64_t blocks;  // of 32 tokens
  float* sums;
  int64_t stride, rows, columns;
  float kept, added;
};

struct MomentKernels {
  void (*begin)();  // in a thread, before its blocks
  void (*pack)(const MomentStrip& strip);
  void (*add)(const MomentBlock& block);
  void (*end)();
};

const MomentKernels* moment_kernels_amx();
const MomentKernels* moment_kernels_bf16();

#endif
