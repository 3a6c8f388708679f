// The dense factors of block rotations: docs/format.md, `hadamard`; storage/codes/orthogonal.py makes the same floats.
#include <cmath>
#include <mutex>

#include "product_layout.h"

namespace {

// Paley's matrix of a prime order + 1 (construction I) or half of it + 1 (II, orders 28 and 36).
int paley_sign(int order, int i, int j) {
  const bool second = order == 28 || order == 36;
  const int prime = second ? order / 2 - 1 : order - 1;
  const auto character = [prime](int a) {
    a = (a % prime + prime) % prime;
    if (a == 0) return 0;
    for (int s = 1; s < prime; ++s)
      if (s * s % prime == a) return 1;
    return -1;
  };
  const auto core = [&](int r, int c) {
    if (r == 0) return c == 0 ? 0 : 1;
    if (c == 0) return second ? 1 : -1;
    return character(r - c);
  };
  if (!second) return (i == j) + core(i, j);
  static constexpr int kCore[2][2] = {{1, 1}, {1, -1}}, kUnit[2][2] = {{1, -1}, {-1, -1}};
  return core(i / 2, j / 2) * kCore[i % 2][j % 2] + (i / 2 == j / 2) * kUnit[i % 2][j % 2];
}

// The Kronecker product of Paley's matrix and Sylvester's.
int hadamard_sign(int order, int i, int j) {
  int odd = order;
  while (odd % 2 == 0) odd /= 2;
  const int kernel = odd == 1 ? 1 : 4 * odd, rest = order / kernel;
  const int sign = __builtin_parity(static_cast<unsigned>((i % rest) & (j % rest))) ? -1 : 1;
  return kernel == 1 ? sign : sign * paley_sign(kernel, i / rest, j / rest);
}

// Entry of the orthogonal matrix of an odd order, times the root of the order.
double odd_entry(int order, int i, int j) {
  if (order % 4 == 3 && order != 51) {  // the core of a Hadamard matrix
    const int n = order + 1;
    const int core = -hadamard_sign(n, i + 1, j + 1) * hadamard_sign(n, 0, j + 1) * hadamard_sign(n, i + 1, 0) * hadamard_sign(n, 0, 0);
    const double root = std::sqrt(static_cast<double>(n));
    return std::sqrt(static_cast<double>(order)) / root * (core + 1.0 / (root + 1.0));
  }
  const double angle = 6.283185307179586 * (i * j % order) / order;  // Hartley
  return std::cos(angle) + std::sin(angle);
}

}  // namespace

// Kernels rotate where nothing may be allocated: the tables of all orders, one behind the other, are memory of the library.
const float* rotation_factor(int kernel) {
  constexpr auto before = [](int order) { return (order - 1) * order * (2 * order - 1) / 6; };  // a sum of squares
  static float tables[before(kMostOdd + 1)];
  static std::once_flag once[kMostOdd + 1];
  if (kernel < 1 || kernel > kMostOdd) return nullptr;
  float* table = tables + before(kernel);
  std::call_once(once[kernel], [&] {
    for (int j = 0; j < kernel; ++j)
      for (int i = 0; i < kernel; ++i)
        table[j * kernel + i] = static_cast<float>(kernel % 2 ? odd_entry(kernel, i, j) : paley_sign(kernel, i, j));
  });
  return table;
}
