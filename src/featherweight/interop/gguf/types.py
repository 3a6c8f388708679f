"""The types of tensors in GGUF files: number, name, weights in a block and its bytes, as ggml lays them out."""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """A type of tensor: `weights` neighbours along a row take `bytes`."""

    number: int
    name: str
    weights: int
    bytes: int

    def bytes_of(self, weights: int) -> int:
        """Bytes of so many weights, a multiple of those of a block."""
        return weights // self.weights * self.bytes


Q2_0, Q2_0_WIDE = BlockType(42, "Q2_0", 64, 18), BlockType(42, "Q2_0 of 128", 128, 34)
"""Two layouts share the number 42: ggml's, and the wider one of a fork of llama.cpp that had it first (also PQ2_0).
Which of them a file has shows in how far apart its tensors lie."""

TYPES: dict[int, BlockType] = {
    kind.number: kind
    for kind in (
        BlockType(0, "F32", 1, 4),
        BlockType(1, "F16", 1, 2),
        BlockType(2, "Q4_0", 32, 18),
        BlockType(3, "Q4_1", 32, 20),
        BlockType(6, "Q5_0", 32, 22),
        BlockType(7, "Q5_1", 32, 24),
        BlockType(8, "Q8_0", 32, 34),
        BlockType(10, "Q2_K", 256, 84),
        BlockType(11, "Q3_K", 256, 110),
        BlockType(12, "Q4_K", 256, 144),
        BlockType(13, "Q5_K", 256, 176),
        BlockType(14, "Q6_K", 256, 210),
        BlockType(16, "IQ2_XXS", 256, 66),
        BlockType(17, "IQ2_XS", 256, 74),
        BlockType(18, "IQ3_XXS", 256, 98),
        BlockType(19, "IQ1_S", 256, 50),
        BlockType(20, "IQ4_NL", 32, 18),
        BlockType(21, "IQ3_S", 256, 110),
        BlockType(22, "IQ2_S", 256, 82),
        BlockType(23, "IQ4_XS", 256, 136),
        BlockType(29, "IQ1_M", 256, 56),
        BlockType(30, "BF16", 1, 2),
        BlockType(34, "TQ1_0", 256, 54),
        BlockType(35, "TQ2_0", 256, 66),
        BlockType(39, "MXFP4", 32, 17),
        BlockType(40, "NVFP4", 64, 36),
        BlockType(41, "Q1_0", 128, 18),
        Q2_0,
    )
}
"""The types that weights are stored in and that are read."""

OTHERS: dict[int, str] = {
    4: "Q4_2, which ggml has given up",
    5: "Q4_3, which ggml has given up",
    9: "Q8_1, which is for activations",
    15: "Q8_K, which is for activations",
    24: "I8, which is for no weights",
    25: "I16, which is for no weights",
    26: "I32, which is for no weights",
    27: "I64, which is for no weights",
    28: "F64, which no model of these architectures has",
    **dict.fromkeys((31, 32, 33), "Q4_0 with rows interleaved, which ggml has given up"),
    **dict.fromkeys((36, 37, 38), "IQ4_NL with rows interleaved, which ggml has given up"),
}
"""Types with a name that are not read, and why."""
