// Products with matrices of bfloat16 by AVX512-BF16, where inputs may be rounded; all else is that of the vbmi kernels.
#include "product_plain.h"

const ProductKernels* product_kernels_bf16() {
  static const ProductKernels kernels = [] {
    ProductKernels k = *product_kernels_vbmi();
    k.name = "bf16";
    k.plain_input = plain_input;
    k.plain_tiles = plain_tiles;
    k.plain_spin = plain_spin;
    return k;
  }();
  return &kernels;
}
