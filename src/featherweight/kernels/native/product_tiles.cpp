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
  if (!few) return wide_codes(operand) ? many_tokens_of<true>(operand, x, first, last, out, work)
                                       : many_tokens_of<false>(operand, x, first, last, out, work);
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

int64_t spin(int64_t rounds) {
#if defined(FW_NEON)
  constexpr int kChains = 6;  // sums in 24 of 32 registers
#else
  constexpr int kChains = 12;
#endif
  alignas(64) uint8_t codes[64];
  int8_t x[4 * kChains];
  memset(codes, 1, sizeof codes);
  memset(x, 1, sizeof x);
  Sums sum[kChains];
  for (Sums& s : sum) s = zero_sums();
  // The compiler must not know the values: it would find equal products in all lanes.
  asm volatile("" : "+m"(codes), "+m"(x));
  Codes c = load_codes(codes);
  for (int64_t r = 0; r < rounds; ++r) {
#if defined(__AVX512F__) || defined(__AVX2__)
    asm volatile("" ::: "memory");
#endif
    for (int k = 0; k < kChains; ++k) sum[k] = dot<false>(sum[k], c, x + 4 * k);
  }
  Sums all = sum[0];
  for (int k = 1; k < kChains; ++k) all = add(all, sum[k]);
  alignas(64) float v[16];
  store_floats(v, to_floats(all));
  return *std::min_element(v, v + 16) < -1.0F ? 0 : rounds * kChains * 64;  // reads all lanes: none is left out as unused
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
