// What the C interface refuses: missing memory, sizes that cannot be counted with, settings that are no numbers, codes that mean
// nothing. A refusal is FW_INVALID, and nothing has been touched.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "clip_search.h"
#include "level_fit.h"
#include "parallel.h"
#include "product_cases.h"
#include "sweep.h"
#include "sweep_rows.h"
#include "trit_descent.h"

namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
const float kNan = std::nanf("");

void refused(int32_t status, const char* what) { expect(status == FW_INVALID, "refused", what); }
void accepted(int32_t status, const char* what) { expect(status == FW_OK, "accepted", what); }

void test_packing() {
  std::vector<int8_t> trits(20, 1), found(20);
  std::vector<uint8_t> bytes(20), codes(20, 8), values(20, 3);
  int64_t bad = 0;
  accepted(fw_pack_trits(trits.data(), 20, FW_BASE3, bytes.data()), "trits");
  refused(fw_pack_trits(nullptr, 20, FW_BASE3, bytes.data()), "no trits");
  refused(fw_pack_trits(trits.data(), -1, FW_BASE3, bytes.data()), "fewer than none");
  refused(fw_pack_trits(trits.data(), kHuge, FW_BASE3, bytes.data()), "more than can be counted");
  refused(fw_pack_trits(trits.data(), 20, 7, bytes.data()), "a packing that there is not");
  trits[19] = 2;
  refused(fw_pack_trits(trits.data(), 20, FW_BASE3, bytes.data()), "a trit above 1");
  trits[19] = -2;
  refused(fw_pack_trits(trits.data(), 20, FW_2BIT, bytes.data()), "a trit below -1");
  refused(fw_unpack_trits(bytes.data(), 20, FW_BASE3, found.data(), nullptr), "no place for the bad byte");
  refused(fw_unpack_trits(nullptr, 20, FW_BASE3, found.data(), &bad), "no bytes");
  accepted(fw_pack_codes(codes.data(), 20, 2, FW_BASE3, bytes.data(), 10), "joint codes");
  codes[7] = 9;
  refused(fw_pack_codes(codes.data(), 20, 2, FW_BASE3, bytes.data(), 10), "a joint code that two planes do not have");
  codes[7] = 255;
  refused(fw_pack_codes(codes.data(), 20, 3, FW_BASE3, bytes.data(), 4), "a joint code that no planes have");
  codes[7] = 0;
  refused(fw_pack_codes(codes.data(), 20, 2, FW_BASE3, bytes.data(), 3), "planes that overlap");
  refused(fw_pack_codes(codes.data(), 20, 2, FW_BASE3, bytes.data(), -4), "planes one before the other");
  accepted(fw_pack_bits(values.data(), 20, 2, bytes.data()), "bits");
  refused(fw_pack_bits(values.data(), 20, 1, bytes.data()), "a value of more bits");
  refused(fw_pack_bits(values.data(), 20, 9, bytes.data()), "nine bits");
  refused(fw_unpack_bits(bytes.data(), 20, 2, nullptr), "no place for values");
}

void test_solver() {
  std::vector<float> weight(64, 0.5F), decoded(64);
  std::vector<uint8_t> codes(64), steps(4), moving(51);
  std::vector<double> scales(8, 0.5), missed(2), total(2);
  int64_t bad = -1;
  const fw_trit_settings good = {1e-4, 1e-8, 1.0, 1e6, 32, 2, 0, 0, 1, 1, 1};
  const auto solve = [&](const fw_trit_settings& s, const void* w, int64_t rows, int64_t stride) {
    return fw_solve(w, FW_FLOAT32, rows, 32, stride, &s, 50, codes.data(), scales.data(), steps.data(), moving.data(), 0, 1, &bad);
  };
  accepted(solve(good, weight.data(), 2, 32), "a matrix");
  refused(solve(good, nullptr, 2, 32), "no matrix");
  refused(solve(good, weight.data(), -2, 32), "rows below 0");
  refused(solve(good, weight.data(), kHuge, 32), "rows past all counting");
  refused(solve(good, weight.data(), 2, kHuge), "a stride past all counting");
  fw_trit_settings s = good;
  s.tolerance = std::nan("");
  refused(solve(s, weight.data(), 2, 32), "a tolerance that is no number");
  s = good;
  s.ridge_max = std::nan("");
  refused(solve(s, weight.data(), 2, 32), "a ridge that is no number");
  refused(fw_solve(weight.data(), FW_FLOAT32, 2, 32, 32, &good, 50, nullptr, scales.data(), steps.data(), moving.data(), 0, 1, &bad),
          "no place for codes");
  scales[3] = std::nan("");
  refused(fw_assign(weight.data(), FW_FLOAT32, 2, 32, 32, &good, scales.data(), codes.data(), 1), "a scale that is no number");
  refused(fw_squared_errors(weight.data(), FW_FLOAT32, 2, 32, 31, decoded.data(), missed.data(), total.data(), 1), "rows that overlap");
  refused(fw_squared_errors(weight.data(), FW_FLOAT32, 2, 32, 32, nullptr, missed.data(), total.data(), 1), "nothing to compare with");
  refused(fw_decode(codes.data(), kHuge, 1, scales.data(), FW_FLOAT32, 0, kHuge, 2, 2, FW_BASE3, decoded.data(), 1, &bad),
          "a matrix past all counting");
  refused(fw_decode(codes.data(), 13, 1, scales.data(), FW_FLOAT32, 0, 2, 32, 32, FW_BASE3, decoded.data(), 1, nullptr), "no place");
  refused(fw_select_isa(nullptr), "no instruction set");
}

void test_jobs() {
  std::vector<float> w(16), levels = {0.0F, 1.0F}, errors(16), drift(4);
  std::vector<int32_t> group_of(4, 0), chosen(4);
  std::vector<uint8_t> indices(16);
  std::vector<double> loss(4), gram(16), gradient(16);
  std::vector<int64_t> counts(4);
  std::vector<float> row_levels;
  for (int i = 0; i < 4; ++i) row_levels.insert(row_levels.end(), levels.begin(), levels.end());
  std::vector<float> upper = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1};
  const fw_sweep_job sweep = {w.data(), w.data(), upper.data(), nullptr, row_levels.data(), group_of.data(), indices.data(),
                              errors.data(), nullptr, nullptr, nullptr, loss.data(), counts.data(), drift.data(),
                              4, 4, 1, 2, 4, 4, 4, 0, 1.0F, 0.0F, 0.0F, 0, 0};
  accepted(fw_sweep(&sweep, 1), "a sweep");
  const auto swept = [&](const char* what, const auto& change) {
    fw_sweep_job job = sweep;
    change(job);
    refused(fw_sweep(&job, 1), what);
  };
  swept("rows past all counting", [](fw_sweep_job& j) { j.rows = kHuge; });
  swept("a stride below the width", [](fw_sweep_job& j) { j.weight_stride = 3; });
  swept("a stride below 0", [](fw_sweep_job& j) { j.upper_stride = -4; });
  swept("feedback without residuals", [&](fw_sweep_job& j) { j.feedback = upper.data(); });
  swept("tails without a place", [](fw_sweep_job& j) { j.tail = 1; });
  swept("a share that is no number", [](fw_sweep_job& j) { j.alpha = kNan; });
  std::vector<float> row_errors(16), target(16);
  const fw_sweep_rows_job by_rows = {w.data(), target.data(), upper.data(), upper.data(), row_levels.data(), group_of.data(),
                                     indices.data(), errors.data(), row_errors.data(), loss.data(), counts.data(), drift.data(),
                                     4, 4, 1, 2, 4, 4, 4, 4};
  accepted(fw_sweep_rows(&by_rows, 1), "a sweep by rows");
  const auto by_row = [&](const char* what, const auto& change) {
    fw_sweep_rows_job job = by_rows;
    change(job);
    refused(fw_sweep_rows(&job, 1), what);
  };
  refused(fw_sweep_rows(nullptr, 1), "no sweep by rows");
  by_row("rows past all counting", [](fw_sweep_rows_job& j) { j.rows = kHuge; });
  by_row("a target's stride below the width", [](fw_sweep_rows_job& j) { j.target_stride = 3; });
  by_row("a stride between rows below their number", [](fw_sweep_rows_job& j) { j.between_stride = 3; });
  by_row("no place for what rows hand on", [](fw_sweep_rows_job& j) { j.row_errors = nullptr; });
  by_row("more levels than indices count", [](fw_sweep_rows_job& j) { j.level_count = 257; });
  std::vector<int32_t> elsewhere = {0, 0, 1, 0};
  by_row("a group that is not there", [&](fw_sweep_rows_job& j) { j.group_of = elsewhere.data(); });
  const fw_clip_job clip = {w.data(), nullptr, w.data(), w.data(), chosen.data(), 4, 4, 1, 1, 15.0F, 2.0F};
  accepted(fw_clip_search(&clip, 1), "a search");
  fw_clip_job other = clip;
  other.groups = kHuge;
  refused(fw_clip_search(&other, 1), "groups past all counting");
  other = clip;
  other.exponent = kNan;
  refused(fw_clip_search(&other, 1), "an exponent that is no number");
  std::vector<float> began(4, 1.0F), missed(4);
  const float three[] = {-1, 0, 1}, counted[] = {1, 1, 1, 1};
  const fw_level_fit_job fit = {w.data(), counted, three, began.data(), missed.data(), 4, 4, 1, 3, 8};
  accepted(fw_level_fit(&fit, 1), "a fit of levels");
  fw_level_fit_job unfit = fit;
  unfit.groups = kHuge;
  refused(fw_level_fit(&unfit, 1), "groups to fit past all counting");
  unfit = fit;
  unfit.level_count = 1;
  refused(fw_level_fit(&unfit, 1), "one level");
  unfit = fit;
  unfit.period = 0;
  refused(fw_level_fit(&unfit, 1), "no row of weights");
  unfit = fit;
  unfit.rounds = -1;
  refused(fw_level_fit(&unfit, 1), "fewer rounds than none");
  const fw_descent_job descent = {gram.data(), row_levels.data(), group_of.data(), indices.data(), gradient.data(), loss.data(),
                                  counts.data(), 4, 4, 1, 2, 1, 0};
  accepted(fw_descent(&descent, 1), "a descent");
  fw_descent_job steep = descent;
  steep.columns = kHuge;
  refused(fw_descent(&steep, 1), "columns past all counting");
  indices[3] = 2;
  refused(fw_descent(&descent, 1), "an index past the levels");
}

// Sources whose memory is shorter than their shape needs, one byte at a time.
void test_sources() {
  Random random;
  Maker make(random);
  std::vector<Matrix> matrices;
  matrices.push_back(make.trits(5, 24, 8, 2, FW_BASE3, {}, FW_FLOAT32, Fill::kRandom));
  matrices.push_back(make.trits(5, 24, 8, 3, FW_2BIT, {9, 3, 1}, FW_LOG8, Fill::kRandom));
  matrices.push_back(make.uniform(5, 24, 8, 3, true, FW_FLOAT16, Fill::kRandom));
  matrices.push_back(make.uniform_with_offsets(5, 24, 8, 4, FW_FLOAT16, Fill::kRandom));
  matrices.push_back(make.codebook(5, 24, 8, 3, FW_BFLOAT16));
  matrices.push_back(make.sherry(5, 24, 8, 2, FW_FLOAT32, Fill::kRandom));
  matrices.push_back(make.dense(5, 24, FW_BFLOAT16));
  for (Matrix& m : matrices) {
    m.finish();
    const int64_t bytes = fw_operand_bytes(&m.source, FW_AUTO);
    expect(bytes > 0, "accepted", m.name.c_str());
    const Memory space = allocate(bytes + 64);
    int64_t bad = 0;
    accepted(fw_operand_pack(&m.source, FW_AUTO, space.get(), bytes, 1, &bad), m.name.c_str());
    refused(fw_operand_pack(&m.source, FW_AUTO, space.get(), bytes - 1, 1, &bad), "too little room for an operand");
    refused(fw_operand_pack(&m.source, FW_AUTO, static_cast<char*>(space.get()) + 4, bytes, 1, &bad), "room that is not aligned");
    for (int64_t fw_code::*length : {&fw_code::codes_bytes, &fw_code::scales_bytes, &fw_code::zero_bytes, &fw_code::sign_bytes,
                                     &fw_code::offset_bytes}) {
      if (m.source.*length == 0) continue;
      fw_code cut = m.source;
      cut.*length -= 1;
      expect(fw_operand_bytes(&cut, FW_AUTO) == -1, "refused", (m.name + ": a byte is missing").c_str());
      refused(fw_operand_pack(&cut, FW_AUTO, space.get(), bytes, 1, &bad), "a byte is missing");
    }
    for (const int32_t exponent : {-113, -128, 128}) {
      fw_code far = m.source;
      far.scale_exponent = exponent;
      const bool matters = m.source.scale_dtype == FW_LOG8;
      expect((fw_operand_bytes(&far, FW_AUTO) == -1) == matters, "exponent", m.name.c_str());
    }
    fw_code shared = m.source;
    shared.scale_rows = 2;
    expect(fw_operand_bytes(&shared, FW_AUTO) == -1, "refused", "scales of some rows");
  }
}

// The smallest scales of one byte are the same in every instruction set's kernels as in the definition.
void test_least_scales() {
  Random random;
  Maker make(random);
  Matrix m = make.trits(16, 16, 16, 1, FW_2BIT, {}, FW_LOG8, Fill::kHigh);
  for (size_t i = 0; i < m.stored_scales.size(); ++i) m.stored_scales[i] = static_cast<uint8_t>(239 + i);  // and 255, which is 0
  m.source.scale_exponent = -112;
  m.source.scale_rows = 1;
  m.stored_scales.resize(16, 254);
  m.finish();
  const int64_t bytes = fw_operand_bytes(&m.source, FW_FIELDS);
  const Memory space = allocate(std::max<int64_t>(bytes, 64));
  int64_t bad = 0;
  accepted(fw_operand_pack(&m.source, FW_FIELDS, space.get(), bytes, 1, &bad), "the least exponent");
  std::vector<float> x(16, 0x1p60F), out(16);
  for (const char* isa : {"baseline", "avx2", "avx512", "vbmi", "neon"}) {
    if (fw_select_isa(isa) != FW_OK) continue;
    accepted(fw_product(space.get(), bytes, x.data(), 16, 1, 16, out.data(), 16, 16, FW_ACTIVATION_FLOAT, 0, 1), "a product");
    for (size_t r = 0; r < 16; ++r)
      expect(out[r] == 16 * 0x1p60F * log8_value(m.stored_scales[r], -112), isa, "the least scales");
  }
  fw_select_isa("auto");
}

}  // namespace

int main() {
  test_packing();
  test_solver();
  test_jobs();
  test_sources();
  test_least_scales();
  std::printf("the border: %s\n", failures ? "FAILED" : "all tests passed");
  return failures ? 1 : 0;
}
