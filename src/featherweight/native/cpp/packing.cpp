#include "packing.h"

#include <array>
#include <cstring>

namespace {

constexpr int kTritBytes = 256;

struct TritTable {
  std::array<std::array<int8_t, 8>, kTritBytes> trits{};

  constexpr TritTable(int packing, int lowest) {
    for (int byte = 0; byte < kTritBytes; ++byte) {
      int rest = byte;
      for (int i = 0; i < trits_per_byte(packing); ++i) {
        const int base = packing == 0 ? 3 : 4;
        trits[static_cast<size_t>(byte)][static_cast<size_t>(i)] = static_cast<int8_t>(rest % base + lowest);
        rest /= base;
      }
    }
  }
};

constexpr TritTable kTables[2] = {{0, -1}, {1, -1}};
constexpr TritTable kDigits[2] = {{0, 0}, {1, 0}};

// Digits t + 1 of the planes of a joint code, a byte apart. Sums of five digits times 3^i stay below 243, so planes never
// carry into each other.
constexpr std::array<uint32_t, 27> spread_digits(int planes) {
  std::array<uint32_t, 27> table{};
  for (uint32_t code = 0; code < 27; ++code) {
    uint32_t rest = code, spread = 0;
    for (int k = planes - 1; k >= 0; --k, rest /= 3) spread |= (rest % 3) << (8 * k);
    table[code] = spread;
  }
  return table;
}

constexpr std::array<uint32_t, 27> kSpread[3] = {spread_digits(1), spread_digits(2), spread_digits(3)};

template <int Base, int PerByte, typename Digit>
uint32_t pack_digits(const Digit* digits, int64_t count) {
  uint32_t sum = 0;
  for (int64_t i = count - 1; i >= 0; --i) sum = sum * Base + static_cast<uint32_t>(digits[i]);
  return sum;
}

template <int Base, int PerByte>
void pack_trits_as(const int8_t* trits, int64_t count, uint8_t* packed) {
  for (int64_t first = 0, byte = 0; first < count; first += PerByte, ++byte) {
    uint32_t digits[PerByte];
    const int64_t present = count - first < PerByte ? count - first : PerByte;
    for (int64_t i = 0; i < present; ++i) digits[i] = static_cast<uint32_t>(trits[first + i] + 1);
    packed[byte] = static_cast<uint8_t>(pack_digits<Base, PerByte>(digits, present));
  }
}

template <int Base, int PerByte>
void pack_codes_as(const uint8_t* codes, int64_t count, int planes, uint8_t* packed, int64_t stride) {
  const std::array<uint32_t, 27>& spread = kSpread[planes - 1];
  for (int64_t first = 0, byte = 0; first < count; first += PerByte, ++byte) {
    uint32_t sum = 0;
    if (count - first >= PerByte) {
      for (int i = PerByte - 1; i >= 0; --i) sum = sum * Base + spread[codes[first + i]];
    } else {
      for (int64_t i = count - first - 1; i >= 0; --i) sum = sum * Base + spread[codes[first + i]];
    }
    for (int k = 0; k < planes; ++k) packed[k * stride + byte] = static_cast<uint8_t>(sum >> (8 * k));
  }
}

template <int Packing>
void unpack_range(const TritTable& values, const uint8_t* packed, int64_t first, int64_t count, int8_t* out) {
  constexpr int kPerByte = trits_per_byte(Packing);
  const auto& table = values.trits;
  int64_t byte = first / kPerByte, done = 0;
  const int64_t skip = first % kPerByte;
  if (skip > 0) {
    for (int64_t i = skip; i < kPerByte && done < count; ++i) out[done++] = table[packed[byte]][static_cast<size_t>(i)];
    ++byte;
  }
  for (; done < count; done += kPerByte, ++byte) std::memcpy(out + done, table[packed[byte]].data(), 8);
}

uint64_t load_bytes(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  return word;
}

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

int64_t packed_trit_bytes(int64_t count, int packing) {
  return (count + trits_per_byte(packing) - 1) / trits_per_byte(packing);
}

void pack_trit_bytes(const int8_t* trits, int64_t count, int packing, uint8_t* packed) {
  if (packing == 0)
    pack_trits_as<3, 5>(trits, count, packed);
  else
    pack_trits_as<4, 4>(trits, count, packed);
}

void pack_code_bytes(const uint8_t* codes, int64_t count, int planes, int packing, uint8_t* packed, int64_t stride) {
  if (packing == 0)
    pack_codes_as<3, 5>(codes, count, planes, packed, stride);
  else
    pack_codes_as<4, 4>(codes, count, planes, packed, stride);
}

int64_t find_bad_byte(const uint8_t* packed, int64_t bytes, int packing) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < bytes; begin += kBlock) {
    const int64_t end = bytes - begin < kBlock ? bytes : begin + kBlock;
    unsigned bad = 0;
    for (int64_t i = begin; i < end; ++i) {
      const unsigned byte = packed[i];
      bad |= packing == 0 ? static_cast<unsigned>(byte >= 243) : (byte & (byte >> 1)) & 0x55U;
    }
    if (!bad) continue;
    for (int64_t i = begin; i < end; ++i)
      if (packing == 0 ? packed[i] >= 243 : ((packed[i] & (packed[i] >> 1)) & 0x55) != 0) return i;
  }
  return -1;
}

void unpack_trit_range(const uint8_t* packed, int64_t first, int64_t count, int packing, int8_t* out) {
  if (packing == 0)
    unpack_range<0>(kTables[0], packed, first, count, out);
  else
    unpack_range<1>(kTables[1], packed, first, count, out);
}

void unpack_digit_range(const uint8_t* packed, int64_t first, int64_t count, int packing, uint8_t* out) {
  int8_t* to = reinterpret_cast<int8_t*>(out);
  if (packing == 0)
    unpack_range<0>(kDigits[0], packed, first, count, to);
  else
    unpack_range<1>(kDigits[1], packed, first, count, to);
}

// Eight values of b bits are b bytes: one 64-bit word at most.
void pack_bit_string(const uint8_t* values, int64_t count, int bits, uint8_t* packed) {
  for (int64_t first = 0; first < count; first += 8, packed += bits) {
    const int64_t present = count - first < 8 ? count - first : 8;
    uint64_t word = 0;
    for (int64_t i = 0; i < present; ++i) word |= static_cast<uint64_t>(values[first + i]) << (i * bits);
    const int64_t bytes = (present * bits + 7) / 8;
    for (int64_t i = 0; i < bytes; ++i) packed[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

void unpack_bit_string(const uint8_t* packed, int64_t count, int bits, uint8_t* values) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for (int64_t first = 0; first < count; first += 8, packed += bits) {
    const int64_t present = count - first < 8 ? count - first : 8;
    uint64_t word;
    if (count - first >= 64)  // eight bytes are there to be read
      std::memcpy(&word, packed, sizeof word);
    else
      word = load_bytes(packed, (present * bits + 7) / 8);
    for (int64_t i = 0; i < present; ++i) values[first + i] = static_cast<uint8_t>(word >> (i * bits) & mask);
  }
}

float float_from_bfloat16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

float float_from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t exponent = bits >> 10 & 0x1fU, fraction = bits & 0x3ffU;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000U | fraction << 13);
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24F;  // subnormal, exact
  return sign ? -magnitude : magnitude;
}

uint16_t half_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000U;
  bits &= 0x7fffffffU;
  if (bits >= 0x7f800000U) return static_cast<uint16_t>(sign | 0x7c00U | (bits > 0x7f800000U ? 0x200U : 0U));
  if (bits >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to 65536 or more
  if (bits < 0x38800000U) {                                              // subnormal: units of 2^-24
    const float magnitude = float_from_bits(bits) + 0.5F;                // adding 2^-1 rounds at 2^-24
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000U));
  }
  const uint32_t rounded = bits + 0xfffU + (bits >> 13 & 1U);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112U << 10)));
}
