// The operators of product.h: choice of kernels, preparation of activations, products, measurements.
#include "product.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(FW_ARM)
#include "cpu_arm.h"
#endif
#if defined(FW_X86)
#include "cpu_x86.h"
#endif
#include "packing.h"
#include "parallel.h"
#include "product_kernels.h"
#include "product_layout.h"
#include "product_input.h"
#include "team.h"

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

void InputBuffers::reserve(const InputShape& shape, int64_t tokens) {
  const auto grow = [](Memory& memory, int64_t& have, int64_t want) {
    if (want <= have) return;
    memory = allocate(want + 128);
    have = want;
  };
  if (shape.integer) {
    grow(codes_, codes_bytes_, tokens * shape.columns);
    grow(scales_, scales_bytes_, tokens * shape.segments * 4);
    grow(sums_, sums_bytes_, tokens * shape.segments * 4);
  } else {
    grow(values_, values_bytes_, tokens * shape.columns * 4);
  }
}

InputShape input_shape(const fw_operand* operand, int precision) {
  const bool plain = operand->layout == FW_PLAIN, integer = !plain && operand->layout != FW_TABLES;
  const bool rounds = precision == FW_ACTIVATION_INT8;
  return {integer && rounds, plain, plain && rounds && operand->scale_dtype == FW_BFLOAT16, padded_columns(operand), operand->segments, operand->segment,
          operand->steps * 4, operand->lane_stride, operand->cols};
}

namespace {

// Where column c of an operand's activations comes from: lanes of a quartet that are apart in the matrix are neighbours here.
int64_t source_column(int64_t c, int64_t stride) {
  const int64_t span = 4 * stride, within = c % span;
  return c - within + within / 4 + within % 4 * stride;
}

}  // namespace

void prepare_input(const InputShape& shape, const float* x, int64_t token, int64_t tokens, InputBuffers& to, int64_t first,
                   int64_t last) {
  const ProductKernels& kernels = product_kernels();
  if (shape.plain) return kernels.plain_input({shape.cols, shape.columns, shape.rounded}, x, token, tokens, to.values());
  std::vector<float> permuted(shape.lane_stride > 1 ? static_cast<size_t>(shape.padded) : 0);
  for (int64_t g = first; g < last; ++g) {
    const float* from = x + g * shape.segment;
    int64_t count = std::min(shape.segment, shape.cols - g * shape.segment);
    if (shape.lane_stride > 1) {
      count = std::min(shape.padded, round_up(count, 4 * shape.lane_stride));
      for (int64_t c = 0; c < count; ++c) {
        const int64_t source = g * shape.segment + source_column(c, shape.lane_stride);
        permuted[static_cast<size_t>(c)] = source < shape.cols ? x[source] : 0.0F;
      }
      from = permuted.data();
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
  if (shape.integer) {
    const IntegerInput x = {input.codes(), input.scales(), input.sums(), tokens, shape.columns, shape.segments};
    return kernels.integer_tiles(operand, x, first, last, out, work);
  }
  if (shape.plain) return kernels.plain_tiles(operand, {input.values(), tokens, shape.rounded}, first, last, out, work);
  const FloatInput x = {input.values(), tokens, shape.columns};
  if (operand->layout == FW_TABLES) return kernels.float_rows(operand, x, first, last, out, work);
  kernels.float_tiles(operand, x, first, last, out, work);
}

int64_t product_work_bytes(const fw_operand* operand, int64_t tokens) { return product_kernels().work_bytes(operand, tokens); }

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

int32_t fw_product(const void* operand, const float* x, int64_t tokens, int64_t x_stride, float* out, int64_t out_stride,
                   int32_t precision, int32_t accumulate, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    const fw_operand* op = static_cast<const fw_operand*>(operand);
    if (!op || op->magic != kOperandMagic || !x || !out || tokens < 0) return FW_INVALID;
    threads = std::max(1, threads);
    const InputShape shape = input_shape(op, precision);
    InputBuffers input;
    input.reserve(shape, tokens);
    run_team(tokens * op->cols < 1 << 16 ? 1 : threads, [&](Team& team) {
      const auto [first, last] = team.share(tokens);
      for (int64_t t = first; t < last; ++t) prepare_input(shape, x + t * x_stride, t, tokens, input, 0, shape.segments);
    });
    return multiply(op, shape, input, tokens, {out, out_stride, accumulate}, threads);
  });
}

int32_t fw_product_int8(const void* operand, const int8_t* x, const float* scales, int64_t tokens, float* out, int64_t out_stride,
                        int32_t threads) {
  return guarded_call([&]() -> int32_t {
    const fw_operand* op = static_cast<const fw_operand*>(operand);
    if (!op || op->magic != kOperandMagic || !x || !scales || !out || tokens < 0) return FW_INVALID;
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
    return multiply(op, shape, input, tokens, {out, out_stride, 0}, std::max(1, threads));
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
  if (bits == 8) return *from;
  int code = 0;
  if (bits & 4) {
    code = from[16 * (step / 2)] >> (4 * (step % 2)) & 15;
    from += 16 * (unit / 2);
  }
  if (bits & 2) {
    code |= (from[16 * (step / 4)] >> (2 * (step % 4)) & 3) << (bits & 4);
    from += 16 * (unit / 4);
  }
  if (bits & 1) code |= (*from >> step & 1) << (bits & 6);
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
          const int zero = h.has_zeros ? tile_zeros(&h, tile)[group * kTileRows + lane] : h.offset;
          for (int64_t c = 0; c < h.steps * 4; ++c) {
            const int64_t column = segment * h.segment + (h.lane_stride > 1 ? source_column(c, h.lane_stride) : c);
            if (column >= std::min(h.cols, (segment + 1) * h.segment) || (h.lane_stride == 1 && c >= h.segment)) continue;
            const int code = unpacked[(segment * h.steps + c / 4) * kStepBytes + 4 * lane + c % 4];
            const float value = scale * static_cast<float>(code - zero);
            to[column] = plane == 0 ? value : to[column] + value;
          }
        }
      }
    }
}

}  // namespace

int32_t fw_operand_rows(const void* operand, int64_t first, int64_t last, float* out) {
  return guarded_call([&]() -> int32_t {
    const fw_operand* h = static_cast<const fw_operand*>(operand);
    if (!h || h->magic != kOperandMagic || !out || first < 0 || last > h->rows || first > last) return FW_INVALID;
    if (h->layout == FW_PLAIN || h->layout == FW_TABLES)
      column_rows(*h, first, last, out);
    else
      lane_rows(*h, first, last, out);
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
    if (!step || !x || !out || step->kind < FW_PERMUTE || step->kind > FW_ROUND || tokens < 0) return FW_INVALID;
    if (step->kind == FW_HADAMARD && (step->block < 1 || cols % step->block != 0)) return FW_INVALID;
    if (step->kind == FW_ROUND && (step->block < 1 || step->bits < 2 || step->bits > 16)) return FW_INVALID;
    run_team(tokens * cols < 1 << 15 ? 1 : threads, [&](Team& team) {
      const auto [first, last] = team.share(tokens);
      for (int64_t t = first; t < last; ++t) apply_step(*step, x + t * cols, cols, out + t * cols);
    });
    return FW_OK;
  });
}

int32_t fw_quantize(const float* x, int64_t tokens, int64_t cols, int64_t segment, const fw_step* hadamard, int8_t* codes,
                    float* scales, int32_t* sums, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!x || !codes || !scales || !sums || segment < 1 || tokens < 0) return FW_INVALID;
    if (hadamard && (hadamard->kind != FW_HADAMARD || hadamard->block < 1 || cols % hadamard->block != 0)) return FW_INVALID;
    const int64_t segments = divide_up(cols, segment);
    // Whole blocks that end where segments end are done while they are in the first cache.
    const int64_t block = hadamard ? hadamard->block : 1;
    const int64_t run = hadamard && cols % segment == 0 && (segment % block == 0 || block % segment == 0)
                            ? std::max(segment, block)
                            : hadamard ? cols : segment;
    run_team(tokens * cols < 1 << 15 ? 1 : threads, [&](Team& team) {
      std::vector<float> rotated(static_cast<size_t>(hadamard ? run + 16 : 0));
      float* space = rotated.empty() ? nullptr : rotated.data();
      while (reinterpret_cast<uintptr_t>(space) % 64) ++space;
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

// ---- measurements ----

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

typedef int64_t Wide __attribute__((vector_size(64)));

// Sums `bytes` bytes as `Streams` streams side by side.
template <int Streams>
int64_t read_all(const char* from, int64_t bytes) {
  const int64_t stretch = bytes / Streams / 256 * 256;
  Wide sum[Streams] = {};
  for (int64_t at = 0; at < stretch; at += 64)
    for (int s = 0; s < Streams; ++s) {
      const char* place = from + s * stretch + at;
      __builtin_prefetch(place + 1024);
      Wide value;
      std::memcpy(&value, place, sizeof value);
      sum[s] += value;
    }
  int64_t all = 0;
  for (int s = 0; s < Streams; ++s)
    for (int i = 0; i < 8; ++i) all += sum[s][i];
  return all;
}

}  // namespace

double fw_read_bandwidth(int64_t bytes, int32_t repeats, int32_t threads) {
  double best = 0.0;
  guarded_call([&]() -> int32_t {
    const Memory memory = allocate(bytes);
    char* data = static_cast<char*>(memory.get());
    advise_huge(data, bytes);
    std::atomic<int64_t> sink{0};
    run_team(threads, [&](Team& team) {
      const auto [first, last] = team.share(bytes, 4096);
      std::memset(data + first, 1, static_cast<size_t>(last - first));
    });
    for (int round = 0; round < 3 * repeats; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      run_team(threads, [&](Team& team) {
        const auto [first, last] = team.share(bytes, 4096);
        const int64_t length = last - first;
        sink += round % 3 == 0   ? read_all<1>(data + first, length)
                : round % 3 == 1 ? read_all<2>(data + first, length)
                                 : read_all<4>(data + first, length);
      });
      best = std::max(best, static_cast<double>(bytes) / seconds_since(begin));
    }
    return FW_OK;
  });
  return best;
}

namespace {

double peak(int64_t (*spin)(int64_t rounds), int32_t threads) {
  double best = 0.0;
  guarded_call([&]() -> int32_t {
    for (int round = 0; round < 5; ++round) {
      std::atomic<int64_t> work{0};
      const auto begin = std::chrono::steady_clock::now();
      run_team(threads, [&](Team&) { work += spin(1 << 20); });
      best = std::max(best, static_cast<double>(work.load()) / seconds_since(begin));
    }
    return FW_OK;
  });
  return best;
}

}  // namespace

double fw_int8_peak(int32_t threads) { return peak(product_kernels().spin, threads); }
double fw_bf16_peak(int32_t threads) { return peak(product_kernels().plain_spin, threads); }
