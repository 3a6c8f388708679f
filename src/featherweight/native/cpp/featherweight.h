// The C interface of featherweight's native library. No function throws, keeps state between calls (but for the chosen
// instruction set), or gives results that depend on the number of threads; those that depend on the instruction set, in
// the last bits, say so.
//
// Every function but fw_version and fw_isa returns an fw_status. Matrices are row-major.
#ifndef FEATHERWEIGHT_H
#define FEATHERWEIGHT_H

#include <stdint.h>

#if defined(_WIN32)
#define FW_API extern "C" __declspec(dllexport)
#else
#define FW_API extern "C" __attribute__((visibility("default")))
#endif

#define FW_VERSION 5

enum fw_status { FW_OK = 0, FW_INVALID = 1, FW_NON_FINITE = 2, FW_NO_MEMORY = 3, FW_STOPPED = 4, FW_CACHE_RANGE = 5 };
enum fw_dtype { FW_FLOAT32 = 0, FW_BFLOAT16 = 1, FW_FLOAT16 = 2, FW_FLOAT64 = 3 };
enum fw_packing { FW_BASE3 = 0, FW_2BIT = 1 };
enum fw_order { FW_LEXICOGRAPHIC = 0, FW_PAIRED = 1 };

typedef struct fw_trit_settings {
  double tolerance;
  double ridge;
  double ridge_max;
  double condition_threshold;
  int64_t group_size;
  int32_t planes;
  int32_t tied;  // one scale a group, from the sweep
  int32_t tie_order;
  int32_t starts;
  int32_t final_least_squares;
  int32_t canonical;
} fw_trit_settings;

FW_API int32_t fw_version(void);

// The instruction set in use: "baseline", "avx2" or "avx512".
FW_API const char* fw_isa(void);
// Choose one by name, or the best with "auto". FW_INVALID if the processor or the build lacks it. Not while another call is
// under way: calls ask for their kernels as they need them.
FW_API int32_t fw_select_isa(const char* name);

// PTQTP of a matrix [rows, cols] whose rows begin `stride` elements apart. Every group runs to its exact fixed point or
// through iteration `cap` (1 to 255). codes uint8 [rows, cols], scales double [rows, groups, planes] (tied: [rows, groups]),
// steps uint8 [rows, groups], moving uint8 [cap + 1]: 1 where a group moved its scales by the tolerance in that iteration.
// With `again`, only groups whose steps exceed cap are solved, in place. *bad: row * cols + column of the first NaN or Inf.
FW_API int32_t fw_solve(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                        const fw_trit_settings* settings, int32_t cap, uint8_t* codes, double* scales, uint8_t* steps,
                        uint8_t* moving, int32_t again, int32_t threads, int64_t* bad);

// The trit step alone, for given scales.
FW_API int32_t fw_assign(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                         const fw_trit_settings* settings, const double* scales, uint8_t* codes, int32_t threads);

// Trits int8 to bytes and back; *bad is the first byte that no trits pack to.
FW_API int32_t fw_pack_trits(const int8_t* trits, int64_t count, int32_t packing, uint8_t* packed);
FW_API int32_t fw_unpack_trits(const uint8_t* packed, int64_t count, int32_t packing, int8_t* trits, int64_t* bad);

// Joint codes sum_k 3^(K-1-k) (t_k + 1) to the packed bytes of K planes that lie `stride` bytes apart.
FW_API int32_t fw_pack_codes(const uint8_t* codes, int64_t count, int32_t planes, int32_t packing, uint8_t* packed,
                             int64_t stride);

// Values of 1 to 8 bits as a little-endian bit string, and back.
FW_API int32_t fw_pack_bits(const uint8_t* values, int64_t count, int32_t bits, uint8_t* packed);
FW_API int32_t fw_unpack_bits(const uint8_t* packed, int64_t count, int32_t bits, uint8_t* values);

// Packed planes, `plane_bytes` each, with scales (float32, bfloat16, float16) to float32 [rows, cols].
FW_API int32_t fw_decode(const uint8_t* packed, int64_t plane_bytes, int32_t planes, const void* scales, int32_t scale_dtype,
                         int32_t tied, int64_t rows, int64_t cols, int64_t group_size, int32_t packing, float* out,
                         int32_t threads, int64_t* bad);

// Per row of weight [rows, cols] and decoded float32 [rows, cols]: sums of squares of their difference and of the weight.
FW_API int32_t fw_squared_errors(const void* weight, int32_t dtype, int64_t rows, int64_t cols, int64_t stride,
                                 const float* decoded, double* missed, double* total, int32_t threads);

#endif
