// Operands as the tests pack them, and what packing and products refuse: whatever a source or a header may say.
#ifndef FEATHERWEIGHT_TESTS_PRODUCT_REFUSALS_H
#define FEATHERWEIGHT_TESTS_PRODUCT_REFUSALS_H

#include <cstring>
#include <string>
#include <vector>

#include "product.h"
#include "product_cases.h"
#include "product_checks.h"

struct Operand {
  Memory memory;
  int64_t bytes;
  const fw_operand& header() const { return *static_cast<const fw_operand*>(memory.get()); }
};

inline Operand packed(const Matrix& m, int32_t layout, int threads, int garbage) {
  Operand operand = {nullptr, fw_operand_bytes(&m.source, layout)};
  if (operand.bytes < 0) return operand;
  operand.memory = allocate(operand.bytes);
  std::memset(operand.memory.get(), garbage, static_cast<size_t>(operand.bytes));
  int64_t bad = 0;
  const int32_t status = fw_operand_pack(&m.source, layout, operand.memory.get(), operand.bytes, threads, &bad);
  check(status == FW_OK && bad == -1, m.name + ": is packed");
  return operand;
}

inline void test_refusals() {
  Random random;
  Maker make(random);
  Matrix m = make.trits(5, 12, 12, 2, FW_BASE3, {}, FW_FLOAT32, Fill::kRandom);
  m.finish();
  const Operand operand = packed(m, FW_FIELDS, 1, 0);
  const auto refused = [&](const char* what, const auto& change) {
    fw_code s = m.source;
    change(s);
    check(fw_operand_bytes(&s, FW_AUTO) == -1, std::string("refused: ") + what);
  };
  refused("no rows", [](fw_code& s) { s.rows = 0; });
  refused("no codes", [](fw_code& s) { s.codes = nullptr; });
  refused("no scales", [](fw_code& s) { s.scales = nullptr; });
  refused("planes", [](fw_code& s) { s.planes = 4; });
  refused("kind", [](fw_code& s) { s.kind = 9; });
  refused("scale type", [](fw_code& s) { s.scale_dtype = 77; });
  refused("negative segment", [](fw_code& s) { s.segment = -4; });
  refused("too large", [](fw_code& s) { s.rows = s.cols = int64_t{1} << 40; });
  check(fw_operand_bytes(&m.source, FW_TABLES) == -1, "a layout of another kind is refused");
  refused("offsets of trits", [](fw_code& s) {
    s.offsets = s.scales;
    s.offset_bytes = s.scales_bytes;
  });
  const Matrix offsets = make.uniform_with_offsets(5, 12, 4, 3, FW_FLOAT16, Fill::kRandom);
  const auto refused_with_offsets = [&](const char* what, const auto& change) {
    fw_code s = offsets.source;
    s.codes = offsets.codes.data();
    s.scales = offsets.stored_scales.data();
    s.offsets = offsets.stored_offsets.data();
    check(fw_operand_bytes(&s, FW_AUTO) > 0, "offsets are taken");
    change(s);
    check(fw_operand_bytes(&s, FW_AUTO) == -1, std::string("refused beside offsets: ") + what);
  };
  refused_with_offsets("zero points", [](fw_code& s) {
    s.zero_points = static_cast<const uint8_t*>(s.codes);
    s.zero_bytes = s.codes_bytes;
  });
  refused_with_offsets("scales of one byte", [](fw_code& s) { s.scale_dtype = FW_LOG8; });
  refused_with_offsets("one scale for all rows", [](fw_code& s) {
    s.scale_rows = s.rows;
    s.group_size = s.cols;
  });
  m.codes[1] = 255;
  int64_t bad = -1;
  std::vector<float> out(64);
  Memory space = allocate(operand.bytes);
  check(fw_operand_pack(&m.source, FW_FIELDS, space.get(), operand.bytes, 1, &bad) == FW_INVALID && bad == 1, "bytes that are no trits");
  Matrix large = make.trits(300, 1201, 1201, 2, FW_BASE3, {}, FW_FLOAT32, Fill::kRandom);
  for (const int64_t at : {int64_t{70000}, int64_t{30000}, large.source.plane_bytes + 5}) large.codes[static_cast<size_t>(at)] = 250;
  large.finish();
  const int64_t room_bytes = fw_operand_bytes(&large.source, FW_FIELDS);
  const Memory room = allocate(room_bytes);
  for (const int threads : {1, 3})
    check(fw_operand_pack(&large.source, FW_FIELDS, room.get(), room_bytes, threads, &bad) == FW_INVALID && bad == 30000,
          "of several bytes that are no trits the first is named, by however many threads it is looked for");
  check(fw_product(operand.memory.get(), operand.bytes, nullptr, 12, 1, 12, out.data(), 5, 5, FW_ACTIVATION_INT8, 0, 1) ==
            FW_INVALID, "no input");
  // Whatever a header says: refused, or an operand that fits its memory.
  uint8_t* bytes = static_cast<uint8_t*>(space.get());
  for (size_t at = 0; at < sizeof(fw_operand); ++at)
    for (const int flip : {1, 0x55, 0x80, 0xff}) {
      std::memcpy(bytes, operand.memory.get(), static_cast<size_t>(operand.bytes));
      bytes[at] = static_cast<uint8_t>(bytes[at] ^ flip);
      if (fw_operand_check(bytes, operand.bytes) != FW_OK) continue;
      const fw_operand& h = *static_cast<const fw_operand*>(space.get());
      std::vector<float> x(static_cast<size_t>(h.cols), 1.0F), y(static_cast<size_t>(h.rows));
      check(h.bytes <= operand.bytes, "an accepted operand fits");
      for (const int32_t precision : {FW_ACTIVATION_INT8, FW_ACTIVATION_FLOAT})
        fw_product(bytes, operand.bytes, x.data(), h.cols, 1, h.cols, y.data(), h.rows, h.rows, precision, 0, 1);
    }
}

#endif
