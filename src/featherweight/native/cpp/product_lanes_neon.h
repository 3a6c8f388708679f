// The NEON section of product_lanes.h: vectors of 64 bytes are four registers. Needs the dot products of Armv8.2 (SDOT) and
// takes those of unsigned by signed bytes (USDOT) where the matrix instructions (i8mm) are there.
#ifndef FEATHERWEIGHT_PRODUCT_LANES_NEON_H
#define FEATHERWEIGHT_PRODUCT_LANES_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace {  // compiled for several instruction sets: nothing here may be shared between them

struct Codes {
  uint8x16_t v[4];
};
struct Sums {
  int32x4_t v[4];
};
struct Floats {
  float32x4_t v[4];
};

// rule(0), ..., rule(3): once inlined the numbers are known and the arrays above become registers.
template <typename To, typename Rule>
FW_INLINE To quarters(const Rule& rule) {
  return {{rule(0), rule(1), rule(2), rule(3)}};
}
#define FW_QUARTER(i) [&](int i) __attribute__((always_inline))

FW_INLINE void prefetch(const void* from) { __builtin_prefetch(from); }
FW_INLINE Codes load_codes(const uint8_t* from) {
  return quarters<Codes>(FW_QUARTER(i) { return vld1q_u8(from + 16 * i); });
}
FW_INLINE void store_codes(uint8_t* to, const Codes& a) {
  for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, a.v[i]);
}
FW_INLINE Codes add(const Codes& a, const Codes& b) {
  return quarters<Codes>(FW_QUARTER(i) { return vaddq_u8(a.v[i], b.v[i]); });
}
FW_INLINE Codes either(const Codes& a, const Codes& b) {
  return quarters<Codes>(FW_QUARTER(i) { return vorrq_u8(a.v[i], b.v[i]); });
}
// Bits [From, From + Count) of each byte, moved to bit To. Bytes shift by themselves, so that the top field needs no mask.
template <int From, int Count, int To>
FW_INLINE uint8x16_t field_of(uint8x16_t v) {
  const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(((1 << Count) - 1) << To));
  if constexpr (From > To && From + Count == 8 && To == 0)
    return vshrq_n_u8(v, From);
  else if constexpr (From > To)
    return vandq_u8(vshrq_n_u8(v, From - To), mask);
  else if constexpr (From < To)
    return vandq_u8(vshlq_n_u8(v, To - From), mask);
  else
    return vandq_u8(v, mask);
}
template <int From, int Count, int To>
FW_INLINE Codes field(const Codes& a) {
  return quarters<Codes>(FW_QUARTER(i) { return field_of<From, Count, To>(a.v[i]); });
}
FW_INLINE Codes times(const Codes& a, int by) {
  const uint8x16_t factor = vdupq_n_u8(static_cast<uint8_t>(by));
  return quarters<Codes>(FW_QUARTER(i) { return vmulq_u8(a.v[i], factor); });
}

FW_INLINE Sums spread(int32_t a) {
  return quarters<Sums>(FW_QUARTER() { return vdupq_n_s32(a); });
}
FW_INLINE Sums zero_sums() { return spread(0); }
FW_INLINE Sums subtract(const Sums& a, const Sums& b) {
  return quarters<Sums>(FW_QUARTER(i) { return vsubq_s32(a.v[i], b.v[i]); });
}
FW_INLINE Sums add(const Sums& a, const Sums& b) {
  return quarters<Sums>(FW_QUARTER(i) { return vaddq_s32(a.v[i], b.v[i]); });
}
FW_INLINE Sums times(const Sums& a, const Sums& b) {
  return quarters<Sums>(FW_QUARTER(i) { return vmulq_s32(a.v[i], b.v[i]); });
}

template <bool Wide>
FW_INLINE Sums dot(const Sums& to, const Codes& codes, const int8_t* x) {
  int32_t word;
  memcpy(&word, x, sizeof word);
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word));
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return quarters<Sums>(FW_QUARTER(i) { return vusdotq_s32(to.v[i], codes.v[i], four); });
#else
  if constexpr (!Wide)
    return quarters<Sums>(FW_QUARTER(i) { return vdotq_s32(to.v[i], vreinterpretq_s8_u8(codes.v[i]), four); });
  // code x = (code - 128) x + 128 x, and flipping the top bit is code - 128 as a signed byte.
  const int32x4_t lifted = vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), four, vdupq_n_s8(1)), 7);
  const uint8x16_t top = vdupq_n_u8(128);
  return quarters<Sums>(FW_QUARTER(i) {
    return vdotq_s32(vaddq_s32(to.v[i], lifted), vreinterpretq_s8_u8(veorq_u8(codes.v[i], top)), four);
  });
#endif
}

FW_INLINE Sums widened(uint8x16_t bytes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
FW_INLINE Sums load_bytes(const uint8_t* from) { return widened(vld1q_u8(from)); }
// Code J of each lane's four.
template <int J>
FW_INLINE Floats column(const Codes& a) {
  return quarters<Floats>(FW_QUARTER(i) {
    const uint32x4_t four = vreinterpretq_u32_u8(a.v[i]);
    if constexpr (J == 0) return vcvtq_f32_u32(vandq_u32(four, vdupq_n_u32(255)));
    else if constexpr (J == 3) return vcvtq_f32_u32(vshrq_n_u32(four, 24));
    else return vcvtq_f32_u32(vandq_u32(vshrq_n_u32(four, 8 * J), vdupq_n_u32(255)));
  });
}

FW_INLINE Floats spread(float a) {
  return quarters<Floats>(FW_QUARTER() { return vdupq_n_f32(a); });
}
FW_INLINE Floats zero_floats() { return spread(0.0F); }
FW_INLINE Floats to_floats(const Sums& a) {
  return quarters<Floats>(FW_QUARTER(i) { return vcvtq_f32_s32(a.v[i]); });
}
FW_INLINE Floats add(const Floats& a, const Floats& b) {
  return quarters<Floats>(FW_QUARTER(i) { return vaddq_f32(a.v[i], b.v[i]); });
}
FW_INLINE Floats subtract(const Floats& a, const Floats& b) {
  return quarters<Floats>(FW_QUARTER(i) { return vsubq_f32(a.v[i], b.v[i]); });
}
FW_INLINE Floats times(const Floats& a, const Floats& b) {
  return quarters<Floats>(FW_QUARTER(i) { return vmulq_f32(a.v[i], b.v[i]); });
}
FW_INLINE Floats multiply_add(const Floats& to, const Floats& a, const Floats& b) {
  return quarters<Floats>(FW_QUARTER(i) { return vfmaq_f32(to.v[i], a.v[i], b.v[i]); });
}
FW_INLINE Floats load_floats(const float* from) {
  return quarters<Floats>(FW_QUARTER(i) { return vld1q_f32(from + 4 * i); });
}
FW_INLINE void store_floats(float* to, const Floats& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.v[i]);
}
FW_INLINE Floats load_halves(const uint16_t* from) {
  return quarters<Floats>(FW_QUARTER(i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))); });
}
FW_INLINE Floats load_bfloats(const uint16_t* from) {
  return quarters<Floats>(FW_QUARTER(i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)); });
}
// The first and the second bfloat16 of each lane's pair.
FW_INLINE Floats even_bfloats(const uint8_t* from) {
  return quarters<Floats>(
      FW_QUARTER(i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(from + 16 * i)), 16)); });
}
FW_INLINE Floats odd_bfloats(const uint8_t* from) {
  return quarters<Floats>(FW_QUARTER(i) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(vld1q_u8(from + 16 * i)), vdupq_n_u32(0xffff0000U)));
  });
}

// Sixteen words from their bytes, lowest first.
FW_INLINE Sums joined(uint8x16_t b0, uint8x16_t b1, uint8x16_t b2, uint8x16_t b3) {
  const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
  const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
  return {{vreinterpretq_s32_u16(vzip1q_u16(low0, high0)), vreinterpretq_s32_u16(vzip2q_u16(low0, high0)),
           vreinterpretq_s32_u16(vzip1q_u16(low1, high1)), vreinterpretq_s32_u16(vzip2q_u16(low1, high1))}};
}
// Floats are looked up byte by byte: LD4 takes a table's words apart into one table for each of their bytes.
FW_INLINE Floats look_up16(const float* table, const uint8_t* index) {
  const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
  const uint8x16_t at = vld1q_u8(index);
  const Sums words = joined(vqtbl1q_u8(bytes.val[0], at), vqtbl1q_u8(bytes.val[1], at), vqtbl1q_u8(bytes.val[2], at),
                            vqtbl1q_u8(bytes.val[3], at));
  return quarters<Floats>(FW_QUARTER(i) { return vreinterpretq_f32_s32(words.v[i]); });
}
FW_INLINE Floats log8(const uint8_t* from, const float* fractions, int exponent) {
  const uint8_t* table = reinterpret_cast<const uint8_t*>(fractions);
  const uint8x16x4_t first = vld4q_u8(table), second = vld4q_u8(table + 64);
  const uint8x16_t code = vld1q_u8(from), at = vandq_u8(code, vdupq_n_u8(31));
  const auto byte = [&](int k) __attribute__((always_inline)) {
    return vqtbl2q_u8(uint8x16x2_t{{first.val[k], second.val[k]}}, at);
  };
  const Sums fraction = joined(byte(0), byte(1), byte(2), byte(3)), wide = widened(code);
  return quarters<Floats>(FW_QUARTER(i) {
    const int32x4_t power = vsubq_s32(vdupq_n_s32(exponent), vshrq_n_s32(wide.v[i], 5));
    const int32x4_t bits = vaddq_s32(fraction.v[i], vshlq_n_s32(power, 23));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(bits), vceqq_s32(wide.v[i], vdupq_n_s32(255))));
  });
}

// Words of a table of 32 by the bits from Shift to Shift + 4 of sixteen words, which go on in the next sixteen.
template <int Shift>
FW_INLINE Codes look_up32(const uint32_t* table, const uint8_t* words) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16x4_t first = vld4q_u8(bytes), second = vld4q_u8(bytes + 64);
  const auto index = FW_QUARTER(i) {
    uint32x4_t word = vreinterpretq_u32_u8(vld1q_u8(words + 16 * i));
    if constexpr (Shift > 0) word = vshrq_n_u32(word, Shift);
    if constexpr (Shift > 27) word = vsliq_n_u32(word, vreinterpretq_u32_u8(vld1q_u8(words + 64 + 16 * i)), 32 - Shift);
    return vreinterpretq_u16_u32(word);
  };
  const uint16x8_t low = vuzp1q_u16(index(0), index(1)), high = vuzp1q_u16(index(2), index(3));
  const uint8x16_t at = vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)), vdupq_n_u8(31));
  const auto byte = [&](int k) __attribute__((always_inline)) {
    return vqtbl2q_u8(uint8x16x2_t{{first.val[k], second.val[k]}}, at);
  };
  const Sums found = joined(byte(0), byte(1), byte(2), byte(3));
  return quarters<Codes>(FW_QUARTER(i) { return vreinterpretq_u8_s32(found.v[i]); });
}
// Lanes i and i ^ Distance change places.
template <int Distance>
FW_INLINE Floats swapped(const Floats& a) {
  return quarters<Floats>(FW_QUARTER(i) {
    if constexpr (Distance == 1) return vrev64q_f32(a.v[i]);
    else if constexpr (Distance == 2) return vextq_f32(a.v[i], a.v[i], 2);
    else return a.v[i ^ (Distance / 4)];
  });
}

#undef FW_QUARTER

}  // namespace

#endif
