// What the offsets of an operand are multiplied by.
#include "product_input.h"
#include "product_layout.h"

void sum_groups(const fw_operand* operand, const InputShape& shape, const InputBuffers& input, int64_t tokens, float* to) {
  const int64_t together = operand->segments_per_group;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t group = 0; group < operand->groups; ++group, ++to) {
      const int64_t first = group * together, last = group + 1 < operand->groups ? first + together : shape.segments;
      if (shape.integer) {
        *to = 0.0F;
        for (int64_t s = t * shape.segments + first; s < t * shape.segments + last; ++s)
          *to += input.scales()[s] * static_cast<float>(input.sums()[s]);
        continue;
      }
      float sum[4] = {};  // of every fourth column: additions then wait for each other a quarter of the time
      const float* values = input.values() + t * shape.columns;
      for (int64_t c = first * shape.padded; c < last * shape.padded; c += 4)
        for (int64_t j = 0; j < 4; ++j) sum[j] += values[c + j];
      *to = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}
