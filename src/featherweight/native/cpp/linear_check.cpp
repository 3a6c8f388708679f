// What a layer must be before anything is computed with it.
#include <algorithm>
#include <cmath>

#include "linear.h"
#include "parallel.h"
#include "product_layout.h"

namespace {

// Whether all of count numbers are in [0, bound). Two sums without branches: compilers make vectors of it.
bool all_below(const int32_t* numbers, int64_t count, int64_t bound) {
  if (bound > INT32_MAX) bound = INT32_MAX;
  const uint32_t limit = static_cast<uint32_t>(bound);
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint32_t>(static_cast<uint32_t>(numbers[i]) >= limit);
  return bad == 0;
}

bool valid_operand(const void* operand, int64_t bytes, int64_t rows, int64_t cols) {
  if (fw_operand_check(operand, bytes) != FW_OK) return false;
  const fw_operand& header = *static_cast<const fw_operand*>(operand);
  return header.rows == rows && header.cols == cols;
}

bool valid_sparse(const fw_term& term, int64_t rows, int64_t cols) {
  if (!term.row_pointers || term.pointers != rows + 1 || term.entries < 0 || term.entries > INT32_MAX) return false;
  if (term.entries > 0 && (!term.columns || !term.values)) return false;
  if (term.row_pointers[0] != 0 || term.row_pointers[rows] != term.entries) return false;
  uint32_t falls = 0;
  for (int64_t row = 0; row < rows; ++row) falls |= static_cast<uint32_t>(term.row_pointers[row] > term.row_pointers[row + 1]);
  return falls == 0 && all_below(term.columns, term.entries, cols);
}

bool valid_term(const fw_term& term, int64_t rows, int64_t cols) {
  if (term.steps < 0 || (term.steps > 0 && !term.step)) return false;
  for (int i = 0; i < term.steps; ++i)
    if (!valid_step(term.step[i], cols)) return false;
  switch (term.kind) {
    case FW_TERM_OPERAND: return valid_operand(term.operand, term.operand_bytes, rows, cols);
    case FW_TERM_LOW_RANK: {
      if (fw_operand_check(term.right, term.right_bytes) != FW_OK) return false;
      const fw_operand& right = *static_cast<const fw_operand*>(term.right);
      return right.cols == cols && valid_operand(term.operand, term.operand_bytes, rows, right.rows);
    }
    case FW_TERM_SPARSE: return valid_sparse(term, rows, cols);
    default: return false;
  }
}

}  // namespace

bool valid_step(const fw_step& step, int64_t cols) {
  if (cols < 1) return false;
  switch (step.kind) {
    case FW_PERMUTE: return step.order && step.count == cols && all_below(step.order, cols, cols);
    case FW_SCALE: return step.values && step.count == cols;
    case FW_HADAMARD: return hadamard_fits(step.block, cols) && (!step.values || step.count == cols);
    case FW_ROUND: return step.block >= 1 && step.bits >= 2 && step.bits <= 16;
    default: return false;
  }
}

int32_t check_linear(const fw_linear* linear) {
  if (!linear || linear->rows < 1 || linear->cols < 1 || linear->terms < 1 || !linear->term) return FW_INVALID;
  if (linear->terms > kMostTerms || linear->rows > INT32_MAX || linear->cols > INT32_MAX) return FW_INVALID;
  for (int64_t k = 0; k < linear->terms; ++k)
    if (!valid_term(linear->term[k], linear->rows, linear->cols)) return FW_INVALID;
  return FW_OK;
}
