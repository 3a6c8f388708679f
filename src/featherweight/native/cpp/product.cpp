// The operators of product.h: choice of kernels, preparation of activations, products.
#include "product.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(FW_ARM)
#include "cpu_arm.h"
#endif
#if defined(FW_X86)
#include "cpu_x86.h"
#endif
#include "linear.h"
#include "packing.h"
#include "parallel.h"
#include "product_kernels.h"
#include "product_layout.h"
#include "product_input.h"

namespace {

// ---- instruction sets ----

bool supported(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return true;
#if defined(FW_X86)
  if (std::strcmp(name, "avx2") == 0) return x86_has_avx2();
  if (std::strcmp(name, "avx512") == 0) return x86_has_avx512() && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(name, "vbmi") == 0)
    return supported("avx512") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
#if defined(FW_AMX)
  if (std::strcmp(name, "amx") == 0) return supported("vbmi") && amx_allowed();
#endif
#if defined(FW_AVX512BF16)
  if (std::strcmp(name, "bf16") == 0) return supported("vbmi") && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(FW_AVXVNNI)
  if (std::strcmp(name, "avxvnni") == 0) {
    uint32_t a = 7, b = 0, c = 1, d = 0;
    asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return supported("avx2") && (a >> 4 & 1) != 0;
  }
#endif
#elif defined(FW_ARM_I8MM)
  return arm_supports(name);
#elif defined(FW_ARM)
  return std::strcmp(name, "i8mm") != 0 && arm_supports(name);
#endif
  return false;
}

}  // namespace

const ProductKernels* product_kernels_named(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    for (const char* better : {"amx", "bf16", "vbmi", "avx512", "avxvnni", "avx2", "i8mm", "neon"})
      if (const ProductKernels* found = product_kernels_named(better)) return found;
    return product_kernels_baseline();
  }
  if (!supported(name)) return nullptr;
#if defined(FW_X86)
#if defined(FW_AMX)
  if (std::strcmp(name, "amx") == 0) return product_kernels_amx();
#endif
#if defined(FW_AVX512BF16)
  if (std::strcmp(name, "bf16") == 0) return product_kernels_bf16();
#endif
  if (std::strcmp(name, "vbmi") == 0) return product_kernels_vbmi();
  if (std::strcmp(name, "avx512") == 0) return product_kernels_avx512();
#if defined(FW_AVXVNNI)
  if (std::strcmp(name, "avxvnni") == 0) return product_kernels_avxvnni();
#endif
  if (std::strcmp(name, "avx2") == 0) return product_kernels_avx2();
#elif defined(FW_ARM)
#if defined(FW_ARM_I8MM)
  if (std::strcmp(name, "i8mm") == 0) return product_kernels_i8mm();
#endif
  if (std::strcmp(name, "neon") == 0) return product_kernels_neon();
#endif
  return product_kernels_baseline();
}

namespace {

std::atomic<const ProductKernels*>& selected() {
  static std::atomic<const ProductKernels*> kernels{product_kernels_named("auto")};
  return kernels;
}

}  // namespace

const ProductKernels& product_kernels() { return *selected().load(std::memory_order_relaxed); }
void select_product_kernels(const ProductKernels* kernels) { selected().store(kernels); }

const char* fw_product_isa(void) { return product_kernels().name; }

// ---- inputs ----

namespace {

struct InputBytes {  // that an input of some tokens takes
  int64_t codes, scales, values;  // sums take as many as scales

  InputBytes(const InputShape& shape, int64_t tokens)
      : codes(shape.integer ? tokens * shape.columns : 0),
        scales(shape.integer ? tokens * shape.segments * 4 : 0),
        values(shape.integer ? 0 : tokens * shape.columns * 4) {}
};

}  // namespace

void InputBuffers::reserve(const InputShape& shape, int64_t tokens) {
  const auto grow = [](Memory& memory, int64_t& have, int64_t want) {
    if (want <= have) return;
    memory = allocate(want + 128);
    have = want;
  };
  const InputBytes bytes(shape, tokens);
  grow(codes_, codes_bytes_, bytes.codes);
  grow(scales_, scales_bytes_, bytes.scales);
  grow(sums_, sums_bytes_, bytes.scales);
  grow(values_, values_bytes_, bytes.values);
}

bool InputBuffers::holds(const InputShape& shape, int64_t tokens) const {
  const InputBytes bytes(shape, tokens);
  return codes_bytes_ >= bytes.codes && scales_bytes_ >= bytes.scales && sums_bytes_ >= bytes.scales &&
         values_bytes_ >= bytes.values;
}

InputShape input_shape(const fw_operand* operand, int precision) {
  const bool plain = operand->layout == FW_PLAIN, integer = !plain && operand->layout != FW_TABLES;
  const bool rounds = precision == FW_ACTIVATION_INT8;
  return {integer && rounds,
          plain,
          plain && rounds && operand->scale_dtype == FW_BFLOAT16,
          padded_columns(operand),
          operand->segments,
          operand->segment,
          operand->steps * 4,
          operand->lane_stride,
          operand->cols};
}

namespace {

// Where column c of an operand's activations comes from: lanes of a quartet that are apart in the matrix are neighbours here.
int64_t source_column(int64_t c, int64_t stride) {
  const int64_t span = 4 * stride, within = c % span;
  return c - within + within / 4 + within % 4 * stride;
}

}  // namespace

void prepare_input(const InputShape& shape, const float* x, int64_t token, int64_t tokens, InputBuffers& to, int64_t first,
                   int64_t last, float* spare) {
  const ProductKernels& kernels = product_kernels();
  if (shape.plain) return kernels.plain_input({shape.cols, shape.columns, shape.rounded}, x, token, tokens, to.values());
  for (int64_t g = first; g < last; ++g) {
    const float* from = x + g * shape.segment;
    int64_t count = std::min(shape.segment, shape.cols - g * shape.segment);
    if (shape.lane_stride > 1) {
      count = std::min(shape.padded, round_up(count, 4 * shape.lane_stride));
      for (int64_t c = 0; c < count; ++c) {
        const int64_t source = g * shape.segment + source_column(c, shape.lane_stride);
        spare[c] = source < shape.cols ? x[source] : 0.0F;
      }
      from = spare;
    }
    if (shape.integer) {
      int8_t* codes = to.codes() + token * shape.columns + g * shape.padded;
      kernels.quantize(from, count, codes, to.scales() + token * shape.segments + g, to.sums() + token * shape.segments + g);
      std::memset(codes + count, 0, static_cast<size_t>(shape.padded - count));
    } else {
      float* values = to.values() + token * shape.columns + g * shape.padded;
      std::memcpy(values, from, static_cast<size_t>(count) * sizeof(float));
      std::memset(values + count, 0, static_cast<size_t>(shape.padded - count) * sizeof(float));
    }
  }
}

void product_share(const fw_operand* operand, const InputShape& shape, const InputBuffers& input, int64_t tokens, int64_t first,
                   int64_t last, const Output& out, void* work) {
  if (first >= last) return;
  const ProductKernels& kernels = product_kernels();
  float* sums = nullptr;
  if (operand->has_offsets) {
    sums = reinterpret_cast<float*>(static_cast<uint8_t*>(work) + round_up(kernels.work_bytes(operand, tokens), 64));
    sum_groups(operand, shape, input, tokens, sums);
  }
  if (shape.integer) {
    const IntegerInput x = {input.codes(), input.scales(), input.sums(), tokens, shape.columns, shape.segments, sums};
    return kernels.integer_tiles(operand, x, first, last, out, work);
  }
  if (shape.plain) return kernels.plain_tiles(operand, {input.values(), tokens, shape.rounded}, first, last, out, work);
  const FloatInput x = {input.values(), tokens, shape.columns, sums};
  if (operand->layout == FW_TABLES) return kernels.float_rows(operand, x, first, last, out, work);
  kernels.float_tiles(operand, x, first, last, out, work);
}

int64_t product_work_bytes(const fw_operand* operand, int64_t tokens) {
  const int64_t bytes = product_kernels().work_bytes(operand, tokens), sums = tokens * operand->groups * 4;
  return operand->has_offsets ? round_up(bytes, 64) + sums : bytes;
}

namespace {

int32_t multiply(const fw_operand* operand, const InputShape& shape, const InputBuffers& input, int64_t tokens,
                 const Output& out, int threads) {
  const int64_t bytes = product_work_bytes(operand, tokens);
  std::vector<Memory> work;
  for (int i = 0; i < threads; ++i) work.push_back(allocate(bytes));
  run_team(threads, [&](Team& team) {
    const auto [first, last] = team.share(operand->tiles);
    product_share(operand, shape, input, tokens, first, last, out, work[static_cast<size_t>(team.index())].get());
  });
  return FW_OK;
}

}  // namespace

int32_t fw_product(const void* operand, int64_t bytes, const float* x, int64_t x_count, int64_t tokens, int64_t x_stride,
                   float* out, int64_t out_count, int64_t out_stride, int32_t precision, int32_t accumulate, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (fw_operand_check(operand, bytes) != FW_OK) return FW_INVALID;
    if (precision != FW_ACTIVATION_INT8 && precision != FW_ACTIVATION_FLOAT) return FW_INVALID;
    const fw_operand* op = static_cast<const fw_operand*>(operand);
    if (!holds_rows(x, x_count, tokens, x_stride, op->cols)) return FW_INVALID;
    if (!holds_rows(out, out_count, tokens, out_stride, op->rows)) return FW_INVALID;
    if (tokens == 0) return FW_OK;
    threads = fair_threads(threads);
    const InputShape shape = input_shape(op, precision);
    InputBuffers input;
    input.reserve(shape, tokens);
    const int preparing = tokens * op->cols < 1 << 16 ? 1 : threads;
    const Memory spare = allocate(shape.lane_stride > 1 ? preparing * shape.padded * 4 : 4);
    run_team(preparing, [&](Team& team) {
      const auto [first, last] = team.share(tokens);
      float* own = static_cast<float*>(spare.get()) + (shape.lane_stride > 1 ? team.index() * shape.padded : 0);
      for (int64_t t = first; t < last; ++t) prepare_input(shape, x + t * x_stride, t, tokens, input, 0, shape.segments, own);
    });
    return multiply(op, shape, input, tokens, {out, out_stride, accumulate}, threads);
  });
}

int32_t fw_product_int8(const void* operand, int64_t bytes, const int8_t* x, int64_t x_count, const float* scales,
                        int64_t scale_count, int64_t tokens, float* out, int64_t out_count, int64_t out_stride,
                        int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (fw_operand_check(operand, bytes) != FW_OK) return FW_INVALID;
    const fw_operand* op = static_cast<const fw_operand*>(operand);
    if (!holds_rows(x, x_count, tokens, op->cols, op->cols)) return FW_INVALID;
    if (!holds_rows(scales, scale_count, tokens, op->segments, op->segments)) return FW_INVALID;
    if (!holds_rows(out, out_count, tokens, out_stride, op->rows)) return FW_INVALID;
    if (tokens == 0) return FW_OK;
    const InputShape shape = input_shape(op, FW_ACTIVATION_INT8);
    if (!shape.integer) return FW_INVALID;
    InputBuffers input;
    input.reserve(shape, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t g = 0; g < shape.segments; ++g) {
        int8_t* codes = input.codes() + t * shape.columns + g * shape.padded;
        const int64_t begin = g * shape.segment, end = std::min(shape.cols, begin + shape.segment);
        int32_t sum = 0;
        for (int64_t c = 0; c < shape.padded; ++c) {
          const int64_t source = begin + (shape.lane_stride > 1 ? source_column(c, shape.lane_stride) : c);
          codes[c] = source < end && (shape.lane_stride > 1 || c < end - begin) ? x[t * shape.cols + source] : int8_t{0};
          sum += codes[c];
        }
        input.scales()[t * shape.segments + g] = scales[t * shape.segments + g];
        input.sums()[t * shape.segments + g] = sum;
      }
    return multiply(op, shape, input, tokens, {out, out_stride, 0}, fair_threads(threads));
  });
}

namespace {

float stored_value(const uint8_t* from, const fw_operand& h, int64_t index) {
  if (h.scale_dtype == FW_LOG8) return log8_value(from[index], h.scale_exponent);
  if (h.scale_dtype == FW_FLOAT32) {
    float value;
    std::memcpy(&value, from + 4 * index, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from + 2 * index, sizeof half);
  return h.scale_dtype == FW_FLOAT16 ? float_from_half(half) : float_from_bfloat16(half);
}

// Code `column` of a row's units of 16-byte vectors.
int table_code(const uint8_t* row, int bits, int64_t column) {
  const int unit = unit_steps(bits), step = static_cast<int>(column / 16 % unit), lane = static_cast<int>(column % 16);
  const uint8_t* from = row + column / (16 * unit) * (unit * 2 * bits) + lane;
  const FieldParts parts = field_parts(bits);
  int code = 0;
  for (int i = 0; i < parts.count; ++i) {
    const FieldPart& part = parts.part[i];
    if (part.step == step) code |= (from[16 * part.vector] >> part.to & ((1 << part.count) - 1)) << part.from;
  }
  return code;
}

void column_rows(const fw_operand& h, int64_t first, int64_t last, float* out) {
  const int64_t stride = h.codes_per_tile / kTileRows, padded = h.steps * 4;
  for (int64_t row = first; row < last; ++row)
    for (int64_t c = 0; c < h.cols; ++c, ++out) {
      const uint8_t* from = tile_codes(&h, 0) + row * stride;
      if (h.layout == FW_PLAIN) {
        *out = stored_value(tile_codes(&h, row / kTileRows), h, plain_index(h.scale_dtype, row % kTileRows, c));
        continue;
      }
      const int64_t segment = c / h.segment, table = row * h.groups + segment / h.segments_per_group;
      const int code = table_code(from, h.bits, segment * padded + c % h.segment);
      std::memcpy(out, tile_scales(&h, 0) + 4 * ((table << h.bits) + code), sizeof(float));
    }
}

void lane_rows(const fw_operand& h, int64_t first, int64_t last, float* out) {
  const int planes = h.tied ? 1 : h.planes;
  const Memory codes = allocate(h.segments * h.steps * kStepBytes);
  for (int64_t tile = first / kTileRows; tile * kTileRows < last; ++tile)
    for (int plane = 0; plane < planes; ++plane) {
      uint8_t* unpacked = static_cast<uint8_t*>(codes.get());
      product_kernels().unpack(&h, tile, plane, unpacked);
      for (int64_t row = std::max(first, tile * kTileRows); row < std::min(last, (tile + 1) * kTileRows); ++row) {
        float* to = out + (row - first) * h.cols;
        const int64_t lane = row % kTileRows;
        for (int64_t segment = 0; segment < h.segments; ++segment) {
          const int64_t group = segment / h.segments_per_group;
          const float scale = stored_value(tile_scales(&h, tile), h, (group * planes + plane) * kTileRows + lane);
          const float offset = h.has_offsets ? stored_value(tile_zeros(&h, tile), h, group * kTileRows + lane) : 0.0F;
          const int zero = h.has_zeros ? tile_zeros(&h, tile)[group * kTileRows + lane] : h.offset;
          for (int64_t c = 0; c < h.steps * 4; ++c) {
            const int64_t column = segment * h.segment + (h.lane_stride > 1 ? source_column(c, h.lane_stride) : c);
            if (column >= std::min(h.cols, (segment + 1) * h.segment) || (h.lane_stride == 1 && c >= h.segment)) continue;
            const int code = unpacked[(segment * h.steps + c / 4) * kStepBytes + 4 * lane + c % 4];
            const float value = scale * static_cast<float>(code - zero);
            to[column] = h.has_offsets ? value + offset : plane == 0 ? value : to[column] + value;
          }
        }
      }
    }
}

}  // namespace

void operand_rows(const fw_operand* operand, int64_t first, int64_t last, float* out) {
  if (operand->layout == FW_PLAIN || operand->layout == FW_TABLES)
    column_rows(*operand, first, last, out);
  else
    lane_rows(*operand, first, last, out);
}

int32_t fw_operand_rows(const void* operand, int64_t bytes, int64_t first, int64_t last, float* out, int64_t out_count) {
  return guarded_call([&]() -> int32_t {
    if (fw_operand_check(operand, bytes) != FW_OK) return FW_INVALID;
    const fw_operand* op = static_cast<const fw_operand*>(operand);
    if (first < 0 || last > op->rows || first > last) return FW_INVALID;
    if (!holds_rows(out, out_count, last - first, op->cols, op->cols)) return FW_INVALID;
    operand_rows(op, first, last, out);
    return FW_OK;
  });
}

// ---- steps ----

void apply_step(const fw_step& step, const float* x, int64_t cols, float* out) {
  switch (step.kind) {
    case FW_PERMUTE:
      for (int64_t c = 0; c < cols; ++c) out[c] = x[step.order[c]];
      return;
    case FW_SCALE:
      for (int64_t c = 0; c < cols; ++c) out[c] = x[c] * step.values[c];
      return;
    case FW_HADAMARD:
      std::memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
      return product_kernels().hadamard(out, step.values, step.block, cols);
    default: {
      const float limit = static_cast<float>((1 << (step.bits - 1)) - 1);
      for (int64_t first = 0; first < cols; first += step.block) {
        const int64_t last = std::min(cols, first + step.block);
        float largest = 0.0F;
        for (int64_t c = first; c < last; ++c)
          if (!(std::fabs(x[c]) <= largest)) largest = std::fabs(x[c]);
        float size = std::min(std::max(largest / limit, 1e-5F), 1e4F);
        size = float_from_half(half_from_float(size));
        for (int64_t c = first; c < last; ++c)
          out[c] = size * std::min(std::max(std::nearbyint(x[c] / size), -limit - 1.0F), limit);
      }
    }
  }
}

int32_t fw_apply_step(const fw_step* step, const float* x, int64_t tokens, int64_t cols, float* out, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!step || !x || !out || !fair_size(tokens, cols) || !valid_step(*step, cols)) return FW_INVALID;
    run_team(tokens * cols < 1 << 15 ? 1 : fair_threads(threads), [&](Team& team) {
      const auto [first, last] = team.share(tokens);
      for (int64_t t = first; t < last; ++t) apply_step(*step, x + t * cols, cols, out + t * cols);
    });
    return FW_OK;
  });
}

int32_t fw_quantize(const float* x, int64_t tokens, int64_t cols, int64_t segment, const fw_step* hadamard, int8_t* codes,
                    float* scales, int32_t* sums, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!x || !codes || !scales || !sums || cols < 1 || segment < 1 || !fair_size(tokens, cols)) return FW_INVALID;
    if (hadamard && (hadamard->kind != FW_HADAMARD || !valid_step(*hadamard, cols))) return FW_INVALID;
    segment = std::min(segment, cols);
    const int64_t segments = divide_up(cols, segment);
    // Whole blocks that end where segments end are done while they are in the first cache.
    const int64_t block = hadamard ? hadamard->block : 1;
    const int64_t run = hadamard && cols % segment == 0 && (segment % block == 0 || block % segment == 0)
                            ? std::max(segment, block)
                            : hadamard ? cols : segment;
    const int members = tokens * cols < 1 << 15 ? 1 : fair_threads(threads);
    const int64_t each = round_up(hadamard ? run : 0, 16);
    const Memory rotated = allocate(members * each * 4 + 64);
    run_team(members, [&](Team& team) {
      float* space = static_cast<float*>(rotated.get()) + team.index() * each;
      const auto [begin, end] = team.share(tokens);
      for (int64_t t = begin; t < end; ++t)
        for (int64_t first = 0; first < cols; first += run) {
          const int64_t last = std::min(cols, first + run);
          const float* from = x + t * cols + first;
          if (hadamard) {
            std::memcpy(space, from, static_cast<size_t>(last - first) * sizeof(float));
            product_kernels().hadamard(space, hadamard->values ? hadamard->values + first : nullptr, block, last - first);
            from = space;
          }
          for (int64_t c = first; c < last; c += segment)
            product_kernels().quantize(from + (c - first), std::min(segment, last - c), codes + t * cols + c,
                                       scales + t * segments + c / segment, sums + t * segments + c / segment);
        }
    });
    return FW_OK;
  });
}
