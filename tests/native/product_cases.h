// Matrices for product_test.cpp: a source in stored form beside what it stands for, written down from the formats and not
// from the layouts of operands.
#ifndef FEATHERWEIGHT_TESTS_PRODUCT_CASES_H
#define FEATHERWEIGHT_TESTS_PRODUCT_CASES_H

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "featherweight.h"
#include "packing.h"
#include "product.h"
#include "product_layout.h"

enum class Fill { kRandom, kLow, kHigh };

struct Matrix {
  std::string name;
  fw_code source = {};
  std::vector<int32_t> layouts;       // that the source may be packed to
  int planes = 1;                     // of levels and scales; tied planes count as one
  int64_t groups = 1;
  std::vector<int32_t> levels;        // [planes][rows][cols], without their scale
  std::vector<float> scales;          // [rows][groups][planes]
  std::vector<float> offsets;         // [rows][groups], or none
  std::vector<float> values;          // codebooks and dense matrices: [rows][cols]
  std::vector<uint8_t> codes, zeros, signs, stored_scales, stored_offsets;

  int32_t level(int plane, int64_t row, int64_t col) const {
    return levels[static_cast<size_t>((plane * source.rows + row) * source.cols + col)];
  }
  float scale(int64_t row, int64_t col, int plane) const {
    const int64_t group = std::min(col / source.group_size, groups - 1);
    return scales[static_cast<size_t>((row * groups + group) * planes + plane)];
  }
  float offset(int64_t row, int64_t col) const {
    const int64_t group = std::min(col / source.group_size, groups - 1);
    return offsets.empty() ? 0.0F : offsets[static_cast<size_t>(row * groups + group)];
  }
  float value(int64_t row, int64_t col) const {  // as fw_operand_rows gives it
    if (!values.empty()) return values[static_cast<size_t>(row * source.cols + col)];
    float sum = 0.0F;
    for (int k = 0; k < planes; ++k) {
      const float term = scale(row, col, k) * static_cast<float>(level(k, row, col));
      sum = k == 0 ? term : sum + term;
    }
    return offsets.empty() ? sum : sum + offset(row, col);
  }
  void finish() {  // the vectors have their final places
    source.codes = codes.data();
    source.scales = stored_scales.data();
    source.zero_points = zeros.empty() ? nullptr : zeros.data();
    source.signs = signs.data();
    source.offsets = stored_offsets.empty() ? nullptr : stored_offsets.data();
    source.offset_bytes = static_cast<int64_t>(stored_offsets.size());
    source.codes_bytes = static_cast<int64_t>(codes.size());
    source.scales_bytes = static_cast<int64_t>(stored_scales.size());
    source.zero_bytes = static_cast<int64_t>(zeros.size());
    source.sign_bytes = static_cast<int64_t>(signs.size());
  }
};

class Maker {
 public:
  explicit Maker(Random& random) : random_(random) {}

  Matrix trits(int64_t rows, int64_t cols, int64_t group, int planes, int packing, const std::vector<int>& weights,
               int32_t dtype, Fill fill) {
    Matrix m = start(FW_TRIT_PLANES, rows, cols, group, "trits");
    m.layouts = {FW_FIELDS, FW_TRITS};
    m.source.planes = planes;
    m.source.packing = packing;
    m.source.tied = !weights.empty();
    for (size_t k = 0; k < weights.size(); ++k) m.source.weights[k] = weights[k];
    m.planes = m.source.tied ? 1 : planes;
    m.source.plane_bytes = (rows * cols + (packing == FW_BASE3 ? 4 : 3)) / (packing == FW_BASE3 ? 5 : 4);
    m.codes.resize(static_cast<size_t>(m.source.plane_bytes * planes));
    m.levels.assign(static_cast<size_t>(rows * cols * m.planes), 0);
    std::vector<int8_t> plane(static_cast<size_t>(rows * cols));
    for (int k = 0; k < planes; ++k) {
      for (int8_t& t : plane) t = static_cast<int8_t>(pick(3, fill) - 1);
      fw_pack_trits(plane.data(), rows * cols, packing, m.codes.data() + k * m.source.plane_bytes);
      for (size_t i = 0; i < plane.size(); ++i)
        m.levels[i + (m.source.tied ? 0 : plane.size() * static_cast<size_t>(k))] +=
            plane[i] * (m.source.tied ? weights[static_cast<size_t>(k)] : 1);
    }
    m.name += " planes " + std::to_string(planes) + " weights";
    for (int w : weights) m.name += " " + std::to_string(w);
    return with_scales(std::move(m), dtype);
  }

  Matrix uniform(int64_t rows, int64_t cols, int64_t group, int bits, bool zero_points, int32_t dtype, Fill fill) {
    Matrix m = start(FW_UNIFORM, rows, cols, group, "uniform");
    m.layouts = {FW_FIELDS};
    m.source.bits = bits;
    const std::vector<uint8_t> values = picked(rows * cols, 1 << bits, fill);
    m.codes = bit_string(values, bits);
    std::vector<uint8_t> zeros(static_cast<size_t>(rows * m.groups), static_cast<uint8_t>(1 << (bits - 1)));
    if (zero_points) {  // the farthest from the codes if those are the extremes
      zeros = picked(rows * m.groups, 1 << bits, fill == Fill::kLow ? Fill::kHigh : fill == Fill::kHigh ? Fill::kLow : fill);
      m.zeros = bit_string(zeros, bits);
    }
    for (int64_t i = 0; i < rows * cols; ++i) {
      const int64_t at = i / cols * m.groups + i % cols / m.source.group_size;
      m.levels.push_back(values[static_cast<size_t>(i)] - zeros[static_cast<size_t>(at)]);
    }
    m.name += " bits " + std::to_string(bits) + (zero_points ? " zero points" : "");
    return with_scales(std::move(m), dtype);
  }

  // Codes from 0, and floats of the scales' type in the place of zero points.
  Matrix uniform_with_offsets(int64_t rows, int64_t cols, int64_t group, int bits, int32_t dtype, Fill fill) {
    Matrix m = start(FW_UNIFORM, rows, cols, group, "uniform");
    m.layouts = {FW_FIELDS};
    m.source.bits = bits;
    const std::vector<uint8_t> values = picked(rows * cols, 1 << bits, fill);
    m.codes = bit_string(values, bits);
    m.levels.assign(values.begin(), values.end());
    m.name += " bits " + std::to_string(bits) + " offsets";
    m.scales = stored(m, dtype, rows * m.groups, m.stored_scales);
    m.offsets = stored(m, dtype, rows * m.groups, m.stored_offsets);
    m.finish();
    return m;
  }

  // A pattern has the place of the zero in its upper two bits, then which of the later two signs differ from the first.
  Matrix sherry(int64_t rows, int64_t cols, int64_t group, int stride, int32_t dtype, Fill fill) {
    Matrix m = start(FW_SHERRY, rows, cols, group, "sherry");
    m.layouts = {FW_FIELDS, FW_QUARTETS};
    m.source.lane_stride = stride;
    const int64_t span = 4 * stride, quartets = (cols + span - 1) / span * stride;
    m.codes.assign(static_cast<size_t>((rows * quartets + 1) / 2), 0);
    m.signs.assign(static_cast<size_t>((rows * quartets + 7) / 8), 0);
    m.levels.assign(static_cast<size_t>(rows * cols), 99);
    for (int64_t i = 0; i < rows * quartets; ++i) {
      const int pattern = fill == Fill::kRandom ? random_.below(16) : 0, sign = pick(2, fill) ? 0 : 1;
      m.codes[static_cast<size_t>(i / 2)] |= static_cast<uint8_t>(pattern << (4 * (i % 2)));
      m.signs[static_cast<size_t>(i / 8)] |= static_cast<uint8_t>(sign << (i % 8));
      const int64_t q = i % quartets;
      int kept = 0;
      for (int lane = 0; lane < 4; ++lane) {
        int trit = 0;
        if (lane != pattern / 4) {
          trit = sign ? -1 : 1;
          if (kept == 1 && pattern % 2) trit = -trit;
          if (kept == 2 && pattern / 2 % 2) trit = -trit;
          ++kept;
        }
        const int64_t col = q / stride * span + lane * stride + q % stride;
        if (col < cols) m.levels[static_cast<size_t>(i / quartets * cols + col)] = trit;
      }
    }
    m.name += " stride " + std::to_string(stride);
    return with_scales(std::move(m), dtype);
  }

  Matrix codebook(int64_t rows, int64_t cols, int64_t group, int bits, int32_t dtype) {
    Matrix m = start(FW_CODEBOOK, rows, cols, group, "codebook");
    m.layouts = {FW_TABLES};
    m.source.bits = bits;
    const std::vector<uint8_t> indices = picked(rows * cols, 1 << bits, Fill::kRandom);
    m.codes = bit_string(indices, bits);
    const std::vector<float> entries = stored(m, dtype, (rows * m.groups) << bits, m.stored_scales);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const int64_t table = i / cols * m.groups + i % cols / m.source.group_size;
      m.values.push_back(entries[static_cast<size_t>((table << bits) + indices[static_cast<size_t>(i)])]);
    }
    m.name += " bits " + std::to_string(bits);
    m.finish();
    return m;
  }

  Matrix dense(int64_t rows, int64_t cols, int32_t dtype) {
    Matrix m = start(FW_DENSE, rows, cols, cols, "dense");
    m.layouts = {FW_PLAIN};
    m.values = stored(m, dtype, rows * cols, m.codes);
    m.finish();
    return m;
  }

 private:
  static Matrix start(int32_t kind, int64_t rows, int64_t cols, int64_t group, const char* name) {
    Matrix m;
    m.source.kind = kind;
    m.source.rows = rows;
    m.source.cols = cols;
    m.source.group_size = group;
    m.source.scale_rows = 1;
    m.source.lane_stride = 1;
    m.groups = (cols + group - 1) / group;
    m.name = std::string(name) + " " + std::to_string(rows) + "x" + std::to_string(cols) + " group " + std::to_string(group);
    return m;
  }

  int pick(int levels, Fill fill) {
    return fill == Fill::kLow ? 0 : fill == Fill::kHigh ? levels - 1 : random_.below(levels);
  }
  std::vector<uint8_t> picked(int64_t count, int levels, Fill fill) {
    std::vector<uint8_t> values(static_cast<size_t>(count));
    for (uint8_t& v : values) v = static_cast<uint8_t>(pick(levels, fill));
    return values;
  }
  static std::vector<uint8_t> bit_string(const std::vector<uint8_t>& values, int bits) {
    std::vector<uint8_t> packed((values.size() * static_cast<size_t>(bits) + 7) / 8);
    fw_pack_bits(values.data(), static_cast<int64_t>(values.size()), bits, packed.data());
    return packed;
  }

  // `count` random numbers in their stored form, and as floats.
  std::vector<float> stored(Matrix& m, int32_t dtype, int64_t count, std::vector<uint8_t>& bytes) {
    m.source.scale_dtype = dtype;
    m.source.scale_exponent = -3;
    m.name += " dtype " + std::to_string(dtype);
    bytes.resize(static_cast<size_t>(count * scale_bytes(dtype)));
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == FW_LOG8) {
        const int code = random_.below(8) == 0 ? 255 : random_.below(255);
        bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(code);
        values.push_back(code == 255 ? 0.0F : std::ldexp(kLog8Fractions[code % 32], -3 - code / 32));
      } else if (dtype == FW_FLOAT32) {
        const float value = random_.symmetric();
        std::memcpy(bytes.data() + 4 * i, &value, 4);
        values.push_back(value);
      } else {
        // All halves that are numbers, the subnormal ones among them; of bfloat16 those near 1.
        uint16_t half = static_cast<uint16_t>(random_.bits());
        if (dtype == FW_FLOAT16) half = static_cast<uint16_t>(half & (random_.below(4) ? 0xbbffU : 0x83ffU));
        else half = static_cast<uint16_t>((half & 0x81ffU) | 0x3e00U);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
        values.push_back(dtype == FW_FLOAT16 ? half_value(half) : bfloat_value(half));
      }
    }
    return values;
  }

  static float half_value(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double magnitude = exponent ? std::ldexp(1024.0 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return static_cast<float>(half & 0x8000 ? -magnitude : magnitude);
  }
  static float bfloat_value(uint16_t half) {
    const double magnitude = std::ldexp(128.0 + (half & 127), (half >> 7 & 255) - 134);
    return static_cast<float>(half & 0x8000 ? -magnitude : magnitude);
  }

  Matrix with_scales(Matrix m, int32_t dtype) {
    // With one group a row there may also be one scale for the whole matrix.
    m.source.scale_rows = m.groups == 1 && random_.below(3) == 0 ? m.source.rows : 1;
    const int64_t rows = m.source.rows / m.source.scale_rows;
    const std::vector<float> found = stored(m, dtype, rows * m.groups * m.planes, m.stored_scales);
    for (int64_t row = 0; row < m.source.rows; ++row) {
      const float* of_row = found.data() + row / m.source.scale_rows * m.groups * m.planes;
      m.scales.insert(m.scales.end(), of_row, of_row + m.groups * m.planes);
    }
    m.finish();
    return m;
  }

  Random& random_;
};

#endif
