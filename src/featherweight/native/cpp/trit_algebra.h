// The K x K ridge regression of PTQTP for one group, K = 1, 2, 3, in the operation order of the PyTorch reference.
#ifndef FEATHERWEIGHT_TRIT_ALGEBRA_H
#define FEATHERWEIGHT_TRIT_ALGEBRA_H

#include <math.h>
#include <stdint.h>

namespace {  // compiled for several instruction sets: nothing here may be shared between them

struct Ridge {
  double ridge_max;
  double condition_threshold;
};

// S^T S (upper triangle, row by row) and S^T w.
template <int K>
struct Normal {
  static constexpr int kGram = K * (K + 1) / 2;
  double gram[kGram];
  double right[K];

  bool operator==(const Normal& other) const {
    for (int i = 0; i < kGram; ++i)
      if (gram[i] != other.gram[i]) return false;
    for (int k = 0; k < K; ++k)
      if (right[k] != other.right[k]) return false;
    return true;
  }
};

// L D L^T of a symmetric 3 x 3 matrix. With equal planes the determinant, of order lambda^2, is lost in rounding; the
// pivots, of order lambda, are not.
struct Factor {
  double l21, l31, l32, d1, d2, d3;
};

inline Factor factor(const double* gram, double ridge) {
  Factor f;
  f.d1 = gram[0] + ridge;
  f.l21 = gram[1] / f.d1;
  f.l31 = gram[2] / f.d1;
  f.d2 = (gram[3] + ridge) - f.l21 * gram[1];
  const double u = gram[4] - f.l31 * gram[1];
  f.l32 = u / f.d2;
  f.d3 = ((gram[5] + ridge) - f.l31 * gram[2]) - f.l32 * u;
  return f;
}

// ||A||_F ||A^-1||_F of A = gram + ridge I.
template <int K>
inline double condition(const double* gram, double ridge) {
  if constexpr (K == 1) {
    return 1.0;
  } else if constexpr (K == 2) {
    const double a11 = gram[0] + ridge, a22 = gram[2] + ridge, s12 = gram[1];
    return (a11 * a11 + a22 * a22 + 2 * (s12 * s12)) / (a11 * a22 - s12 * s12);
  } else {
    const Factor f = factor(gram, ridge);
    const double m31 = f.l21 * f.l32 - f.l31;
    const double i33 = 1 / f.d3;
    const double i22 = 1 / f.d2 + f.l32 * f.l32 * i33;
    const double i11 = 1 / f.d1 + f.l21 * f.l21 / f.d2 + m31 * m31 * i33;
    const double i12 = -f.l21 / f.d2 - m31 * f.l32 * i33;
    const double i13 = m31 * i33, i23 = -f.l32 * i33;
    const double inverse = i11 * i11 + i22 * i22 + i33 * i33 + 2 * (i12 * i12 + i13 * i13 + i23 * i23);
    const double a11 = gram[0] + ridge, a22 = gram[3] + ridge, a33 = gram[5] + ridge;
    double own = a11 * a11 + a22 * a22 + a33 * a33;
    own = own + 2 * (gram[1] * gram[1] + gram[2] * gram[2] + gram[4] * gram[4]);
    return sqrt(own * inverse);
  }
}

// Lambda after the condition guard.
template <int K>
inline double guarded(const double* gram, double ridge, const Ridge& limits) {
  const double kappa = condition<K>(gram, ridge);
  if (kappa < limits.condition_threshold) return ridge;
  const double raised = ridge * sqrt(kappa / limits.condition_threshold);
  return raised < limits.ridge_max ? raised : limits.ridge_max;  // also for NaN
}

template <int K>
inline void solve_normal(const Normal<K>& normal, double ridge, double* scales) {
  const double* gram = normal.gram;
  const double* b = normal.right;
  if constexpr (K == 1) {
    scales[0] = b[0] / (gram[0] + ridge);
  } else if constexpr (K == 2) {
    const double a11 = gram[0] + ridge, a22 = gram[2] + ridge, s12 = gram[1];
    const double determinant = a11 * a22 - s12 * s12;
    scales[0] = (a22 * b[0] - s12 * b[1]) / determinant;
    scales[1] = (a11 * b[1] - s12 * b[0]) / determinant;
  } else {
    const Factor f = factor(gram, ridge);
    const double y2 = b[1] - f.l21 * b[0];
    const double y3 = b[2] - f.l31 * b[0] - f.l32 * y2;
    scales[2] = y3 / f.d3;
    scales[1] = y2 / f.d2 - f.l32 * scales[2];
    scales[0] = b[0] / f.d1 - f.l21 * scales[1] - f.l31 * scales[2];
  }
}

// Where plane k of the loop goes in the canonical order (descending, positive scales), and with which sign.
template <int K>
struct Canonical {
  int place[K];
  int sign[K];  // 0 for a plane without scale

  Canonical(const double* scales, bool wanted) {
    for (int k = 0; k < K; ++k) {
      place[k] = k;
      sign[k] = 1;
      if (!wanted) continue;
      int before = 0;
      for (int other = 0; other < K; ++other) {
        const double own = fabs(scales[k]), theirs = fabs(scales[other]);
        before += theirs > own || (theirs == own && other < k);
      }
      place[k] = before;
      sign[k] = (scales[k] > 0) - (scales[k] < 0);
    }
  }

  void apply(const double* scales, double* out) const {
    for (int k = 0; k < K; ++k) out[place[k]] = sign[k] < 0 ? -scales[k] : scales[k];
    for (int k = 0; k < K; ++k)
      if (out[k] == 0) out[k] = 0;  // no negative zero
  }

  // Joint code of trits, less its centre (3^K - 1) / 2: odd in the trits.
  int code(const int* trits) const {
    constexpr int kWeight[4] = {1, 3, 9, 27};
    int sum = 0;
    for (int k = 0; k < K; ++k) sum += kWeight[K - 1 - place[k]] * sign[k] * trits[k];
    return sum;
  }
};

}  // namespace

#endif
