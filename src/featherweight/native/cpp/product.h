// Matrix products with compressed weights: packed operands, quantised activations, the operators themselves.
//
// An operand is one block of memory, aligned to 64 bytes and without pointers, so that it can be kept in a file: a header,
// then codes, scales, zero points or offsets. Sixteen rows make a tile. A step is four input columns of a tile: 64 codes,
// those of row r in bytes 4r .. 4r + 3, which is what the dot-product instructions of all processors take; each 32-bit lane
// then adds up one row, and nothing is ever summed across lanes. A segment is a run of columns with one activation scale; a
// group of weights is one segment or several.
#ifndef FEATHERWEIGHT_PRODUCT_H
#define FEATHERWEIGHT_PRODUCT_H

#include "featherweight.h"

// What a matrix is stored as (the formats of docs/format.md).
enum fw_code_kind { FW_TRIT_PLANES = 0, FW_UNIFORM = 1, FW_CODEBOOK = 2, FW_DENSE = 3, FW_SHERRY = 4 };
// How codes lie in an operand. FIELDS: a code is cut into parts of 4, 2 and 1 bits (or is a byte). BASE3: five trits a byte.
enum fw_layout { FW_AUTO = -1, FW_FIELDS = 0, FW_TRITS = 1, FW_TABLES = 2, FW_PLAIN = 3, FW_QUARTETS = 4 };
enum { FW_LOG8 = 4, FW_INT8 = 5 };  // further scale and value types after fw_dtype
// Whether a product may round activations to what its instructions take: to 8 bits a segment where the operand holds integers,
// to bfloat16 where it is a matrix of bfloat16 values. All others take them as they are.
enum fw_precision { FW_ACTIVATION_INT8 = 0, FW_ACTIVATION_FLOAT = 1 };

typedef struct fw_code {
  int32_t kind;
  int32_t planes;          // trit planes: 1 to 3
  int32_t packing;         // trit planes: fw_packing
  int32_t bits;            // uniform, codebook
  int32_t tied;            // trit planes: one scale a group, planes weighted by `weights`
  int32_t weights[3];      // tied only
  int32_t scale_dtype;     // float32, bfloat16, float16, FW_LOG8; for dense the dtype of `codes`
  int32_t scale_exponent;  // FW_LOG8: -112 to 127, so that all scales are normal numbers
  int32_t lane_stride;     // sherry
  int64_t rows, cols;
  int64_t group_size;      // columns with one scale (codebook: with one codebook); cols for one a row
  int64_t scale_rows;      // rows that share a scale: 1, or `rows` for one scale a matrix
  const void* codes;       // trit planes: plane_bytes each; uniform, codebook: bit string; dense: values; sherry: patterns
  int64_t plane_bytes;
  const void* scales;      // [rows, groups(, planes)]; codebooks [rows, groups, 2^bits]
  const uint8_t* zero_points;  // uniform: bit string over [rows, groups], or null: 2^(bits - 1)
  const uint8_t* signs;    // sherry
  int64_t segment;         // columns with one activation scale; 0: chosen (the group, at most 128 columns a segment)
  int64_t codes_bytes, scales_bytes, zero_bytes, sign_bytes;  // of memory at the pointers: a source that needs more is invalid
  const void* offsets;     // uniform: [rows, groups] of the scales' type, which is none of one byte, or null; then no zero_points
  int64_t offset_bytes;
} fw_code;

typedef struct fw_operand {  // the header of an operand
  uint32_t magic, version;
  int32_t layout, planes, bits, tied;
  int32_t weights[4];        // FIELDS, TRITS: integer weights of tied planes
  int32_t scale_dtype, scale_exponent, offset, has_zeros;
  int64_t rows, cols, tiles;
  int64_t segment, segments;       // columns of a segment; the last may be short
  int64_t steps;                   // of a segment, padding included
  int64_t segments_per_group, groups;
  int64_t codes_at, codes_per_tile, scales_at, scales_per_tile, zeros_at, zeros_per_tile;  // bytes
  int64_t bytes;                   // all
  int64_t weight_bytes;            // read by one matrix-vector product
  int32_t lane_stride;
  int32_t last_steps;              // FIELDS: those of the last segment, which may be short; else 0
  int32_t has_offsets;             // FIELDS: floats of the scales' type where zero points would be; `offset` is then 0
  int32_t reserved;
} fw_operand;

// The instruction set of the operators: "baseline", "avx2", "avxvnni", "avx512" (with VNNI), "vbmi", "bf16", "amx", "neon", "i8mm".
// fw_select_isa takes these names too.
FW_API const char* fw_product_isa(void);

// Bytes of the operand for a source, or -1 if the source is invalid. layout: fw_layout; FW_AUTO takes the one that is best here.
FW_API int64_t fw_operand_bytes(const fw_code* source, int32_t layout);
// Writes it to `operand`, 64-byte aligned memory of `bytes` bytes, at least fw_operand_bytes. *bad: first invalid byte of the
// codes (FW_INVALID).
FW_API int32_t fw_operand_pack(const fw_code* source, int32_t layout, void* operand, int64_t bytes, int32_t threads,
                               int64_t* bad);
// FW_OK if `bytes` bytes at `operand`, 64-byte aligned, are an operand of this library that is complete and consistent. All
// functions that take an operand ask this first.
FW_API int32_t fw_operand_check(const void* operand, int64_t bytes);

// out[t, row] (+)= sum over columns of W[row, col] x[t, col]; x and out are float32, of x_count and out_count elements, their
// rows stride elements apart.
FW_API int32_t fw_product(const void* operand, int64_t bytes, const float* x, int64_t x_count, int64_t tokens, int64_t x_stride,
                          float* out, int64_t out_count, int64_t out_stride, int32_t precision, int32_t accumulate,
                          int32_t threads);
// The same with activations given as integers [tokens, cols] and scales [tokens, segments], of which there are scale_count.
FW_API int32_t fw_product_int8(const void* operand, int64_t bytes, const int8_t* x, int64_t x_count, const float* scales,
                               int64_t scale_count, int64_t tokens, float* out, int64_t out_count, int64_t out_stride,
                               int32_t threads);
// Rows [first, last) of the matrix as float32 [last - first, cols], out_count elements: what an embedding needs.
FW_API int32_t fw_operand_rows(const void* operand, int64_t bytes, int64_t first, int64_t last, float* out, int64_t out_count);

// Steps on the way from a layer's input to an operand, in order of application.
enum fw_step_kind { FW_PERMUTE = 1, FW_SCALE = 2, FW_HADAMARD = 3, FW_ROUND = 4 };
typedef struct fw_step {
  int32_t kind;
  int32_t block;          // Hadamard: its order, of odd part 63 or less; round: columns with one step
  int32_t bits;           // round
  int32_t reserved;
  int64_t count;          // elements of `order` or `values`
  const int32_t* order;   // permute: out[j] = in[order[j]]
  const float* values;    // scale: factors [cols]; Hadamard: signs [cols] or null
} fw_step;

enum fw_term_kind { FW_TERM_OPERAND = 0, FW_TERM_LOW_RANK = 1, FW_TERM_SPARSE = 2 };
typedef struct fw_term {
  int32_t kind, steps;
  const fw_step* step;
  const void* operand;    // low rank: the left factor [rows, r]
  const void* right;      // low rank: [r, cols]
  int64_t operand_bytes, right_bytes;
  const int32_t* row_pointers;  // sparse: [rows + 1], rising from 0 to `entries`
  const int32_t* columns;       // [entries]
  const float* values;          // [entries]
  int64_t pointers, entries;    // elements of row_pointers, and of the other two
} fw_term;

typedef struct fw_linear {
  int64_t rows, cols;
  int64_t terms;
  const fw_term* term;
  const float* bias;      // [rows] or null
} fw_linear;

// FW_OK if a layer is complete: steps, operands and sparse matrices fit its shape, and refer to nothing outside of it. All
// functions that take layers ask this first, fw_decoder_new once for all its passes.
FW_API int32_t fw_linear_check(const fw_linear* linear);
// out = sum of terms (in their order) + bias, float32; lengths and strides as those of fw_product.
FW_API int32_t fw_linear_apply(const fw_linear* linear, const float* x, int64_t x_count, int64_t tokens, int64_t x_stride,
                               float* out, int64_t out_count, int64_t out_stride, int32_t precision, int32_t threads);

// One step on x [tokens, cols] to out (not in place).
FW_API int32_t fw_apply_step(const fw_step* step, const float* x, int64_t tokens, int64_t cols, float* out, int32_t threads);
// Per token and `segment` columns: scales = max|x| / 127, codes = x (127 / max|x|) to the nearest integer, halves to even, and
// the sums of the codes. A segment of zeros (or below 1e-33) has scale 0; one with a NaN or Inf has scale NaN and codes 0. `hadamard` (or null) is
// applied first, while the values are in registers or the first cache.
FW_API int32_t fw_quantize(const float* x, int64_t tokens, int64_t cols, int64_t segment, const fw_step* hadamard, int8_t* codes,
                           float* scales, int32_t* sums, int32_t threads);

// Bytes a second of reading `bytes` of memory that was just allocated, the best of several ways and `repeats` rounds.
FW_API double fw_read_bandwidth(int64_t bytes, int32_t repeats, int32_t threads);
// Multiply-adds a second of a bare loop of 8-bit dot products in registers, and of vector products with bfloat16 weights and
// rounded activations that are in the first cache.
FW_API double fw_int8_peak(int32_t threads);
FW_API double fw_bf16_peak(int32_t threads);

#endif
