// Which sources are valid, and the header of the operand that one is packed to.
#ifndef FEATHERWEIGHT_PRODUCT_HEADER_H
#define FEATHERWEIGHT_PRODUCT_HEADER_H

#include "product.h"

// Whether tied planes become one code.
inline bool joint(const fw_code& s, int32_t layout) { return s.kind == FW_TRIT_PLANES && s.tied && layout == FW_FIELDS; }

// False if the source is invalid or has no such layout; lengths of its memory are not looked at.
bool make_header(const fw_code& source, int32_t layout, fw_operand& header);
// Whether the memory that a source with a header points to is as long as the source needs.
bool long_enough(const fw_code& source);
// Whether memory begins where an operand may.
bool aligned_operand(const void* operand);

#endif
