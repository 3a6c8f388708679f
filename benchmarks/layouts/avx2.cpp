// Trits at two bits and at five a byte, as matrix-vector kernels of AVX2 without VNNI on memory that the second cache holds:
// what unpacking costs where there are neither permutes of bytes over 64 entries nor dot products of bytes.
//
//     g++ -O3 -mavx2 benchmarks/layouts/avx2.cpp -o avx2 && ./avx2 [kilobytes] [rounds]
//
// Lanes are rows: byte 4r + j of a vector of 32 belongs to row r of eight and to column j of a step of four. Every kernel
// multiplies by the same 8-bit activations and is exact within a group of 160 columns. A line of output has the name, bits
// a weight, weights a second of one thread, and the bytes a second that it reads: a layout of fewer bits is faster only
// where memory gives a thread less than that.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

constexpr int kSteps = 40;  // of a group here: whole vectors of both layouts
constexpr int kEscape = 216;

__m256i bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
__m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
__m256i twice(const uint8_t* from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
__m256i step(const int8_t* x, int i) {
  int32_t word;
  std::memcpy(&word, x + 4 * i, sizeof word);
  return _mm256_set1_epi32(word);
}
__m256i dot(__m256i to, __m256i codes, const int8_t* x, int i) { return _mm256_add_epi16(to, _mm256_maddubs_epi16(codes, step(x, i))); }
__m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// Step 4v + i at bits 2i of vector v, as in FIELDS; odd steps are multiplied where they stand, as four times their digit.
struct TwoBits {
  static constexpr const char* kName = "two bits";
  static constexpr int kVectors = kSteps / 4;
  static void pack(const uint8_t* digits, uint8_t* to) {
    for (int v = 0; v < kVectors; ++v)
      for (int j = 0; j < 32; ++j) {
        to[32 * v + j] = 0;
        for (int i = 0; i < 4; ++i) to[32 * v + j] = static_cast<uint8_t>(to[32 * v + j] | digits[32 * (4 * v + i) + j] << (2 * i));
      }
  }
  static __m256i group(const uint8_t* from, const int8_t* x) {
    __m256i sum = _mm256_setzero_si256();
    for (int half = 0; half < 2; ++half) {  // the fourfold of twenty steps fit 16 bits
      __m256i once = _mm256_setzero_si256(), fourfold = once;
      for (int v = half * kVectors / 2; v < (half + 1) * kVectors / 2; ++v) {
        const __m256i low = load(from + 32 * v), high = _mm256_srli_epi16(low, 4);
        once = dot(once, _mm256_and_si256(low, bytes(3)), x, 4 * v);
        fourfold = dot(fourfold, _mm256_and_si256(low, bytes(12)), x, 4 * v + 1);
        once = dot(once, _mm256_and_si256(high, bytes(3)), x, 4 * v + 2);
        fourfold = dot(fourfold, _mm256_and_si256(high, bytes(12)), x, 4 * v + 3);
      }
      sum = _mm256_add_epi32(sum, widened(_mm256_add_epi16(once, _mm256_srai_epi16(fourfold, 2))));
    }
    return sum;
  }
};

// The byte of TRITS, by shuffles of 16 entries: two for each of the digits that depend on five bits, one for the other two.
struct FiveByShuffles {
  static constexpr const char* kName = "five trits a byte, by shuffles";
  static constexpr int kVectors = kSteps / 5;
  static void pack(const uint8_t* digits, uint8_t* to) {
    for (int v = 0; v < kVectors; ++v)
      for (int j = 0; j < 32; ++j) {
        const auto digit = [&](int i) { return int{digits[32 * (5 * v + i) + j]}; };
        const int r = digit(0) + 3 * digit(1) + 9 * digit(2), q = (2 - digit(3)) + 3 * (2 - digit(4));
        to[32 * v + j] = static_cast<uint8_t>(q < 8 ? 8 * r + q : kEscape + r);
      }
  }
  static __m256i group(const uint8_t* from, const int8_t* x) {
    alignas(16) static constexpr uint8_t kLow[3][2][16] = {
        {{0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0}, {1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2}},
        {{0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2}, {2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2}},
        {{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2}}};
    alignas(16) static constexpr uint8_t kHigh[2][16] = {{2, 1, 0, 2, 1, 0, 2, 1, 0}, {2, 2, 2, 1, 1, 1, 0, 0, 0}};
    __m256i pairs = _mm256_setzero_si256();
    for (int v = 0; v < kVectors; ++v) {
      const __m256i byte = load(from + 32 * v);
      const __m256i escaped = _mm256_cmpeq_epi8(_mm256_max_epu8(byte, bytes(kEscape)), byte);
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(byte, 3), bytes(31));
      const __m256i r = _mm256_blendv_epi8(upper, _mm256_sub_epi8(byte, bytes(kEscape)), escaped);
      const __m256i low = _mm256_add_epi8(r, bytes(0x70)), high = _mm256_xor_si256(low, bytes(0x80));
      const __m256i q = _mm256_blendv_epi8(_mm256_and_si256(byte, bytes(7)), bytes(8), escaped);
      for (int d = 0; d < 3; ++d)
        pairs = dot(pairs, _mm256_or_si256(_mm256_shuffle_epi8(twice(kLow[d][0]), low), _mm256_shuffle_epi8(twice(kLow[d][1]), high)), x,
                    5 * v + d);
      for (int d = 0; d < 2; ++d) pairs = dot(pairs, _mm256_shuffle_epi8(twice(kHigh[d]), q), x, 5 * v + 3 + d);
    }
    return widened(pairs);
  }
};

// A fraction of 256 whose digits come off the top, one after the other, by threefold bytes.
struct FiveByArithmetic {
  static constexpr const char* kName = "five trits a byte, by arithmetic";
  static constexpr int kVectors = kSteps / 5;
  static void pack(const uint8_t* digits, uint8_t* to) {
    for (int v = 0; v < kVectors; ++v)
      for (int j = 0; j < 32; ++j) {
        int value = 0;
        for (int i = 0; i < 5; ++i) value = 3 * value + digits[32 * (5 * v + i) + j];
        to[32 * v + j] = static_cast<uint8_t>((value * 256 + 242) / 243);
      }
  }
  static __m256i group(const uint8_t* from, const int8_t* x) {
    __m256i pairs = _mm256_setzero_si256();
    for (int v = 0; v < kVectors; ++v) {
      __m256i byte = load(from + 32 * v);
      for (int d = 0; d < 5; ++d) {
        const __m256i below = _mm256_subs_epu8(byte, bytes(1));  // averages round up
        const __m256i most = _mm256_avg_epu8(below, _mm256_avg_epu8(below, _mm256_setzero_si256()));  // three quarters
        pairs = dot(pairs, _mm256_and_si256(_mm256_srli_epi16(most, 6), bytes(3)), x, 5 * v + d);
        byte = _mm256_add_epi8(byte, _mm256_add_epi8(byte, byte));
      }
    }
    return widened(pairs);
  }
};

template <typename Layout>
void measure(int64_t groups, int rounds) {
  std::mt19937 random(1);
  std::vector<uint8_t> digits(32 * kSteps), packed(static_cast<size_t>(groups * 32 * Layout::kVectors));
  std::vector<int8_t> x(4 * kSteps);
  for (int8_t& value : x) value = static_cast<int8_t>(random() % 255 - 127);
  int32_t expected[8] = {};
  for (int64_t g = 0; g < groups; ++g) {
    for (uint8_t& d : digits) d = static_cast<uint8_t>(random() % 3);
    Layout::pack(digits.data(), packed.data() + g * 32 * Layout::kVectors);
    for (int i = 0; i < 32 * kSteps; ++i) expected[i % 32 / 4] += digits[static_cast<size_t>(i)] * x[static_cast<size_t>(i / 32 * 4 + i % 4)];
  }
  double best = 1e9;
  for (int round = 0; round < rounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    __m256i sum = _mm256_setzero_si256();
    for (int64_t g = 0; g < groups; ++g) sum = _mm256_add_epi32(sum, Layout::group(packed.data() + g * 32 * Layout::kVectors, x.data()));
    int32_t found[8];
    std::memcpy(found, &sum, sizeof found);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    if (!std::equal(found, found + 8, expected)) std::printf("%s: wrong sums\n", Layout::kName), std::exit(1);
  }
  const double weights = static_cast<double>(groups * 32 * kSteps);
  std::printf("%-34s %.1f bits  %6.1f Gweights/s  %5.1f GB/s\n", Layout::kName, 8.0 * Layout::kVectors / kSteps, weights / best / 1e9,
              static_cast<double>(packed.size()) / best / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t kilobytes = argc > 1 ? std::atoll(argv[1]) : 512;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 2000;
  const int64_t groups = kilobytes * 1024 / (8 * kSteps);
  measure<TwoBits>(groups, rounds);
  measure<FiveByShuffles>(groups, rounds);
  measure<FiveByArithmetic>(groups, rounds);
}
