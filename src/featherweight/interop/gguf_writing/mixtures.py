"""Names of whole files, "q4_k_m", as types of their tensors: the mixtures that llama.cpp's quantiser is known by.

Matrices are of the type in the name. In mixtures M and L the values' projection and the down projection of some blocks
(the first and last eighth, and every third between) are of a larger one, the output layer is Q6_K. Rules that hang on
a model's size, or on an importance matrix, are left out, so files differ from those of llama-quantize in a few tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.interop.gguf_writing.block_types import TYPES

FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q2_0": "Q4_0",
    "Q1_0": "Q4_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
"""What takes the place of a type where rows are no whole blocks of it; F16 for all others."""


@dataclass(frozen=True)
class Mixture:
    """base : of matrices; more : of value and down projections of the blocks that get more; head : of the output layer,
    or of the embedding where it is both"""

    base: str
    more: str = ""
    head: str = "Q6_K"


MIXTURES = {
    "Q2_K_M": Mixture("Q2_K", "Q4_K"),
    "Q3_K_S": Mixture("Q3_K"),
    "Q3_K_M": Mixture("Q3_K", "Q4_K"),
    "Q3_K_L": Mixture("Q3_K", "Q5_K"),
    "Q4_K_S": Mixture("Q4_K", "Q5_K"),
    "Q4_K_M": Mixture("Q4_K", "Q6_K"),
    "Q5_K_S": Mixture("Q5_K"),
    "Q5_K_M": Mixture("Q5_K", "Q6_K"),
    "IQ3_M": Mixture("IQ3_S", "Q4_K"),
    "IQ4_XS_M": Mixture("IQ4_XS", "Q5_K"),
}


def known_types() -> tuple[str, ...]:
    """Everything that can be asked for, in small letters."""
    return tuple(name.lower() for name in (*TYPES, *MIXTURES))


def type_in(wanted: str, name: str, blocks: int, tied: bool) -> str:
    """The type of a tensor of this GGUF name in a file of type `wanted`.

    blocks : of the model; tied : whether the embedding is the output layer
    """
    mixture = MIXTURES.get(wanted)
    if mixture is None:
        return wanted
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mixture.head
    if mixture.more and (".attn_v." in name or ".ffn_down." in name):
        block = int(name.split(".")[1])
        eighth = blocks // 8
        if block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2:
            return mixture.more
    return mixture.base
