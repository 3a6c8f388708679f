// What sources and operands must be, and the header of an operand: where things lie in it.
#include "product_header.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "packing.h"
#include "product_kernels.h"
#include "product_layout.h"

const uint32_t kLog8Words[6] = {0x1e1e1e1e, 0x0f0f0f0f, 0x1f1f1f1f, 0x70707070, 0x80808080, 0x7f7f7f7f};

float log8_value(int code, int exponent) {
  return code == 255 ? 0.0F : std::ldexp(kLog8Fractions[code & 31], exponent - (code >> 5));
}

namespace {

constexpr int64_t kLargest = int64_t{1} << 40;
constexpr int64_t kLongestSegment = 65536;

int sum_of_weights(const fw_code& s) {
  int sum = 0;
  for (int k = 0; k < s.planes; ++k) sum += s.weights[k];
  return sum;
}

int bits_for(int levels) {
  int bits = 1;
  while ((1 << bits) < levels) ++bits;
  return bits;
}

// Columns with one activation scale: the group, or a divisor of a long one that is long enough to be worth it.
int64_t choose_segment(const fw_code& s) {
  if (s.kind == FW_DENSE) return s.cols;  // a token of plain values is prepared as a whole
  if (s.segment > 0) return s.segment;
  if (s.kind == FW_CODEBOOK) return s.group_size;
  if (s.group_size <= 128) return s.group_size;
  if (s.group_size >= s.cols) return std::min<int64_t>(128, s.cols);
  for (int64_t length = 128; length >= 32; length -= 4)
    if (s.group_size % length == 0) return length;
  return s.group_size;
}

int64_t padded_steps(int32_t layout, int bits, int64_t segment) {
  const int64_t steps = divide_up(segment, 4);
  switch (layout) {
    case FW_FIELDS: return round_up(steps, unit_steps(bits));
    case FW_TRITS: return packed_segments(steps) ? steps : round_up(steps, 5);
    case FW_QUARTETS: return round_up(steps, 32);
    case FW_TABLES: return round_up(divide_up(segment, 16), unit_steps(bits)) * 4;
    default: return round_up(segment, kPlainPadding) / 4;
  }
}

// All but the lengths.
bool valid(const fw_code& s) {
  if (s.rows < 1 || s.cols < 1 || s.rows > kLargest || s.cols > kLargest || s.group_size < 1 || !s.codes) return false;
  if (s.rows > kLargest / s.cols) return false;
  if (s.segment < 0 || (s.kind != FW_DENSE && !s.scales)) return false;
  if (s.scale_rows != 1 && (s.scale_rows != s.rows || s.kind == FW_CODEBOOK)) return false;
  const bool floats = s.scale_dtype == FW_FLOAT32 || s.scale_dtype == FW_BFLOAT16 || s.scale_dtype == FW_FLOAT16;
  if (!floats && (s.scale_dtype != FW_LOG8 || s.kind == FW_CODEBOOK || s.kind == FW_DENSE)) return false;
  if (!floats && (s.scale_exponent < kLeastExponent || s.scale_exponent > kMostExponent)) return false;
  if (s.offsets && (s.kind != FW_UNIFORM || s.zero_points || !floats || s.scale_rows != 1)) return false;
  switch (s.kind) {
    case FW_TRIT_PLANES:
      if (s.planes < 1 || s.planes > 3 || (s.packing != FW_BASE3 && s.packing != FW_2BIT)) return false;
      for (int k = 0; s.tied && k < s.planes; ++k)
        if (s.weights[k] < 1 || s.weights[k] > 27) return false;
      return true;
    case FW_UNIFORM:
    case FW_CODEBOOK: return s.bits >= 1 && s.bits <= 8;
    case FW_SHERRY: return s.lane_stride >= 1 && s.lane_stride <= 4096 && s.signs;
    case FW_DENSE: return true;
    default: return false;
  }
}

// Whether no quartet has lanes in two segments.
bool whole_quartets(const fw_code& s, int64_t segment) {
  return segment % (4 * s.lane_stride) == 0 || (s.lane_stride == 1 && segment >= s.cols);
}

int32_t choose_layout(const fw_code& s) {
  switch (s.kind) {
    case FW_TRIT_PLANES: return product_kernels().trits ? FW_TRITS : FW_FIELDS;
    case FW_SHERRY: return whole_quartets(s, std::min(choose_segment(s), s.cols)) ? FW_QUARTETS : FW_FIELDS;
    case FW_CODEBOOK: return FW_TABLES;
    case FW_DENSE: return FW_PLAIN;
    default: return FW_FIELDS;
  }
}

}  // namespace

// Whether the memory that a source points to is as long as it says, and what it says is enough. All sizes are those of a
// valid shape: there is nothing that could overflow.
bool long_enough(const fw_code& s) {
  const int64_t elements = s.rows * s.cols, groups = divide_up(s.cols, std::min(s.group_size, s.cols));
  const int64_t scales = (s.scale_rows > 1 ? 1 : s.rows * groups) * scale_bytes(s.scale_dtype);
  switch (s.kind) {
    case FW_TRIT_PLANES: {
      const int64_t plane = packed_trit_bytes(elements, s.packing);
      if (s.plane_bytes < plane || s.plane_bytes > kLargest) return false;
      return s.codes_bytes >= (s.planes - 1) * s.plane_bytes + plane && s.scales_bytes >= scales * (s.tied ? 1 : s.planes);
    }
    case FW_UNIFORM:
      if (s.zero_points && s.zero_bytes < divide_up(s.rows * groups * s.bits, 8)) return false;
      if (s.offsets && s.offset_bytes < scales) return false;
      return s.codes_bytes >= divide_up(elements * s.bits, 8) && s.scales_bytes >= scales;
    case FW_CODEBOOK:
      return s.codes_bytes >= divide_up(elements * s.bits, 8) && s.scales_bytes >= scales << s.bits;
    case FW_SHERRY: {
      const int64_t quartets = s.rows * (round_up(s.cols, 4 * s.lane_stride) / 4);
      return s.codes_bytes >= divide_up(quartets, 2) && s.sign_bytes >= divide_up(quartets, 8) && s.scales_bytes >= scales;
    }
    default: return s.codes_bytes >= elements * scale_bytes(s.scale_dtype);
  }
}

bool make_header(const fw_code& s, int32_t layout, fw_operand& h) {
  if (!valid(s)) return false;
  if (layout == FW_AUTO) layout = choose_layout(s);
  const bool trits = s.kind == FW_TRIT_PLANES || s.kind == FW_SHERRY;
  const bool fits = layout == FW_FIELDS   ? trits || s.kind == FW_UNIFORM
                    : layout == FW_TRITS  ? s.kind == FW_TRIT_PLANES
                    : layout == FW_TABLES ? s.kind == FW_CODEBOOK
                    : layout == FW_PLAIN  ? s.kind == FW_DENSE
                                          : layout == FW_QUARTETS && s.kind == FW_SHERRY;
  if (!fits) return false;
  h = {};
  h.magic = kOperandMagic;
  h.version = kOperandVersion;
  h.layout = layout;
  h.rows = s.rows;
  h.cols = s.cols;
  h.tiles = divide_up(s.rows, kTileRows);
  h.tied = s.kind == FW_TRIT_PLANES && s.tied;
  h.planes = s.kind == FW_TRIT_PLANES && !joint(s, layout) ? s.planes : 1;
  for (int k = 0; k < s.planes && h.tied; ++k) h.weights[k] = s.weights[k];
  h.scale_dtype = s.scale_dtype;
  h.scale_exponent = s.scale_exponent;
  h.lane_stride = s.kind == FW_SHERRY && layout == FW_QUARTETS ? s.lane_stride : 1;
  h.bits = s.kind == FW_DENSE ? 0 : joint(s, layout) ? bits_for(2 * sum_of_weights(s) + 1) : trits ? 2 : s.bits;
  h.has_offsets = s.offsets != nullptr;
  h.offset = h.tied ? sum_of_weights(s) : trits ? 1 : s.kind == FW_UNIFORM && !s.offsets ? 1 << (s.bits - 1) : 0;
  h.has_zeros = s.kind == FW_UNIFORM && s.zero_points;

  h.segment = choose_segment(s);
  if (h.segment > s.cols) h.segment = s.cols;
  if (h.segment > kLongestSegment && layout != FW_PLAIN && layout != FW_TABLES) return false;
  const int64_t group = std::min(s.group_size, s.cols);
  if (s.kind != FW_DENSE && group < s.cols && group % h.segment != 0) return false;
  if (layout == FW_QUARTETS && !whole_quartets(s, h.segment)) return false;
  h.segments = divide_up(s.cols, h.segment);
  h.segments_per_group = s.kind == FW_DENSE || group >= s.cols ? h.segments : group / h.segment;
  h.groups = divide_up(h.segments, h.segments_per_group);
  h.steps = padded_steps(layout, h.bits, h.segment);
  const int64_t steps = h.segments * h.steps;
  switch (layout) {
    case FW_FIELDS: {
      const int64_t last = padded_steps(layout, h.bits, s.cols - (h.segments - 1) * h.segment);
      h.last_steps = static_cast<int32_t>(last);
      h.codes_per_tile = (steps - h.steps + last) * kStepBytes * h.bits / 8 * h.planes;
      break;
    }
    case FW_TRITS: h.codes_per_tile = trit_vectors(&h) * kStepBytes * h.planes; break;
    case FW_QUARTETS: h.codes_per_tile = steps * 10; break;
    case FW_TABLES: h.codes_per_tile = kTileRows * steps * 4 * h.bits / 8; break;
    default: h.codes_per_tile = kTileRows * steps * 4 * scale_bytes(s.scale_dtype);
  }
  if (layout == FW_TABLES) {
    h.scales_per_tile = kTileRows * h.groups * (int64_t{1} << h.bits) * 4;
  } else if (layout != FW_PLAIN) {
    h.scales_per_tile = kTileRows * h.groups * (h.tied ? 1 : h.planes) * scale_bytes(s.scale_dtype);
    h.zeros_per_tile = kTileRows * h.groups * (h.has_offsets ? scale_bytes(s.scale_dtype) : h.has_zeros ? 1 : 0);
  }
  h.codes_at = round_up(sizeof(fw_operand), 64);
  h.scales_at = h.codes_at + round_up(h.tiles * h.codes_per_tile, 64);
  h.zeros_at = h.scales_at + round_up(h.tiles * h.scales_per_tile, 64);
  h.bytes = h.zeros_at + round_up(h.tiles * h.zeros_per_tile, 64) + 64;  // vectors may be read past the end
  h.weight_bytes = h.tiles * (h.codes_per_tile + h.scales_per_tile + h.zeros_per_tile);
  return true;
}

bool aligned_operand(const void* operand) { return operand && reinterpret_cast<uintptr_t>(operand) % 64 == 0; }

// ---- the C interface ----

int64_t fw_operand_bytes(const fw_code* source, int32_t layout) {
  fw_operand header;
  return source && make_header(*source, layout, header) && long_enough(*source) ? header.bytes : -1;
}

int32_t fw_operand_check(const void* operand, int64_t bytes) {
  if (!aligned_operand(operand) || bytes < static_cast<int64_t>(sizeof(fw_operand))) return FW_INVALID;
  const fw_operand& h = *static_cast<const fw_operand*>(operand);
  if (h.magic != kOperandMagic || h.version != kOperandVersion || h.bytes > bytes) return FW_INVALID;
  if (h.segments_per_group < 1 || h.segment < 1 || h.segments_per_group > kLargest / h.segment) return FW_INVALID;
  // The header must be the one that a source with these settings gets.
  fw_code s = {};
  s.kind = h.layout == FW_TABLES ? FW_CODEBOOK : h.layout == FW_PLAIN ? FW_DENSE : h.layout == FW_QUARTETS ? FW_SHERRY : FW_UNIFORM;
  if (h.layout == FW_TRITS || (h.layout == FW_FIELDS && (h.planes > 1 || h.tied))) s.kind = FW_TRIT_PLANES;
  s.planes = h.planes;
  s.bits = h.bits;
  s.tied = h.tied;
  std::copy(h.weights, h.weights + 3, s.weights);
  if (h.tied && h.layout == FW_FIELDS)  // how many planes were joined
    while (s.planes < 3 && h.weights[s.planes] > 0) ++s.planes;
  s.scale_dtype = h.scale_dtype;
  s.scale_exponent = h.scale_exponent;
  s.lane_stride = h.lane_stride;
  s.scale_rows = 1;
  s.rows = h.rows;
  s.cols = h.cols;
  s.segment = h.segment;
  s.group_size = h.layout == FW_PLAIN ? h.cols : h.segment * h.segments_per_group;
  s.codes = s.scales = operand;
  s.signs = static_cast<const uint8_t*>(operand);
  s.zero_points = h.has_zeros ? s.signs : nullptr;
  s.offsets = h.has_offsets ? operand : nullptr;
  fw_operand expected;
  if (!make_header(s, h.layout, expected)) return FW_INVALID;
  if (s.kind == FW_UNIFORM && !s.offsets) expected.offset = h.offset == 1 ? 1 : expected.offset;  // trits of a single plane
  return std::memcmp(&h, &expected, sizeof h) == 0 ? FW_OK : FW_INVALID;
}
