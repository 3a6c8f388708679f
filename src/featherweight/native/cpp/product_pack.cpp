// Stored codes to operands: see product_layout.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "packing.h"
#include "parallel.h"
#include "product_header.h"
#include "product_kernels.h"
#include "product_layout.h"
#include "product_reader.h"
#include "team.h"

namespace {

// ---- rows to steps ----

typedef uint32_t Four __attribute__((vector_size(16)));

// Words a0 b0 a1 b1, or a2 b2 a3 b3.
inline Four zipped_low(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#else
  return __builtin_shuffle(a, b, Four{0, 4, 1, 5});
#endif
}
inline Four zipped_high(Four a, Four b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
  return __builtin_shuffle(a, b, Four{2, 6, 3, 7});
#endif
}

// A line of the cache, 16 words, of each of 16 rows `stride` bytes apart to columns: [word][row].
void transpose_lines(const uint8_t* rows, int64_t stride, uint8_t* to) {
  for (int64_t r = 0; r < kTileRows; r += 4)
    for (int64_t w = 0; w < 16; w += 4) {
      Four row[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&row[i], rows + (r + i) * stride + 4 * w, sizeof row[i]);
      const Four even_low = zipped_low(row[0], row[2]), even_high = zipped_high(row[0], row[2]);
      const Four odd_low = zipped_low(row[1], row[3]), odd_high = zipped_high(row[1], row[3]);
      const Four columns[4] = {zipped_low(even_low, odd_low), zipped_high(even_low, odd_low), zipped_low(even_high, odd_high),
                               zipped_high(even_high, odd_high)};
      for (int i = 0; i < 4; ++i) std::memcpy(to + (w + i) * kStepBytes + 4 * r, &columns[i], sizeof columns[i]);
    }
}

int64_t total_steps(const fw_operand& h) { return h.segments * h.steps; }

// All steps of 16 rows of codes, in whole lines: rows are readable for so long.
void transpose_rows(const fw_operand& h, const uint8_t* rows, int64_t width, uint8_t* steps) {
  for (int64_t step = 0; step < total_steps(h); step += 16) transpose_lines(rows + 4 * step, width, steps + kStepBytes * step);
}

// ---- steps to codes ----

// `Lanes` bytes a step (64 or 16) of a unit into vectors of as many bytes.
template <int Lanes>
void pack_unit(const uint8_t* steps, int bits, const FieldParts& parts, uint8_t* to) {
  constexpr int kWords = Lanes / 8;
  uint64_t vectors[8][kWords] = {};
  // Parts of all bytes of a word are moved at once: masked, they stay inside of their byte.
  for (int i = 0; i < parts.count; ++i) {
    const FieldPart& part = parts.part[i];
    const uint64_t mask = 0x0101010101010101U * ((1U << part.count) - 1);
    uint64_t words[kWords];
    std::memcpy(words, steps + Lanes * part.step, Lanes);
    for (int j = 0; j < kWords; ++j) vectors[part.vector][j] |= (words[j] >> part.from & mask) << part.to;
  }
  std::memcpy(to, vectors, static_cast<size_t>(Lanes * unit_steps(bits) * bits / 8));
}

void pack_fields(const fw_operand& h, const uint8_t* steps, int plane, uint8_t* to) {
  const int unit = unit_steps(h.bits);
  const FieldParts parts = field_parts(h.bits);
  const int64_t bytes = unit * kStepBytes * h.bits / 8;
  for (int64_t g = 0; g < h.segments; ++g) {
    const int64_t count = segment_steps(&h, g);
    uint8_t* place = to + (g * h.planes * h.steps + plane * count) / unit * bytes;
    for (int64_t s = 0; s < count; s += unit, place += bytes)
      pack_unit<kStepBytes>(steps + kStepBytes * (g * h.steps + s), h.bits, parts, place);
  }
}

// Bytes of TRITS for four columns at once: `w` are the digits of five steps, a byte each.
uint32_t trit_bytes(const uint32_t (&w)[5]) {
  constexpr uint32_t kEach = 0x01010101U;
  const uint32_t r = w[0] + 3 * w[1] + 9 * w[2], q = 8 * kEach - w[3] - 3 * w[4];  // no byte carries into the next
  const uint32_t escape = (q >> 3 & kEach) * 255U;                                // q = 8
  return ((8 * r + q) & ~escape) | ((r + kEscape * kEach) & escape);
}

// `steps` has room for four more behind the last one.
void pack_trit_vectors(const fw_operand& h, uint8_t* steps, int plane, uint8_t* to) {
  std::memset(steps + kStepBytes * total_steps(h), 1, 4 * kStepBytes);
  for (int64_t v = 0; v < trit_vectors(&h); ++v) {
    uint32_t step[5][kTileRows], packed[kTileRows];
    std::memcpy(step, steps + 5 * kStepBytes * v, sizeof step);
    for (int64_t r = 0; r < kTileRows; ++r) packed[r] = trit_bytes({step[0][r], step[1][r], step[2][r], step[3][r], step[4][r]});
    std::memcpy(to + (v * h.planes + plane) * kStepBytes, packed, kStepBytes);
  }
}

void pack_quartet_words(const fw_operand& h, const uint8_t* rows, int64_t width, uint8_t* to) {
  for (int64_t first = 0; first < h.segments * h.steps; first += 32, to += 5 * kStepBytes)
    for (int64_t r = 0; r < kTileRows; ++r) {
      uint64_t pool = 0;
      int held = 0, word = 0;
      for (int i = 0; i < 32; ++i) {
        pool |= static_cast<uint64_t>(rows[r * width + first + i]) << held;
        held += 5;
        if (held < 32) continue;
        const uint32_t low = static_cast<uint32_t>(pool);
        std::memcpy(to + kStepBytes * word++ + 4 * r, &low, sizeof low);
        pool >>= 32;
        held -= 32;
      }
    }
}

void pack_tables(const fw_operand& h, const uint8_t* rows, int64_t width, uint8_t* to) {
  const int unit = unit_steps(h.bits);
  const FieldParts parts = field_parts(h.bits);
  const int64_t bytes = unit * 16 * h.bits / 8;
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t c = 0; c < h.segments * h.steps * 4; c += 16 * unit, to += bytes)
      pack_unit<16>(rows + r * width + c, h.bits, parts, to);
}

float value_of(const void* from, int32_t dtype, int64_t index) {
  uint16_t half;
  float value;
  if (dtype == FW_FLOAT32) {
    std::memcpy(&value, static_cast<const char*>(from) + 4 * index, sizeof value);
    return value;
  }
  std::memcpy(&half, static_cast<const char*>(from) + 2 * index, sizeof half);
  return dtype == FW_FLOAT16 ? float_from_half(half) : float_from_bfloat16(half);
}

// `values`: scales, or offsets, which are laid out like those of a single plane.
void pack_scales(const fw_code& s, const fw_operand& h, const void* values, int64_t tile, uint8_t* to) {
  const int64_t size = scale_bytes(s.scale_dtype), planes = h.tied ? 1 : h.planes;
  const int64_t groups = s.scale_rows > 1 ? 1 : h.groups;
  for (int64_t g = 0; g < h.groups; ++g)
    for (int64_t k = 0; k < planes; ++k)
      for (int64_t r = 0; r < kTileRows; ++r, to += size) {
        const int64_t row = tile * kTileRows + r;
        const int64_t source_row = s.scale_rows > 1 ? row / s.scale_rows : row;
        const int64_t index = (source_row * groups + (groups == 1 ? 0 : g)) * planes + k;
        if (row < s.rows)
          std::memcpy(to, static_cast<const char*>(values) + index * size, static_cast<size_t>(size));
        else
          std::memset(to, s.scale_dtype == FW_LOG8 ? 255 : 0, static_cast<size_t>(size));
      }
}

void pack_zeros(const fw_code& s, const fw_operand& h, int64_t tile, uint8_t* to) {
  for (int64_t g = 0; g < h.groups; ++g)
    for (int64_t r = 0; r < kTileRows; ++r, ++to) {
      const int64_t row = tile * kTileRows + r, bit = (row * h.groups + g) * s.bits;
      if (row >= s.rows) {
        *to = 0;
        continue;
      }
      const unsigned low = s.zero_points[bit / 8], high = bit % 8 + s.bits > 8 ? s.zero_points[bit / 8 + 1] : 0U;
      *to = static_cast<uint8_t>((low | high << 8) >> (bit % 8) & ((1U << s.bits) - 1));
    }
}

void pack_codebooks(const fw_code& s, const fw_operand& h, int64_t tile, float* to) {
  const int64_t entries = h.groups << h.bits;
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t e = 0; e < entries; ++e, ++to) {
      const int64_t row = tile * kTileRows + r;
      *to = row < s.rows ? value_of(s.scales, s.scale_dtype, row * entries + e) : 0.0F;
    }
}

// Lines of a tile's rows to columns, words or (Halves) half words; rows and columns that the matrix lacks are zeros.
template <bool Halves>
void pack_lines(const fw_code& s, int64_t tile, int64_t row_bytes, int64_t padded_bytes, uint8_t* to) {
  const uint8_t* from = static_cast<const uint8_t*>(s.codes) + tile * kTileRows * row_bytes;
  const int64_t rows = std::min(kTileRows, s.rows - tile * kTileRows);
  for (int64_t at = 0; at < padded_bytes; at += 64, to += 64 * kTileRows) {
    alignas(64) uint8_t padded[64 * kTileRows], columns[64 * kTileRows];
    const bool whole = rows == kTileRows && at + 64 <= row_bytes;
    if (!whole) {
      std::memset(padded, 0, sizeof padded);
      for (int64_t r = 0; r < rows && at < row_bytes; ++r)
        std::memcpy(padded + 64 * r, from + r * row_bytes + at, static_cast<size_t>(std::min<int64_t>(64, row_bytes - at)));
    }
    transpose_lines(whole ? from + at : padded, whole ? row_bytes : 64, Halves ? columns : to);
    if (!Halves) continue;
    for (int64_t pair = 0; pair < 16; ++pair) {
      uint32_t words[kTileRows];
      uint16_t halves[2][kTileRows];
      std::memcpy(words, columns + kStepBytes * pair, sizeof words);
      for (int64_t r = 0; r < kTileRows; ++r) halves[0][r] = static_cast<uint16_t>(words[r]);
      for (int64_t r = 0; r < kTileRows; ++r) halves[1][r] = static_cast<uint16_t>(words[r] >> 16);
      std::memcpy(to + kStepBytes * pair, halves, sizeof halves);
    }
  }
}

void pack_plain(const fw_code& s, const fw_operand& h, int64_t tile, uint8_t* to) {
  const int64_t size = scale_bytes(s.scale_dtype), bytes = s.cols * size, padded = padded_columns(&h) * size;
  if (s.scale_dtype == FW_FLOAT16)
    pack_lines<true>(s, tile, bytes, padded, to);
  else
    pack_lines<false>(s, tile, bytes, padded, to);  // of bfloat16 a word is a pair
}

// What a thread packs with.
struct PackWork {
  Reader reader;
  int64_t width;
  std::vector<uint8_t> rows, steps;

  PackWork(const fw_code& s, const fw_operand& h, int64_t row_width)
      : reader(s, h, row_width),
        width(row_width),
        rows(static_cast<size_t>(kTileRows * row_width + 64)),
        steps(static_cast<size_t>(kStepBytes * (round_up(total_steps(h), 16) + 4))) {}
};

void pack_tile(const fw_code& s, const fw_operand& h, int64_t tile, PackWork& work, uint8_t* operand) {
  uint8_t* codes = operand + h.codes_at + tile * h.codes_per_tile;
  if (h.layout == FW_PLAIN) return pack_plain(s, h, tile, codes);
  for (int plane = 0; plane < h.planes; ++plane) {
    const uint8_t* rows = work.rows.data();
    uint8_t* steps = work.steps.data();
    work.reader.read(plane, tile, work.rows.data());
    if (h.layout == FW_FIELDS || h.layout == FW_TRITS) transpose_rows(h, rows, work.width, steps);
    switch (h.layout) {
      case FW_FIELDS: pack_fields(h, steps, plane, codes); break;
      case FW_TRITS: pack_trit_vectors(h, steps, plane, codes); break;
      case FW_QUARTETS: pack_quartet_words(h, rows, work.width, codes); break;
      default: pack_tables(h, rows, work.width, codes);
    }
  }
  uint8_t* scales = operand + h.scales_at + tile * h.scales_per_tile;
  if (h.layout == FW_TABLES)
    pack_codebooks(s, h, tile, reinterpret_cast<float*>(scales));
  else
    pack_scales(s, h, s.scales, tile, scales);
  uint8_t* zeros = operand + h.zeros_at + tile * h.zeros_per_tile;
  if (h.has_zeros) pack_zeros(s, h, tile, zeros);
  if (h.has_offsets) pack_scales(s, h, s.offsets, tile, zeros);
}

constexpr int64_t kTilesAtOnce = 4;               // that a thread takes
constexpr int64_t kBytesToShare = int64_t{1} << 16;  // packed faster than other threads are woken

// The first byte of the planes, in the order they are looked through, that no trits pack to; -1 if there is none.
int64_t bad_trit_byte(const fw_code& s, int threads) {
  constexpr int64_t kNone = INT64_MAX;
  const int64_t bytes = packed_trit_bytes(s.rows * s.cols, s.packing);
  for (int k = 0; k < s.planes; ++k) {
    const uint8_t* codes = static_cast<const uint8_t*>(s.codes) + k * s.plane_bytes;
    std::atomic<int64_t> least{kNone};
    run_team(bytes < kBytesToShare ? 1 : threads, [&](Team& team) {
      const auto [first, last] = team.share(bytes, 64);
      const int64_t found = find_bad_byte(codes + first, last - first, s.packing);
      if (found < 0) return;
      int64_t before = least.load();
      while (first + found < before && !least.compare_exchange_weak(before, first + found)) {
      }
    });
    if (least.load() != kNone) return least.load();
  }
  return -1;
}

}  // namespace

int32_t fw_operand_pack(const fw_code* source, int32_t layout, void* operand, int64_t bytes, int32_t threads, int64_t* bad) {
  return guarded_call([&]() -> int32_t {
    fw_operand header;
    if (bad) *bad = -1;
    if (!source || !aligned_operand(operand) || !make_header(*source, layout, header) || !long_enough(*source)) return FW_INVALID;
    if (header.bytes > bytes) return FW_INVALID;
    threads = fair_threads(threads);
    const fw_code& s = *source;
    if (s.kind == FW_TRIT_PLANES) {
      const int64_t found = bad_trit_byte(s, threads);
      if (found >= 0) {
        if (bad) *bad = found;
        return FW_INVALID;
      }
    }
    uint8_t* to = static_cast<uint8_t*>(operand);
    std::memcpy(to, &header, sizeof header);
    std::memset(to + sizeof header, 0, static_cast<size_t>(header.codes_at) - sizeof header);
    const int64_t width = padded_columns(&header) + 4 * (s.kind == FW_SHERRY ? s.lane_stride : 1) * 4;
    std::atomic<int64_t> next{0};
    run_team(header.tiles * header.codes_per_tile < kBytesToShare ? 1 : threads, [&](Team&) {
      PackWork work(s, header, width);
      for (int64_t first = next.fetch_add(kTilesAtOnce); first < header.tiles; first = next.fetch_add(kTilesAtOnce))
        for (int64_t tile = first; tile < std::min(header.tiles, first + kTilesAtOnce); ++tile)
          pack_tile(s, header, tile, work, to);
    });
    return FW_OK;
  });
}
