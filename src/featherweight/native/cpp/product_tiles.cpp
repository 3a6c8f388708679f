// Products with packed operands, for one instruction set (FW_ISA). See product_layout.h for what lies where.
//
// A matrix-vector product is bound by memory if the codes of a step become a vector of bytes in very few instructions and
// each such vector feeds one dot-product instruction; all else happens once a segment. Several tiles are done at once, from
// distant parts of the matrix: each is a stream of its own, which keeps more cache lines under way and hides the latency
// of the sums. With more than one token, codes are unpacked once a tile into the cache instead.
#include <stdint.h>
#include <string.h>

#include "product_activations.h"
#include "product_floats.h"
#include "product_kernels.h"
#include "product_many_tokens.h"
#include "product_one_token.h"
#include "product_plain.h"

#define FW_CONCAT_(a, b) a##b
#define FW_CONCAT(a, b) FW_CONCAT_(a, b)

namespace {

void integer_tiles(const fw_operand* operand, const IntegerInput& x, int64_t first, int64_t last, const Output& out, void* work) {
#if !defined(FW_HAS_TRITS)
  const bool few = x.tokens == 1 && operand->layout != FW_TRITS;
#else
  const bool few = x.tokens == 1;
#endif
  if (!few) {
    const Range range = code_range(operand);
    if (range == Range::kWide) return many_tokens_of<Range::kWide>(operand, x, first, last, out, work);
    if constexpr (kPairs)
      if (range == Range::kNarrow) return many_tokens_of<Range::kNarrow>(operand, x, first, last, out, work);
    return many_tokens_of<Range::kSevenBits>(operand, x, first, last, out, work);
  }
  if (operand->layout == FW_QUARTETS) return stream_tiles<QuartetReader, 1, kStreams>(operand, x, first, last, out);
#if defined(FW_HAS_TRITS)
  if (operand->layout == FW_TRITS) {
    switch (2 * operand->planes + operand->tied) {
      case 2:
      case 3: return stream_trits<1, 1, kStreams>(operand, x, first, last, out);
      case 4: return stream_trits<2, 2, kStreams>(operand, x, first, last, out);
      case 5: return stream_trits<2, 1, kStreams>(operand, x, first, last, out);
      case 6: return stream_trits<3, 3, kStreams>(operand, x, first, last, out);
      default: return stream_trits<3, 1, kStreams>(operand, x, first, last, out);
    }
  }
#endif
  switch (operand->bits) {
    case 1: return stream_tiles<FieldsOf<1>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 2: return stream_tiles<FieldsOf<2>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 3: return stream_tiles<FieldsOf<3>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 4: return stream_tiles<FieldsOf<4>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 5: return stream_tiles<FieldsOf<5>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 6: return stream_tiles<FieldsOf<6>::Reader, 1, kStreams>(operand, x, first, last, out);
    case 7: return stream_tiles<FieldsOf<7>::Reader, 1, kStreams>(operand, x, first, last, out);
    default: return stream_tiles<FieldsOf<8>::Reader, 1, kStreams>(operand, x, first, last, out);
  }
}

// Steps of the products of many tokens whose operands stay in the first cache.
int64_t spin(int64_t rounds) {
  constexpr int64_t kSteps = 64, kChunk = 8;  // as with codes of four bits
  alignas(64) uint8_t codes[kGemmTiles][kStepBytes * kSteps] = {};
  alignas(64) int8_t x[4 * kGemmTokens * kSteps] = {};
  const uint8_t* places[kGemmTiles];
  for (int t = 0; t < kGemmTiles; ++t) places[t] = codes[t];
  Sums sum[kGemmTiles][kGemmTokens];
  each<kGemmTiles>([&](auto t) FW_LAMBDA { each<kGemmTokens>([&](auto m) FW_LAMBDA { sum[t][m] = zero_sums(); }); });
  const auto before = [&](auto t, auto m) FW_LAMBDA { return sum[t][m]; };
  for (int64_t r = 0; r < rounds; r += kSteps) {
    asm volatile("" ::"r"(codes), "r"(x) : "memory");  // the values are not known to the compiler
    gemm_steps<kGemmTiles, kGemmTokens, kPairs ? Range::kNarrow : Range::kSevenBits>(places, x, kSteps, kChunk, before, sum);
  }
  Sums all = zero_sums();
  each<kGemmTiles>([&](auto t) FW_LAMBDA { each<kGemmTokens>([&](auto m) FW_LAMBDA { all = add(all, sum[t][m]); }); });
  alignas(64) float v[16];
  store_floats(v, to_floats(all));
  return *std::min_element(v, v + 16) < -1.0F ? 0 : rounds * kGemmTiles * kGemmTokens * 64;  // reads all lanes
}

#define FW_STRING_(a) #a
#define FW_STRING(a) FW_STRING_(a)

#if defined(FW_HAS_TRITS)
constexpr int32_t kTritsFaster = 1;
#else
constexpr int32_t kTritsFaster = 0;
#endif

constexpr ProductKernels kKernels = {FW_STRING(FW_ISA), kTritsFaster, work_bytes, integer_tiles, float_tiles,
                                     plain_input,       plain_tiles,  float_rows, quantize,      hadamard,
                                     unpack_tile,       spin,         plain_spin};

}  // namespace

const ProductKernels* FW_CONCAT(product_kernels_, FW_ISA)() { return &kKernels; }
