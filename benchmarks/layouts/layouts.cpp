// Ways to store ternary and nine-level weights, as matrix-vector kernels on memory that no cache holds: those that were
// tried and not taken. Needs AVX-512 with VNNI, BW and VBMI.
//
//     g++ -O3 -march=native -pthread layouts.cpp -o layouts && ./layouts [megabytes] [threads] [rounds]
//
// Every kernel multiplies by the same 8-bit activations, is exact in integers within a group of 128 columns, and applies
// an fp16 scale for each row and group. Tiles of rows lie one after the other, codes first, scales behind them. Lanes are
// rows, so nothing is summed across lanes. A line of output has the name, bits a weight with scales, bytes a second, and
// weights a second; the first line is the time of only reading the memory.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kGroup = 128;
constexpr int64_t kColumns = 5120;  // so that blocks of five steps and groups end together
constexpr int64_t kGroups = kColumns / kGroup;
constexpr int64_t kSteps = kColumns / 4;  // a step is four columns of sixteen rows
constexpr int64_t kTestRows = 64;

using Vector = std::vector<uint8_t>;

struct Input {
  alignas(64) int8_t x[kColumns];
  alignas(64) int32_t sums[kGroups];
};

// Weights of a tile, row-major, and where its parts begin.
struct Tile {
  const int8_t* weights;
  int64_t rows;
  int at(int64_t row, int64_t column) const { return column < kColumns ? weights[row * kColumns + column] : 0; }
};

inline __m512i quad(const Input& input, int64_t step) {
  int32_t four;
  std::memcpy(&four, input.x + 4 * step, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 scales16(const uint8_t* scales) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales)));
}

// ---- Sixteen rows, 8-bit dot products -------------------------------------------------------------------------------

// Four codes of two bits in a byte, one from each of four steps.
struct TwoBit {
  static constexpr const char* kName = "trits, 2-bit interleaved";
  static constexpr int64_t kRows = 16, kCodeBytes = kSteps * 16;
  static constexpr int kLargest = 1;
  void prepare(const Input&) {}
  static void pack(const Tile& tile, uint8_t* out) {
    std::memset(out, 0, kCodeBytes);
    for (int64_t step = 0; step < kSteps; ++step)
      for (int64_t i = 0; i < 64; ++i)
        out[step / 4 * 64 + i] |= static_cast<uint8_t>((tile.at(i / 4, 4 * step + i % 4) + 1) << (2 * (step % 4)));
  }
  void run(const Input& input, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512 total = _mm512_setzero_ps();
    for (int64_t group = 0; group < kGroups; ++group) {
      __m512i sums[4] = {_mm512_set1_epi32(-input.sums[group])};
      for (int64_t block = 0; block < 8; ++block, codes += 64) {
        const __m512i packed = _mm512_load_si512(codes);
        const int64_t step = group * 32 + 4 * block;
        sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_and_si512(packed, mask), quad(input, step));
        for (int i = 1; i < 4; ++i)
          sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_and_si512(_mm512_srli_epi16(packed, 2 * i), mask),
                                        quad(input, step + i));
      }
      const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales16(scales + 32 * group), total);
    }
    _mm512_storeu_ps(out, total);
  }
};

// Five trits in a byte, one from each of five steps, as a fraction of 256: digits come out at the top by multiplying by
// three, for which bytes have no instruction, but an average of sums does it.
struct FiveInAByte {
  static constexpr const char* kName = "trits, 5 in a byte, by arithmetic";
  static constexpr int64_t kRows = 16, kCodeBytes = kSteps / 5 * 64;
  static constexpr int kLargest = 1;
  void prepare(const Input&) {}
  static void pack(const Tile& tile, uint8_t* out) {
    for (int64_t block = 0; block < kSteps / 5; ++block)
      for (int64_t i = 0; i < 64; ++i) {
        int value = 0;
        for (int digit = 0; digit < 5; ++digit) value = 3 * value + tile.at(i / 4, 4 * (5 * block + digit) + i % 4) + 1;
        out[block * 64 + i] = static_cast<uint8_t>((value * 256 + 242) / 243);
      }
  }
  void run(const Input& input, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi8(1), mask = _mm512_set1_epi8(3);
    __m512 total = _mm512_setzero_ps();
    for (int64_t first = 0; first < kGroups; first += 5) {
      __m512i sum = _mm512_set1_epi32(-input.sums[first]);
#pragma GCC unroll 32
      for (int64_t block = 0; block < 32; ++block, codes += 64) {
        __m512i rest = _mm512_load_si512(codes);
#pragma GCC unroll 5
        for (int digit = 0; digit < 5; ++digit) {
          // 3 r / 256 is the average of r and of half r, over 64; averages round up, which taking one away makes good
          const __m512i less = _mm512_subs_epu8(rest, one);
          const __m512i scaled = _mm512_avg_epu8(less, _mm512_avg_epu8(less, zero));
          const __m512i trits = _mm512_and_si512(_mm512_srli_epi16(scaled, 6), mask);
          const int64_t step = 5 * block + digit;
          sum = _mm512_dpbusd_epi32(sum, trits, quad(input, first * 32 + step));
          if (digit < 4) rest = _mm512_add_epi8(rest, _mm512_add_epi8(rest, rest));
          if (step % 32 == 31) {
            const int64_t group = first + step / 32;
            total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales16(scales + 32 * group), total);
            if (step < 159) sum = _mm512_set1_epi32(-input.sums[group + 1]);
          }
        }
      }
    }
    _mm512_storeu_ps(out, total);
  }
};

// Two codes of four bits in a byte. Levels -4..4 are two planes with scales tied 3 to 1.
struct Nibble {
  static constexpr const char* kName = "nine levels, nibbles";
  static constexpr int64_t kRows = 16, kCodeBytes = kSteps * 32;
  static constexpr int kLargest = 4;
  void prepare(const Input&) {}
  static void pack(const Tile& tile, uint8_t* out) {
    std::memset(out, 0, kCodeBytes);
    for (int64_t step = 0; step < kSteps; ++step)
      for (int64_t i = 0; i < 64; ++i)
        out[step / 2 * 64 + i] |= static_cast<uint8_t>((tile.at(i / 4, 4 * step + i % 4) + 4) << (4 * (step % 2)));
  }
  void run(const Input& input, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 total = _mm512_setzero_ps();
    for (int64_t group = 0; group < kGroups; ++group) {
      __m512i low = _mm512_set1_epi32(-4 * input.sums[group]), high = _mm512_setzero_si512();
      for (int64_t block = 0; block < 16; ++block, codes += 64) {
        const __m512i packed = _mm512_load_si512(codes);
        const int64_t step = group * 32 + 2 * block;
        low = _mm512_dpbusd_epi32(low, _mm512_and_si512(packed, mask), quad(input, step));
        high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), quad(input, step + 1));
      }
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low, high));
      total = _mm512_fmadd_ps(sum, scales16(scales + 32 * group), total);
    }
    _mm512_storeu_ps(out, total);
  }
};

// Five nine-level codes in 16 bits as a fraction of 65536, so that a digit is the high half of a product by nine. Words of
// two registers hold five steps: digits 0, 1 and 2, 3 of either are neighbouring bytes of a step, digits 4 of both the fifth.
struct FiveInAWord {
  static constexpr const char* kName = "nine levels, 5 in 16 bits";
  static constexpr int64_t kRows = 16, kCodeBytes = kSteps / 5 * 128;
  static constexpr int kLargest = 4;
  void prepare(const Input&) {}
  static void pack(const Tile& tile, uint8_t* out) {
    for (int64_t block = 0; block < kSteps / 5; ++block)
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t word = 0; word < 32; ++word) {
          uint32_t value = 0;
          for (int64_t digit = 0; digit < 5; ++digit) {
            const int64_t step = digit < 4 ? 3 * half + digit / 2 : 2;
            const int64_t byte = 2 * word + (digit < 4 ? digit % 2 : half);
            value = 9 * value + static_cast<uint32_t>(tile.at(byte / 4, 4 * (5 * block + step) + byte % 4) + 4);
          }
          const auto stored = static_cast<uint16_t>((uint64_t{value} * 65536 + 59048) / 59049);
          std::memcpy(out + block * 128 + half * 64 + 2 * word, &stored, 2);
        }
  }
  void run(const Input& input, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i nine = _mm512_set1_epi16(9);
    __m512 total = _mm512_setzero_ps();
    for (int64_t first = 0; first < kGroups; first += 5) {
      __m512i sum = _mm512_set1_epi32(-4 * input.sums[first]);
#pragma GCC unroll 32
      for (int64_t block = 0; block < 32; ++block, codes += 128) {
        __m512i digits[2][5];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512i rest = _mm512_load_si512(codes + 64 * half);
#pragma GCC unroll 5
          for (int digit = 0; digit < 5; ++digit) {
            digits[half][digit] = _mm512_mulhi_epu16(rest, nine);
            if (digit < 4) rest = _mm512_mullo_epi16(rest, nine);
          }
        }
        const auto pair = [](__m512i low, __m512i high) { return _mm512_or_si512(low, _mm512_slli_epi16(high, 8)); };
        const __m512i steps[5] = {pair(digits[0][0], digits[0][1]), pair(digits[0][2], digits[0][3]),
                                  pair(digits[0][4], digits[1][4]), pair(digits[1][0], digits[1][1]),
                                  pair(digits[1][2], digits[1][3])};
#pragma GCC unroll 5
        for (int i = 0; i < 5; ++i) {
          const int64_t step = 5 * block + i;
          sum = _mm512_dpbusd_epi32(sum, steps[i], quad(input, first * 32 + step));
          if (step % 32 == 31) {
            const int64_t group = first + step / 32;
            total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales16(scales + 32 * group), total);
            if (step < 159) sum = _mm512_set1_epi32(-4 * input.sums[group + 1]);
          }
        }
      }
    }
    _mm512_storeu_ps(out, total);
  }
};

// ---- Table lookup ---------------------------------------------------------------------------------------------------

// Sums of a group of 64 rows as int16: `a` has rows 0-7, 16-23, 32-39, 48-55 and `b` the others, as bytes unpack.
struct Halves {
  __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();
};

// Adds the scaled sums of a group to 64 totals. `scales` are in the order in which rows lie in `a` and `b`.
inline void add_group(const Halves& sums, const uint8_t* scales, __m512 (&totals)[4]) {
  const auto widen = [](__m256i half) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(half)); };
  totals[0] = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(sums.a)), scales16(scales), totals[0]);
  totals[1] = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(sums.a, 1)), scales16(scales + 32), totals[1]);
  totals[2] = _mm512_fmadd_ps(widen(_mm512_castsi512_si256(sums.b)), scales16(scales + 64), totals[2]);
  totals[3] = _mm512_fmadd_ps(widen(_mm512_extracti64x4_epi64(sums.b, 1)), scales16(scales + 96), totals[3]);
}

// The row whose result is at place `i` of the 64 totals.
inline int64_t row_at(int64_t i) {
  const int64_t in_half = i % 32, lane = in_half / 8;
  return 16 * lane + 8 * (i / 32) + in_half % 8;
}

inline void store_totals(const __m512 (&totals)[4], float* out) {
  alignas(64) float ordered[64];
  for (int i = 0; i < 4; ++i) _mm512_store_ps(ordered + 16 * i, totals[i]);
  for (int64_t i = 0; i < 64; ++i) out[row_at(i)] = ordered[i];
}

// 16-entry tables of int16, as sixteen low bytes and sixteen high bytes.
struct ByteTables {
  std::vector<uint8_t> bytes;
  void set(int64_t table, int entry, int value) {
    bytes[static_cast<size_t>(32 * table + entry)] = static_cast<uint8_t>(value);
    bytes[static_cast<size_t>(32 * table + 16 + entry)] = static_cast<uint8_t>(value >> 8);
  }
  // Looks 64 indices up and gives int16 in the order of Halves.
  void look_up(int64_t table, __m512i indices, __m512i& a, __m512i& b) const {
    const auto* at = reinterpret_cast<const __m128i*>(bytes.data() + 32 * table);
    const __m512i low = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(at)), indices);
    const __m512i high = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(at + 1)), indices);
    a = _mm512_unpacklo_epi8(low, high);
    b = _mm512_unpackhi_epi8(low, high);
  }
};

// TL1 (bitnet.cpp, arXiv 2502.11880): two trits are one of nine sums, an index of four bits.
struct Tl1 {
  static constexpr const char* kName = "trits, lookup of pairs (TL1)";
  static constexpr int64_t kRows = 64, kCodeBytes = kColumns / 4 * 64;
  static constexpr int kLargest = 1;
  ByteTables tables;
  void prepare(const Input& input) {
    tables.bytes.assign(kColumns / 2 * 32, 0);
    for (int64_t pair = 0; pair < kColumns / 2; ++pair)
      for (int entry = 0; entry < 9; ++entry)
        tables.set(pair, entry, (entry / 3 - 1) * input.x[2 * pair] + (entry % 3 - 1) * input.x[2 * pair + 1]);
  }
  static void pack(const Tile& tile, uint8_t* out) {
    for (int64_t four = 0; four < kColumns / 4; ++four)
      for (int64_t row = 0; row < 64; ++row) {
        const auto index = [&](int64_t column) { return 3 * (tile.at(row, column) + 1) + tile.at(row, column + 1) + 1; };
        out[four * 64 + row] = static_cast<uint8_t>(index(4 * four) | index(4 * four + 2) << 4);
      }
  }
  void run(const Input&, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 totals[4] = {};
    for (int64_t group = 0; group < kGroups; ++group) {
      Halves sums;
      for (int64_t four = group * 32; four < group * 32 + 32; ++four, codes += 64) {
        const __m512i packed = _mm512_load_si512(codes);
        __m512i a, b, c, d;
        tables.look_up(2 * four, _mm512_and_si512(packed, mask), a, b);
        tables.look_up(2 * four + 1, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), c, d);
        sums.a = _mm512_add_epi16(sums.a, _mm512_add_epi16(a, c));
        sums.b = _mm512_add_epi16(sums.b, _mm512_add_epi16(b, d));
      }
      add_group(sums, scales + 128 * group, totals);
    }
    store_totals(totals, out);
  }
};

// TL2: three trits are one of fourteen magnitudes, four bits, and a sign bit. 128 columns are 42 threes and two columns.
struct Tl2 {
  static constexpr const char* kName = "trits, lookup of threes with signs (TL2)";
  static constexpr int64_t kRows = 64, kThrees = 43, kGroupBytes = 22 * 64 + 44 * 8, kCodeBytes = kGroups * kGroupBytes;
  static constexpr int kLargest = 1;
  ByteTables tables;
  static int64_t column(int64_t group, int64_t three, int64_t i) {
    return 3 * three + i < kGroup ? group * kGroup + 3 * three + i : kColumns;
  }
  void prepare(const Input& input) {
    tables.bytes.assign(kGroups * 44 * 32, 0);
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t three = 0; three < kThrees; ++three)
        for (int entry = 0; entry < 14; ++entry) {
          const int digits[3] = {(entry + 13) / 9 - 1, (entry + 13) / 3 % 3 - 1, (entry + 13) % 3 - 1};
          int value = 0;
          for (int i = 0; i < 3; ++i) {
            const int64_t at = column(group, three, i);
            if (at < kColumns) value += digits[i] * input.x[at];
          }
          tables.set(group * 44 + three, entry, value);
        }
  }
  static void pack(const Tile& tile, uint8_t* out) {
    std::memset(out, 0, kCodeBytes);
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t three = 0; three < kThrees; ++three)
        for (int64_t row = 0; row < 64; ++row) {
          int value = 0;
          for (int64_t i = 0; i < 3; ++i) value = 3 * value + tile.at(row, column(group, three, i));
          uint8_t* at = out + group * kGroupBytes;
          at[three / 2 * 64 + row] |= static_cast<uint8_t>(std::abs(value) << (4 * (three % 2)));
          if (value < 0) {  // bit i of the mask belongs to place i of the sums
            int64_t place = 0;
            while (row_at(place) != row) ++place;
            at[22 * 64 + 8 * three + place / 8] |= static_cast<uint8_t>(1 << (place % 8));
          }
        }
  }
  void run(const Input&, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i mask = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512 totals[4] = {};
    for (int64_t group = 0; group < kGroups; ++group, codes += kGroupBytes) {
      Halves sums;
      for (int64_t pair = 0; pair < 22; ++pair) {
        const __m512i packed = _mm512_load_si512(codes + 64 * pair);
        for (int64_t i = 0; i < 2; ++i) {
          __m512i a, b;
          const __m512i indices = _mm512_and_si512(i ? _mm512_srli_epi16(packed, 4) : packed, mask);
          tables.look_up(group * 44 + 2 * pair + i, indices, a, b);
          uint64_t signs;
          std::memcpy(&signs, codes + 22 * 64 + 8 * (2 * pair + i), 8);
          a = _mm512_mask_sub_epi16(a, static_cast<__mmask32>(signs), zero, a);
          b = _mm512_mask_sub_epi16(b, static_cast<__mmask32>(signs >> 32), zero, b);
          sums.a = _mm512_add_epi16(sums.a, a);
          sums.b = _mm512_add_epi16(sums.b, b);
        }
      }
      add_group(sums, scales + 128 * group, totals);
    }
    store_totals(totals, out);
  }
};

// T-MAC (arXiv 2407.00088): bit-planes, four bits of neighbouring columns are an index of sixteen sums. A trit t takes two
// planes: t = u + v with u, v of +-1/2. Tables hold whole numbers (the sums of +-x), halved at the end.
struct TMac {
  static constexpr const char* kName = "trits as two bit-planes, lookup of fours (T-MAC)";
  static constexpr int64_t kRows = 64, kCodeBytes = kColumns / 4 * 64;
  static constexpr int kLargest = 1;
  ByteTables tables;
  void prepare(const Input& input) {
    tables.bytes.assign(kColumns / 4 * 32, 0);
    for (int64_t four = 0; four < kColumns / 4; ++four)
      for (int entry = 0; entry < 16; ++entry) {
        int value = 0;
        for (int i = 0; i < 4; ++i) value += (entry >> i & 1 ? 1 : -1) * input.x[4 * four + i];
        tables.set(four, entry, value);
      }
  }
  static void pack(const Tile& tile, uint8_t* out) {
    for (int64_t four = 0; four < kColumns / 4; ++four)
      for (int64_t row = 0; row < 64; ++row) {
        int first = 0, second = 0;
        for (int i = 0; i < 4; ++i) {
          const int trit = tile.at(row, 4 * four + i);
          first |= (trit >= 0) << i;
          second |= (trit > 0) << i;
        }
        out[four * 64 + row] = static_cast<uint8_t>(first | second << 4);
      }
  }
  void run(const Input&, const uint8_t* codes, const uint8_t* scales, float* out) const {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 totals[4] = {};
    for (int64_t group = 0; group < kGroups; ++group) {
      Halves sums[2];  // of a plane each: both would be 2 x 32 x 508, too much for int16
      for (int64_t four = group * 32; four < group * 32 + 32; ++four, codes += 64) {
        const __m512i packed = _mm512_load_si512(codes);
        __m512i a, b, c, d;
        tables.look_up(four, _mm512_and_si512(packed, mask), a, b);
        tables.look_up(four, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), c, d);
        sums[0].a = _mm512_add_epi16(sums[0].a, a);
        sums[0].b = _mm512_add_epi16(sums[0].b, b);
        sums[1].a = _mm512_add_epi16(sums[1].a, c);
        sums[1].b = _mm512_add_epi16(sums[1].b, d);
      }
      add_group(sums[0], scales + 128 * group, totals);
      add_group(sums[1], scales + 128 * group, totals);
    }
    for (__m512& total : totals) total = _mm512_mul_ps(total, _mm512_set1_ps(0.5f));
    store_totals(totals, out);
  }
};

// TeLLMe (arXiv 2510.15926): three trits are one of 27 sums, an index of five bits. A register holds 32 words of 16 bits,
// so a table is a register and needs no signs; three indices lie in a word (the permutation ignores higher bits). 128
// columns take fifteen words. Tiles of 64 rows share each table.
struct Tellme {
  static constexpr const char* kName = "trits, lookup of threes in 27 entries (TeLLMe)";
  static constexpr int64_t kRows = 64, kWords = 15, kGroupBytes = kWords * 128, kCodeBytes = kGroups * kGroupBytes;
  static constexpr int kLargest = 1;
  std::unique_ptr<int16_t[], decltype(&std::free)> tables{nullptr, &std::free};
  static int64_t column(int64_t group, int64_t three, int64_t i) {
    return 3 * three + i < kGroup ? group * kGroup + 3 * three + i : kColumns;
  }
  void prepare(const Input& input) {
    tables.reset(static_cast<int16_t*>(std::aligned_alloc(64, kGroups * 45 * 64)));
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t three = 0; three < 45; ++three)
        for (int entry = 0; entry < 32; ++entry) {
          const int digits[3] = {entry / 9 - 1, entry / 3 % 3 - 1, entry % 3 - 1};
          int value = 0;
          for (int i = 0; i < 3; ++i) {
            const int64_t at = column(group, three, i);
            if (at < kColumns) value += digits[i] * input.x[at];
          }
          tables[static_cast<size_t>((group * 45 + three) * 32 + entry)] = static_cast<int16_t>(value);
        }
  }
  static void pack(const Tile& tile, uint8_t* out) {
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t word = 0; word < kWords; ++word)
        for (int64_t place = 0; place < 64; ++place) {
          int stored = 0;
          for (int64_t k = 0; k < 3; ++k) {
            int index = 0;
            for (int64_t i = 0; i < 3; ++i) index = 3 * index + tile.at(row_at(place), column(group, 3 * word + k, i)) + 1;
            stored |= index << (5 * k);
          }
          const auto value = static_cast<uint16_t>(stored);
          std::memcpy(out + group * kGroupBytes + word * 128 + 2 * place, &value, 2);
        }
  }
  void run(const Input&, const uint8_t* codes, const uint8_t* scales, float* out) const {
    __m512 totals[4] = {};
    const int16_t* table = tables.get();
    for (int64_t group = 0; group < kGroups; ++group) {
      Halves sums;
      for (int64_t word = 0; word < kWords; ++word, codes += 128) {
        const __m512i a = _mm512_load_si512(codes), b = _mm512_load_si512(codes + 64);
        for (int k = 0; k < 3; ++k, table += 32) {
          const __m512i entries = _mm512_load_si512(table);
          sums.a = _mm512_add_epi16(sums.a, _mm512_permutexvar_epi16(_mm512_srli_epi16(a, 5 * k), entries));
          sums.b = _mm512_add_epi16(sums.b, _mm512_permutexvar_epi16(_mm512_srli_epi16(b, 5 * k), entries));
        }
      }
      add_group(sums, scales + 128 * group, totals);
    }
    store_totals(totals, out);
  }
};

// ---- Measuring ------------------------------------------------------------------------------------------------------

struct Options {
  int64_t bytes;
  int threads, rounds;
};

uint8_t* allocate(int64_t bytes) {
  auto* memory = static_cast<uint8_t*>(std::aligned_alloc(2 << 20, static_cast<size_t>((bytes + (2 << 20) - 1) >> 21 << 21)));
  if (!memory) std::exit(2);
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // as the library does; a refusal only costs speed
  return memory;
}

// Seconds of the best of several rounds in which every thread does `work(part, parts)`.
template <typename Work>
double best_seconds(const Options& options, const Work& work) {
  double best = 1e9;
  for (int round = 0; round <= options.rounds; ++round) {
    const auto begun = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int i = 1; i < options.threads; ++i) threads.emplace_back([&, i] { work(i, options.threads); });
    work(0, options.threads);
    for (auto& thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
    if (round > 0) best = std::min(best, seconds);
  }
  return best;
}

void measure_reading(const Options& options) {
  uint8_t* memory = allocate(options.bytes);
  std::memset(memory, 1, static_cast<size_t>(options.bytes));
  std::vector<int64_t> sink(static_cast<size_t>(options.threads));
  const double seconds = best_seconds(options, [&](int part, int parts) {
    const int64_t first = options.bytes / 256 * part / parts * 256, last = options.bytes / 256 * (part + 1) / parts * 256;
    __m512i sums[4] = {};
    for (int64_t i = first; i < last; i += 256)
      for (int j = 0; j < 4; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(memory + i + 64 * j));
    sink[static_cast<size_t>(part)] = _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
  });
  if (sink[0] == 42) std::fputs("", stderr);  // so that the reading is not optimised away
  std::printf("reading alone;0;%.6g;0\n", static_cast<double>(options.bytes) / seconds);
  std::free(memory);
}

template <typename Layout>
void measure(const Options& options) {
  constexpr int64_t scale_bytes = kGroups * Layout::kRows * 2, tile_bytes = Layout::kCodeBytes + scale_bytes;
  static_assert(Layout::kCodeBytes % 64 == 0 && scale_bytes % 64 == 0, "tiles must stay aligned");
  constexpr int64_t tiles = kTestRows / Layout::kRows;
  std::mt19937 random(1);
  std::vector<int8_t> weights(kTestRows * kColumns);
  for (auto& weight : weights) weight = static_cast<int8_t>(static_cast<int>(random() % (2 * Layout::kLargest + 1)) - Layout::kLargest);
  auto input = std::make_unique<Input>();
  for (auto& value : input->x) value = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  // A stretch of largest values: sums reach their bounds.
  for (int64_t column = 0; column < kGroup; ++column) {
    input->x[column] = 127;
    for (int64_t row = 0; row < 4; ++row)
      weights[static_cast<size_t>(row * kColumns + column)] = static_cast<int8_t>((row % 2 ? -1 : 1) * Layout::kLargest);
  }
  for (int64_t group = 0; group < kGroups; ++group) {
    input->sums[group] = 0;
    for (int64_t i = 0; i < kGroup; ++i) input->sums[group] += input->x[group * kGroup + i];
  }
  Layout layout;
  layout.prepare(*input);

  // Some tiles, checked, then copies of them until the memory is full.
  const int64_t count = options.bytes / tile_bytes;
  uint8_t* memory = allocate(count * tile_bytes);
  std::vector<float> scale_values(static_cast<size_t>(kTestRows * kGroups));
  for (auto& value : scale_values) value = std::ldexp(static_cast<float>(1 + random() % 7), -6);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    uint8_t* at = memory + tile * tile_bytes;
    Layout::pack(Tile{weights.data() + tile * Layout::kRows * kColumns, Layout::kRows}, at);
    for (int64_t group = 0; group < kGroups; ++group)
      for (int64_t i = 0; i < Layout::kRows; ++i) {
        const int64_t row = tile * Layout::kRows + (Layout::kRows == 64 ? row_at(i) : i);
        const uint16_t half = _cvtss_sh(scale_values[static_cast<size_t>(row * kGroups + group)], 0);
        std::memcpy(at + Layout::kCodeBytes + 2 * (group * Layout::kRows + i), &half, 2);
      }
  }
  double worst = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float out[Layout::kRows];
    layout.run(*input, memory + tile * tile_bytes, memory + tile * tile_bytes + Layout::kCodeBytes, out);
    for (int64_t i = 0; i < Layout::kRows; ++i) {
      const int64_t row = tile * Layout::kRows + i;
      double expected = 0;
      for (int64_t column = 0; column < kColumns; ++column)
        expected += weights[static_cast<size_t>(row * kColumns + column)] * input->x[column] *
                    scale_values[static_cast<size_t>(row * kGroups + column / kGroup)];
      worst = std::max(worst, std::fabs(out[i] - expected) / (1 + std::fabs(expected)));
    }
  }
  if (!(worst < 1e-4)) {
    std::fprintf(stderr, "%s is wrong by %g\n", Layout::kName, worst);
    std::exit(1);
  }
  for (int64_t tile = tiles; tile < count; ++tile)
    std::memcpy(memory + tile * tile_bytes, memory + (tile % tiles) * tile_bytes, static_cast<size_t>(tile_bytes));
  std::vector<float> out(static_cast<size_t>(count * Layout::kRows));
  const double seconds = best_seconds(options, [&](int part, int parts) {
    for (int64_t tile = count * part / parts; tile < count * (part + 1) / parts; ++tile) {
      const uint8_t* at = memory + tile * tile_bytes;
      layout.run(*input, at, at + Layout::kCodeBytes, out.data() + tile * Layout::kRows);
    }
  });
  const double read = static_cast<double>(count * tile_bytes), held = static_cast<double>(count * Layout::kRows * kColumns);
  std::printf("%s;%.4f;%.6g;%.6g\n", Layout::kName, 8 * read / held, read / seconds, held / seconds);
  std::fflush(stdout);
  std::free(memory);
}

}  // namespace

int main(int count, char** arguments) {
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vbmi")) {
    std::fprintf(stderr, "this processor has no AVX-512 with VNNI and VBMI\n");
    return 3;
  }
  Options options{1536, 1, 5};
  if (count > 1) options.bytes = std::atoll(arguments[1]);
  if (count > 2) options.threads = std::atoi(arguments[2]);
  if (count > 3) options.rounds = std::atoi(arguments[3]);
  if (options.bytes < 1 || options.threads < 1 || options.threads > 256 || options.rounds < 1) return 2;
  options.bytes <<= 20;
  measure_reading(options);
  measure<TwoBit>(options);
  measure<FiveInAByte>(options);
  measure<Tl1>(options);
  measure<Tl2>(options);
  measure<TMac>(options);
  measure<Tellme>(options);
  measure<Nibble>(options);
  measure<FiveInAWord>(options);
  return 0;
}
