// Stored codes of sixteen rows as bytes, in the padded columns of an operand: what product_pack.cpp lays out.
#ifndef FEATHERWEIGHT_PRODUCT_READER_H
#define FEATHERWEIGHT_PRODUCT_READER_H

#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "packing.h"
#include "product_header.h"
#include "product_layout.h"

namespace {

// Rows [first, first + 16) of a plane of codes as bytes [16][width], `width` >= the padded columns.
class Reader {
 public:
  Reader(const fw_code& source, const fw_operand& header, int64_t width)
      : s_(source),
        h_(header),
        width_(width),
        whole_(header.layout == FW_TRITS && header.segments * header.steps * 4 == source.cols),
        line_(static_cast<size_t>(width + 64)) {}

  void read(int plane, int64_t tile, uint8_t* to) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = tile * kTileRows + r;
      uint8_t* place = to + r * width_;
      if (row >= s_.rows) {
        std::memset(place, h_.layout == FW_QUARTETS || h_.layout == FW_TABLES ? 0 : 1, static_cast<size_t>(width_));
        continue;
      }
      if (whole_) {
        read_trits(plane, row, place);
      } else {
        read_row(plane, row);
        spread(place);
      }
    }
  }

 private:
  void read_row(int plane, int64_t row) {
    const uint8_t* codes = static_cast<const uint8_t*>(s_.codes);
    if (s_.kind == FW_TRIT_PLANES) {
      if (!joint(s_, h_.layout)) return read_trits(plane, row, line_.data());
      for (int k = 0; k < s_.planes; ++k) add_trits(k, row, s_.weights[k]);
    } else if (s_.kind == FW_SHERRY) {
      read_quartets(row);
    } else {
      unpack_bit_range(codes, row * s_.cols, s_.cols, s_.bits, line_.data());
    }
  }

  void read_trits(int plane, int64_t row, uint8_t* to) const {
    const uint8_t* packed = static_cast<const uint8_t*>(s_.codes) + plane * s_.plane_bytes;
    unpack_digit_range(packed, row * s_.cols, s_.cols, s_.packing, to);
  }

  void add_trits(int plane, int64_t row, int weight) {
    digits_.resize(static_cast<size_t>(s_.cols + 2 * kSlack));
    read_trits(plane, row, digits_.data());
    if (plane == 0) std::fill(line_.begin(), line_.begin() + s_.cols, uint8_t{0});
    for (size_t c = 0; c < static_cast<size_t>(s_.cols); ++c)
      line_[c] = static_cast<uint8_t>(line_[c] + weight * digits_[c]);
  }

  // QUARTETS keeps joint codes, one per four columns; FIELDS the digits t + 1.
  void read_quartets(int64_t row) {
    const int64_t span = 4 * s_.lane_stride, quartets = round_up(s_.cols, span) / 4, first = row * quartets;
    for (int64_t q = 0; q < quartets; ++q) {
      const uint8_t* patterns = static_cast<const uint8_t*>(s_.codes);
      const int64_t at = first + q;
      const int pattern = patterns[at / 2] >> (4 * (at % 2)) & 15, sign = s_.signs[at / 8] >> (at % 8) & 1;
      if (h_.layout == FW_QUARTETS) {
        line_[static_cast<size_t>(q)] = static_cast<uint8_t>(pattern | sign << 4);
        continue;
      }
      const int lead = sign ? -1 : 1, zero = pattern >> 2;
      const int kept[3] = {lead, pattern & 1 ? -lead : lead, pattern & 2 ? -lead : lead};
      for (int lane = 0, next = 0; lane < 4; ++lane) {
        const int64_t c = q / s_.lane_stride * span + q % s_.lane_stride + lane * s_.lane_stride;
        const int trit = lane == zero ? 0 : kept[next++];
        if (c < s_.cols) line_[static_cast<size_t>(c)] = static_cast<uint8_t>(trit + 1);
      }
    }
  }

  static void unpack_nibbles(const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
      uint8_t bytes[16];
      uint16_t pairs[16];  // lower and upper half of a byte in two
      std::memcpy(bytes, from + i / 2, sizeof bytes);
      for (int k = 0; k < 16; ++k) pairs[k] = static_cast<uint16_t>((bytes[k] & 15) | (bytes[k] >> 4) << 8);
      std::memcpy(to + i, pairs, sizeof pairs);
    }
    for (; i < count; ++i) to[i] = static_cast<uint8_t>(from[i / 2] >> (4 * (i % 2)) & 15);
  }

  static void unpack_bit_range(const uint8_t* packed, int64_t first, int64_t count, int bits, uint8_t* to) {
    if (bits == 8) {
      std::memcpy(to, packed + first, static_cast<size_t>(count));
    } else if (bits == 4 && first % 2 == 0) {
      unpack_nibbles(packed + first / 2, count, to);
    } else if (first * bits % 8 == 0) {
      unpack_bit_string(packed + first * bits / 8, count, bits, to);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = (first + i) * bits;
        const unsigned low = packed[bit / 8], high = bit % 8 + bits > 8 ? packed[bit / 8 + 1] : 0U;
        to[i] = static_cast<uint8_t>((low | high << 8) >> (bit % 8) & ((1U << bits) - 1));
      }
    }
  }

  // Segment by segment, each padded; QUARTETS has one code for four columns.
  void spread(uint8_t* to) const {
    const int64_t each = h_.layout == FW_QUARTETS ? 4 : 1;
    const int64_t columns = h_.layout == FW_QUARTETS ? round_up(s_.cols, 4 * s_.lane_stride) : s_.cols;
    const int64_t length = h_.steps * 4 / each;
    const int filler = h_.layout == FW_QUARTETS || h_.layout == FW_TABLES ? 0 : 1;
    for (int64_t g = 0; g < h_.segments; ++g) {
      const int64_t first = g * h_.segment, count = divide_up(std::min(columns, first + h_.segment) - first, each);
      std::memcpy(to + g * length, line_.data() + first / each, static_cast<size_t>(count));
      std::memset(to + g * length + count, filler, static_cast<size_t>(length - count));
    }
  }

  const fw_code& s_;
  const fw_operand& h_;
  int64_t width_;
  bool whole_;  // a row of digits needs no padding between segments
  std::vector<uint8_t> line_, digits_;
};

}  // namespace

#endif
