#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(FW_X86)
#include "cpu_x86.h"
#endif
#include "featherweight.h"
#include "kernels.h"
#include "packing.h"
#include "parallel.h"
#include "product_kernels.h"

namespace {

// ---- instruction sets ----

bool supported(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return true;
#if defined(FW_X86)
  if (std::strcmp(name, "avx2") == 0) return x86_has_avx2();
  if (std::strcmp(name, "avx512") == 0) return x86_has_avx512();
#endif
  return false;
}

const Kernels* kernels_named(const char* name) {
  if (!supported(name)) return nullptr;
#if defined(FW_X86)
  if (std::strcmp(name, "avx512") == 0) return kernels_avx512();
  if (std::strcmp(name, "avx2") == 0) return kernels_avx2();
#endif
  return kernels_baseline();
}

const Kernels* best_kernels() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = kernels_named(name)) return found;
  return kernels_baseline();
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

const Kernels& kernels() { return *selected().load(); }

}  // namespace

// Sorted groups of a tile are meant to stay in a second-level cache; larger groups come in smaller tiles.
int64_t tile_groups(int64_t n) { return n <= 128 ? 256 : std::max<int64_t>(16, 256 * 128 / n / 16 * 16); }

int64_t tile_bytes(int64_t n) {
  int64_t padded = 16;
  while (padded < n) padded *= 2;
  const int64_t groups = tile_groups(n);
  return groups * ((padded + padded / 16) * 4 + (n + 1) * 8) + padded * 16 * 4 + n * 8 + trit_group_bytes(n);
}

namespace {

// ---- trit-planes of a matrix ----

int64_t element_bytes(int32_t dtype) { return dtype == FW_FLOAT64 ? 8 : dtype == FW_FLOAT32 ? 4 : 2; }

struct Matrix {
  const unsigned char* data;
  int32_t dtype;
  int64_t rows, cols, stride;

  const unsigned char* at(int64_t row, int64_t col) const { return data + (row * stride + col) * element_bytes(dtype); }

  double value(int64_t row, int64_t col) const {
    const unsigned char* place = at(row, col);
    if (dtype == FW_FLOAT64) return read<double>(place);
    if (dtype == FW_FLOAT32) return static_cast<double>(read<float>(place));
    const uint16_t bits = read<uint16_t>(place);
    return static_cast<double>(dtype == FW_BFLOAT16 ? float_from_bfloat16(bits) : float_from_half(bits));
  }

  template <typename T>
  static T read(const unsigned char* place) {
    T value;
    std::memcpy(&value, place, sizeof value);
    return value;
  }
};

// Groups of one length: those that fill `size` columns, or the shorter last ones.
struct Kind {
  int64_t first_col, per_row, length;
};

struct Problem {
  Matrix weight;
  TritJob job;
  int64_t group_size, groups_per_row;
  uint8_t* codes;
  double* scales;
  uint8_t* steps;
  bool again;

  int64_t scales_per_group() const { return job.tied ? 1 : job.planes; }

  std::vector<Kind> kinds() const {
    const int64_t full = weight.cols / group_size, rest = weight.cols % group_size;
    std::vector<Kind> kinds;
    if (full > 0) kinds.push_back({0, full, group_size});
    if (rest > 0) kinds.push_back({full * group_size, 1, rest});
    return kinds;
  }
};

struct GroupPlace {
  int64_t row, col, index;
};

GroupPlace place_of(const Problem& problem, const Kind& kind, int64_t group) {
  const int64_t row = group / kind.per_row, inside = group % kind.per_row;
  const int64_t col = kind.first_col + inside * kind.length;
  return {row, col, row * problem.groups_per_row + col / problem.group_size};
}

// One thread's work space and its part of the result.
struct Worker {
  Memory work, values;
  std::vector<const float*> w;
  std::vector<uint8_t*> codes, steps;
  std::vector<double*> scales;
  std::vector<GroupPlace> places;
  std::vector<uint8_t> moving;
  int64_t bad = std::numeric_limits<int64_t>::max();

  Worker(const Problem& problem, const Kind& kind, int64_t groups)
      : w(static_cast<size_t>(groups)),
        codes(w.size()),
        steps(w.size()),
        scales(w.size()),
        moving(static_cast<size_t>(problem.job.cap) + 1) {
    places.reserve(w.size());
    const bool sorted = kind.length <= kLongestSorted && problem.weight.dtype != FW_FLOAT64;
    work = allocate(sorted ? tile_bytes(kind.length) : trit_group_bytes(kind.length));
    const int64_t element = sorted ? 4 : 8;
    if (!sorted || problem.weight.dtype != FW_FLOAT32) values = allocate(groups * kind.length * element);
  }
};

void first_bad(const Problem& problem, const GroupPlace& place, int64_t length, Worker& worker) {
  for (int64_t i = 0; i < length; ++i) {
    if (std::isfinite(problem.weight.value(place.row, place.col + i))) continue;
    worker.bad = std::min(worker.bad, place.row * problem.weight.cols + place.col + i);
    return;
  }
}

// float64 and very long groups: one at a time, weight by weight.
void run_one(const Problem& problem, const Kind& kind, const GroupPlace& place, Worker& worker, bool assign) {
  double* w = static_cast<double*>(worker.values.get());
  for (int64_t i = 0; i < kind.length; ++i) w[i] = problem.weight.value(place.row, place.col + i);
  uint8_t* codes = problem.codes + place.row * problem.weight.cols + place.col;
  double* scales = problem.scales + place.index * problem.scales_per_group();
  if (assign) return assign_trit_group(w, kind.length, problem.job, scales, codes);
  first_bad(problem, place, kind.length, worker);
  if (worker.bad != std::numeric_limits<int64_t>::max()) return;
  const int steps = solve_trit_group(w, kind.length, problem.job, worker.work.get(), codes, scales, worker.moving.data());
  problem.steps[place.index] = static_cast<uint8_t>(steps);
}

void run_tile(const Problem& problem, const Kind& kind, Worker& worker, bool assign) {
  const auto groups = static_cast<int64_t>(worker.places.size());
  for (size_t i = 0; i < worker.places.size(); ++i) {
    const GroupPlace& place = worker.places[i];
    const unsigned char* source = problem.weight.at(place.row, place.col);
    if (problem.weight.dtype == FW_FLOAT32) {
      worker.w[i] = reinterpret_cast<const float*>(source);
    } else {
      float* values = static_cast<float*>(worker.values.get()) + static_cast<int64_t>(i) * kind.length;
      kernels().widen(reinterpret_cast<const uint16_t*>(source), problem.weight.dtype == FW_FLOAT16, kind.length, values);
      worker.w[i] = values;
    }
    worker.codes[i] = problem.codes + place.row * problem.weight.cols + place.col;
    worker.scales[i] = problem.scales + place.index * problem.scales_per_group();
    worker.steps[i] = problem.steps ? problem.steps + place.index : nullptr;
  }
  const TritTile tile = {&problem.job,         kind.length,         groups,
                         worker.w.data(),      worker.codes.data(), worker.scales.data(),
                         worker.steps.data(),  worker.moving.data(), worker.work.get()};
  if (assign) return kernels().assign(tile);
  if (kernels().solve(tile) < 0) return;
  for (const GroupPlace& place : worker.places) first_bad(problem, place, kind.length, worker);
}

void run_kind(const Problem& problem, const Kind& kind, int threads, bool assign, uint8_t* moving, int64_t& bad) {
  const bool sorted = kind.length <= kLongestSorted && problem.weight.dtype != FW_FLOAT64;
  const int64_t per_tile = sorted ? tile_groups(kind.length) : 1;
  const int64_t groups = problem.weight.rows * kind.per_row;
  std::vector<std::unique_ptr<Worker>> workers(static_cast<size_t>(threads));
  parallel_for((groups + per_tile - 1) / per_tile, threads, [&](int id, int64_t tile) {
    std::unique_ptr<Worker>& worker = workers[static_cast<size_t>(id)];
    if (!worker) worker = std::make_unique<Worker>(problem, kind, per_tile);
    worker->places.clear();
    for (int64_t group = tile * per_tile; group < std::min(groups, (tile + 1) * per_tile); ++group) {
      const GroupPlace place = place_of(problem, kind, group);
      if (!problem.again || problem.steps[place.index] > problem.job.cap) worker->places.push_back(place);
    }
    if (worker->places.empty()) return;
    if (sorted) return run_tile(problem, kind, *worker, assign);
    run_one(problem, kind, worker->places[0], *worker, assign);
  });
  for (const auto& worker : workers) {
    if (!worker) continue;
    bad = std::min(bad, worker->bad);
    for (size_t t = 0; moving && t < worker->moving.size(); ++t) moving[t] |= worker->moving[t];
  }
}

bool valid_matrix(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride) {
  return weight && cols >= 1 && stride >= cols && fair_size(rows, stride) && dtype >= FW_FLOAT32 && dtype <= FW_FLOAT64;
}

bool make_problem(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                  const fw_trit_settings* settings, int32_t cap, Problem& problem) {
  if (!settings || !valid_matrix(weight, dtype, rows, cols, stride)) return false;
  if (settings->planes < 1 || settings->planes > 3 || settings->group_size < 1 || cap < 1 || cap > 255) return false;
  if (settings->tie_order < 0 || settings->tie_order > 1 || settings->starts < 1 || settings->starts > 3) return false;
  if (!(settings->ridge > 0) || !(settings->ridge_max >= 0) || !(settings->tolerance >= 0)) return false;
  if (std::isnan(settings->condition_threshold)) return false;
  problem.weight = {static_cast<const unsigned char*>(weight), dtype, rows, cols, stride};
  problem.group_size = std::min(settings->group_size, cols);
  problem.groups_per_row = (cols + problem.group_size - 1) / problem.group_size;
  problem.job = {settings->tolerance * settings->tolerance,
                 settings->ridge,
                 settings->ridge_max,
                 settings->condition_threshold,
                 settings->planes,
                 settings->tied != 0 && settings->planes > 1,
                 settings->tie_order,
                 settings->starts,
                 settings->final_least_squares,
                 settings->canonical,
                 cap};
  return true;
}

}  // namespace

int32_t fw_version(void) { return FW_VERSION; }

const char* fw_isa(void) { return kernels().name; }

// The operators know more instruction sets than the solvers, which then take the nearest one they have.
int32_t fw_select_isa(const char* name) {
  if (!name) return FW_INVALID;
  const bool automatic = std::strcmp(name, "auto") == 0;
  const char* nearest = name;
  for (const char* wider : {"vbmi", "bf16", "amx"})
    if (std::strcmp(name, wider) == 0) nearest = "avx512";
  if (std::strcmp(name, "avxvnni") == 0) nearest = "avx2";
  const ProductKernels* product = product_kernels_named(name);
  const Kernels* found = automatic ? best_kernels() : kernels_named(nearest);
  if (!found && product) found = kernels_baseline();  // ARM
  if (!found) return FW_INVALID;
  if (!product) product = product_kernels_named(std::strcmp(name, "avx512") == 0 ? "avx2" : "baseline");
  selected().store(found);
  select_product_kernels(product);
  return FW_OK;
}

int32_t fw_solve(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                 const fw_trit_settings* settings, int32_t cap, uint8_t* codes, double* scales, uint8_t* steps,
                 uint8_t* moving, int32_t again, int32_t threads, int64_t* bad) {
  return guarded_call([&]() -> int32_t {
    Problem problem = {};
    if (!codes || !scales || !steps || !bad) return FW_INVALID;
    if (!make_problem(weight, dtype, rows, cols, stride, settings, cap, problem)) return FW_INVALID;
    problem.codes = codes;
    problem.scales = scales;
    problem.steps = steps;
    problem.again = again != 0;
    int64_t first = std::numeric_limits<int64_t>::max();
    for (const Kind& kind : problem.kinds())
      run_kind(problem, kind, fair_threads(threads), false, again ? nullptr : moving, first);
    if (first == std::numeric_limits<int64_t>::max()) return FW_OK;
    *bad = first;
    return FW_NON_FINITE;
  });
}

int32_t fw_assign(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                  const fw_trit_settings* settings, const double* scales, uint8_t* codes, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    Problem problem = {};
    if (!codes || !scales || !make_problem(weight, dtype, rows, cols, stride, settings, 1, problem)) return FW_INVALID;
    const double* end = scales + rows * problem.groups_per_row * problem.scales_per_group();
    if (!std::all_of(scales, end, [](double scale) { return std::isfinite(scale); })) return FW_INVALID;
    problem.codes = codes;
    problem.scales = const_cast<double*>(scales);  // only read
    int64_t first = 0;
    for (const Kind& kind : problem.kinds()) run_kind(problem, kind, fair_threads(threads), true, nullptr, first);
    return FW_OK;
  });
}

namespace {

// Whether `count` elements can be at both places.
bool can_hold(const void* from, const void* to, int64_t count) {
  return count >= 0 && count <= kLargestSize && (count == 0 || (from && to));
}

// Whether all of some bytes are below a bound; without branches, so that it costs little beside what is done with them.
bool all_below(const uint8_t* values, int64_t count, int bound) {
  uint8_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most < bound;
}

bool valid_packing(int32_t packing) { return packing == FW_BASE3 || packing == FW_2BIT; }

}  // namespace

int32_t fw_pack_trits(const int8_t* trits, int64_t count, int32_t packing, uint8_t* packed) {
  if (!can_hold(trits, packed, count) || !valid_packing(packing)) return FW_INVALID;
  int8_t least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = trits[i] < least ? trits[i] : least;
    most = trits[i] > most ? trits[i] : most;
  }
  if (least < -1 || most > 1) return FW_INVALID;
  pack_trit_bytes(trits, count, packing, packed);
  return FW_OK;
}

int32_t fw_unpack_trits(const uint8_t* packed, int64_t count, int32_t packing, int8_t* trits, int64_t* bad) {
  if (!bad || !can_hold(packed, trits, count) || !valid_packing(packing)) return FW_INVALID;
  *bad = find_bad_byte(packed, packed_trit_bytes(count, packing), packing);
  if (*bad >= 0) return FW_INVALID;
  int8_t tail[32];
  const int64_t bulk = count > 16 ? (count - 16) / 20 * 20 : 0;  // the last trits by way of a buffer with slack
  if (bulk > 0) unpack_trit_range(packed, 0, bulk, packing, trits);
  for (int64_t first = bulk; first < count; first += 16) {
    const int64_t present = std::min<int64_t>(16, count - first);
    unpack_trit_range(packed, first, present, packing, tail);
    std::memcpy(trits + first, tail, static_cast<size_t>(present));
  }
  return FW_OK;
}

int32_t fw_pack_codes(const uint8_t* codes, int64_t count, int32_t planes, int32_t packing, uint8_t* packed,
                      int64_t stride) {
  static constexpr int kCodes[] = {3, 9, 27};
  if (!can_hold(codes, packed, count) || planes < 1 || planes > 3 || !valid_packing(packing)) return FW_INVALID;
  if (planes > 1 && (stride < packed_trit_bytes(count, packing) || stride > kLargestSize)) return FW_INVALID;
  if (!all_below(codes, count, kCodes[planes - 1])) return FW_INVALID;
  pack_code_bytes(codes, count, planes, packing, packed, stride);
  return FW_OK;
}

int32_t fw_pack_bits(const uint8_t* values, int64_t count, int32_t bits, uint8_t* packed) {
  if (!can_hold(values, packed, count) || bits < 1 || bits > 8) return FW_INVALID;
  if (!all_below(values, count, 1 << bits)) return FW_INVALID;
  pack_bit_string(values, count, bits, packed);
  return FW_OK;
}

int32_t fw_unpack_bits(const uint8_t* packed, int64_t count, int32_t bits, uint8_t* values) {
  if (!can_hold(packed, values, count) || bits < 1 || bits > 8) return FW_INVALID;
  unpack_bit_string(packed, count, bits, values);
  return FW_OK;
}

int32_t fw_decode(const uint8_t* packed, int64_t plane_bytes, int32_t planes, const void* scales, int32_t scale_dtype,
                  int32_t tied, int64_t rows, int64_t cols, int64_t group_size, int32_t packing, float* out,
                  int32_t threads, int64_t* bad) {
  return guarded_call([&]() -> int32_t {
    if (!bad) return FW_INVALID;
    *bad = -1;
    if (!packed || !scales || !out || planes < 1 || planes > 3 || cols < 1 || group_size < 1) return FW_INVALID;
    if (!fair_size(rows, cols) || !valid_packing(packing) || scale_dtype < FW_FLOAT32 || scale_dtype > FW_FLOAT16)
      return FW_INVALID;
    group_size = std::min(group_size, cols);
    if (plane_bytes != packed_trit_bytes(rows * cols, packing)) return FW_INVALID;
    for (int k = 0; k < planes; ++k) {
      *bad = find_bad_byte(packed + k * plane_bytes, plane_bytes, packing);
      if (*bad >= 0) return FW_INVALID;
    }
    const Matrix scale_matrix = {static_cast<const unsigned char*>(scales), scale_dtype, 0, 0, 0};
    const int64_t groups = (cols + group_size - 1) / group_size, per_group = tied ? 1 : planes;
    const int64_t block = std::max<int64_t>(1, 65536 / cols);  // rows a thread takes at once
    const int64_t blocks = (rows + block - 1) / block;
    const int count = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(fair_threads(threads), blocks)));
    const int64_t line = cols + kSlack;
    std::vector<std::vector<int8_t>> lines(static_cast<size_t>(count));
    parallel_for(blocks, count, [&](int worker, int64_t item) {
      std::vector<int8_t>& buffer = lines[static_cast<size_t>(worker)];
      buffer.resize(static_cast<size_t>(planes * line));
      for (int64_t row = item * block; row < std::min(rows, (item + 1) * block); ++row) {
        for (int k = 0; k < planes; ++k)
          unpack_trit_range(packed + k * plane_bytes, row * cols, cols, packing, buffer.data() + k * line);
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t begin = group * group_size, length = std::min(group_size, cols - begin);
          float values[3] = {};
          const int8_t* trits[3] = {};
          for (int64_t k = 0; k < per_group; ++k)
            values[k] = static_cast<float>(scale_matrix.value(0, (row * groups + group) * per_group + k));
          for (int k = 0; k < planes; ++k) trits[k] = buffer.data() + k * line + begin;
          kernels().combine(trits, values, planes, tied, length, out + row * cols + begin);
        }
      }
    });
    return FW_OK;
  });
}

int32_t fw_squared_errors(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                          const float* decoded, double* missed, double* total, int32_t threads) {
  return guarded_call([&]() -> int32_t {
    if (!decoded || !missed || !total || !valid_matrix(weight, dtype, rows, cols, stride)) return FW_INVALID;
    const Matrix matrix = {static_cast<const unsigned char*>(weight), dtype, rows, cols, stride};
    const int64_t block = std::max<int64_t>(1, 65536 / cols);  // rows a thread takes at once
    const int64_t blocks = (rows + block - 1) / block;
    parallel_for(blocks, fair_threads(threads), [&](int, int64_t item) {
      std::vector<float> line(static_cast<size_t>(cols));
      for (int64_t row = item * block; row < std::min(rows, (item + 1) * block); ++row) {
        if (dtype == FW_BFLOAT16 || dtype == FW_FLOAT16)
          kernels().widen(reinterpret_cast<const uint16_t*>(matrix.at(row, 0)), dtype == FW_FLOAT16, cols, line.data());
        else
          for (int64_t col = 0; col < cols; ++col) line[static_cast<size_t>(col)] = static_cast<float>(matrix.value(row, col));
        kernels().squares(line.data(), decoded + row * cols, cols, missed + row, total + row);
      }
    });
    return FW_OK;
  });
}
