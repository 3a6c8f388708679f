// Trits and small integers to bytes and back; the formats are those of packing.py.
#ifndef FEATHERWEIGHT_PACKING_H
#define FEATHERWEIGHT_PACKING_H

#include <stdint.h>

constexpr int kSlack = 8;  // bytes that unpack_trit_range may write past its end

constexpr int trits_per_byte(int packing) { return packing == 0 ? 5 : 4; }

int64_t packed_trit_bytes(int64_t count, int packing);

void pack_trit_bytes(const int8_t* trits, int64_t count, int packing, uint8_t* packed);

// Joint codes of `planes` planes; packed planes lie `stride` bytes apart.
void pack_code_bytes(const uint8_t* codes, int64_t count, int planes, int packing, uint8_t* packed, int64_t stride);

// The first of `bytes` bytes that no trits pack to, or -1.
int64_t find_bad_byte(const uint8_t* packed, int64_t bytes, int packing);

// Trits [first, first + count) of valid packed bytes to out[0 .. count + kSlack).
void unpack_trit_range(const uint8_t* packed, int64_t first, int64_t count, int packing, int8_t* out);
// The digits t + 1 instead.
void unpack_digit_range(const uint8_t* packed, int64_t first, int64_t count, int packing, uint8_t* out);

void pack_bit_string(const uint8_t* values, int64_t count, int bits, uint8_t* packed);
void unpack_bit_string(const uint8_t* packed, int64_t count, int bits, uint8_t* values);

float float_from_half(uint16_t bits);
uint16_t half_from_float(float value);  // to the nearest, halves to even
float float_from_bfloat16(uint16_t bits);

#endif
