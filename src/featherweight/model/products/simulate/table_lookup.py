"""Matrix products with few-valued weights by table lookup, as an integer model with counters.

TeLLMe v2 (An efficient end-to-end ternary LLM prefill and decode accelerator with table-lookup matmul on edge FPGAs,
arXiv 2510.15926). Activations are cut into groups of 3 columns; a group's table holds its 27 signed sums, and the three
trits of a weight row become one 5-bit index into it. The tables of a block of 28 groups (84 columns) are built once a
token and serve all outputs. Results are the integers of the plain product.

Group size, digits, tables, lanes and the width of a memory word are parameters, so that TL1 and TL2 (bitnet.cpp, arXiv
2502.11880) and T-MAC (arXiv 2407.00088) are other points of the same model: `POINTS`.

From the paper and its authors' sources: index order, block, 768-bit words with five outputs and a 16-bit field behind
them, 24-bit accumulators, rounding. Reconstructed: where within its 140 bits an output's index j lies (bits 5j to
5j + 4, as the field's place suggests), the order of rounding in `dequantize`, and the cost of a table in additions.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LARGEST = 127
"""Quantised activations lie in [-127, 127]."""

CACHED = 1 << 20  # looked-up entries that are summed together, so that they stay in a cache


class Step(NamedTuple):
    """One addition of a table's construction: entry[target] = sign_of_parent entry[parent] + factor x[column]."""

    target: int
    parent: int
    sign_of_parent: int
    column: int
    factor: int


@dataclass(frozen=True)
class Counts:
    """What a product did. `padded_lookups` also counts those of columns that only fill a block."""

    table_additions: int = 0
    lookups: int = 0
    padded_lookups: int = 0
    accumulations: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.table_additions + other.table_additions,
            self.lookups + other.lookups,
            self.padded_lookups + other.padded_lookups,
            self.accumulations + other.accumulations,
        )


@dataclass(frozen=True)
class TableLookup:
    """A machine that multiplies by table lookup. The defaults are TeLLMe's on a KV260.

    group : columns an index stands for
    digits : "ternary" (-1, 0, 1) or "binary" (-1, 1: one bit-plane of T-MAC)
    tables : tables that exist at once; `tables` x `group` columns are a block
    lanes : outputs summed in a cycle
    word_bits, field_bits : a word from memory, and the bits behind its indices that carry something else
    reads : activations taken in a cycle while tables are built
    clock : Hz
    fill : cycles until the first result of a product; the paper gives no number
    """

    group: int = 3
    digits: Literal["ternary", "binary"] = "ternary"
    tables: int = 28
    lanes: int = 16
    word_bits: int = 768
    field_bits: int = 16
    accumulator_bits: int = 24
    reads: int = 1
    clock: float = 250e6
    fill: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.group <= 5:
            raise ValueError(f"group is {self.group}, expected 1 to 5 columns")
        if min(self.tables, self.lanes, self.reads) < 1 or self.fill < 0 or self.clock <= 0:
            raise ValueError("tables, lanes, reads and clock must be positive and fill not negative")
        if self.outputs_per_word < 1 or self.word_bits % 8 or not 0 <= self.field_bits <= 16:
            raise ValueError(
                f"a word of {self.word_bits} bits cannot hold the {self.tables * self.index_bits} bits of an output "
                f"and a field of {self.field_bits} bits (at most 16)"
            )

    @property
    def block(self) -> int:
        """Columns whose tables exist at once."""
        return self.group * self.tables

    @property
    def entries(self) -> int:
        return int((3 if self.digits == "ternary" else 2) ** self.group)

    @property
    def index_bits(self) -> int:
        return (self.entries - 1).bit_length()

    @property
    def outputs_per_word(self) -> int:
        return (self.word_bits - self.field_bits) // (self.tables * self.index_bits)

    @property
    def bits_per_weight(self) -> float:
        """Of the indices alone; `bus_bits_per_weight` counts whole words."""
        return self.index_bits / self.group

    @property
    def bus_bits_per_weight(self) -> float:
        return self.word_bits / (self.outputs_per_word * self.block)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)

    def words(self, rows: int) -> int:
        """Words of a block."""
        return -(-rows // self.outputs_per_word)

    # Tables

    def patterns(self) -> Tensor:
        """int8 [entries, group]: the digits that an index stands for.

        Ternary: nothing, then by number of terms, their places, and minus signs from the last place to the first, each
        with fewer minus than plus signs (or as many, the first being plus); then their negatives in the same order.
        """
        return _patterns(self.group, self.digits).clone()

    def chain(self) -> tuple[Step, ...]:
        """The additions that build the entries that are not negatives of others; see `_chain`."""
        return _chain(self.group, self.digits)

    def build_tables(self, x: Tensor) -> Tensor:
        """int16 [..., groups, entries] of activations int8 [..., columns], which are filled up with zeros to blocks.

        Done as the machine does it, one addition an entry (`chain`), the other half being negatives.
        """
        columns = x.shape[-1]
        padded = torch.nn.functional.pad(x.to(torch.int16), (0, self.blocks(columns) * self.block - columns))
        values = padded.view(*padded.shape[:-1], -1, self.group)
        entries = torch.zeros((*values.shape[:-1], self.entries), dtype=torch.int16)
        if self.digits == "ternary":
            entries[..., 1 : self.group + 1] = values  # single terms need no addition
        else:
            entries[..., 0] = values[..., 0]
        for target, parent, sign, column, factor in self.chain():
            entries[..., target] = sign * entries[..., parent] + factor * values[..., column]
        zero = int(self.digits == "ternary")
        half = (self.entries - zero) // 2
        entries[..., zero + half :] = -entries[..., zero : zero + half]
        return entries

    def encode(self, digits: Tensor) -> Tensor:
        """Indices uint8 [rows, groups] of weights int8 [rows, columns]; columns that fill a block hold index 0.

        ValueError where a weight is not a digit.
        """
        allowed = (-1, 0, 1) if self.digits == "ternary" else (-1, 1)
        if not bool(torch.isin(digits, torch.tensor(allowed, dtype=digits.dtype)).all()):
            raise ValueError(f"weights must be {self.digits} digits {allowed}")
        columns = digits.shape[1]
        filling = 0 if self.digits == "ternary" else 1  # that of index 0; the activations there are zeros
        missing = self.blocks(columns) * self.block - columns
        padded = torch.nn.functional.pad(digits.long(), (0, missing), value=filling)
        places = 3 ** torch.arange(self.group)
        index_of = torch.zeros(3**self.group, dtype=torch.uint8)
        index_of[((_patterns(self.group, self.digits).long() + 1) * places).sum(1)] = torch.arange(
            self.entries, dtype=torch.uint8
        )
        return index_of[((padded.view(len(digits), -1, self.group) + 1) * places).sum(2)]

    def decode(self, indices: Tensor, columns: int) -> Tensor:
        """Weights int8 [rows, columns] of indices."""
        if int(indices.max()) >= self.entries:
            raise ValueError(f"indices must be below {self.entries}, one is {int(indices.max())}")
        return _patterns(self.group, self.digits)[indices.long()].flatten(1)[:, :columns]

    # Product

    def multiply(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Counts]:
        """Integers int32 [tokens, rows] of activations int8 [tokens, columns] and indices [rows, groups].

        With indices [planes, rows, groups] the result is [planes, tokens, rows]: the planes share each block's tables.
        ValueError for activations of -128 and for so many columns that accumulators could overflow.
        """
        tokens, columns = x.shape
        self._check(x, indices)
        planes = indices if indices.dim() == 3 else indices[None]
        rows, groups = planes.shape[1:]
        sums = torch.zeros((len(planes), tokens, rows), dtype=torch.int32)
        at = (planes.long() + torch.arange(groups) * self.entries).view(len(planes), rows, -1, self.tables)
        window = max(1, CACHED // self.tables)
        for token, tables in enumerate(self.build_tables(x).flatten(1)):
            for block in range(self.blocks(columns)):
                for plane, first in itertools.product(range(len(planes)), range(0, rows, window)):
                    found = tables[at[plane, first : first + window, block]]
                    sums[plane, token, first : first + window] += found.sum(1, dtype=torch.int32)
        outputs = len(planes) * tokens * rows
        filled = -(-columns // self.group)
        counts = Counts(
            table_additions=tokens * filled * len(self.chain()),
            lookups=outputs * filled,
            padded_lookups=outputs * groups,
            accumulations=outputs * self.blocks(columns),
        )
        return (sums if indices.dim() == 3 else sums[0]), counts

    def _check(self, x: Tensor, indices: Tensor) -> None:
        columns = x.shape[1]
        if x.dtype != torch.int8 or (x.numel() and int(x.amin()) < -LARGEST):
            raise ValueError("activations must be int8 from -127 to 127")
        if LARGEST * columns >= 1 << (self.accumulator_bits - 1):
            raise ValueError(f"{columns} columns can overflow accumulators of {self.accumulator_bits} bits")
        if indices.shape[-1] != self.blocks(columns) * self.tables:
            raise ValueError(
                f"{columns} columns need {self.blocks(columns) * self.tables} indices a row, got {indices.shape[-1]}"
            )

    # Memory words

    def pack(self, indices: Tensor, field: Tensor | None = None) -> Tensor:
        """Words uint8 [blocks, words, word_bits / 8], bits in little-endian order, of indices [rows, groups].

        `field` int32 [blocks, words], of `field_bits` bits, stands behind the indices of each word.
        """
        rows, groups = indices.shape
        blocks, words = groups // self.tables, self.words(rows)
        missing = words * self.outputs_per_word - rows
        by_block = torch.nn.functional.pad(indices, (0, 0, 0, missing)).view(
            words, self.outputs_per_word, blocks, self.tables
        )
        bits = torch.zeros(blocks, words, self.word_bits, dtype=torch.uint8)
        end = self.outputs_per_word * self.tables * self.index_bits
        bits[..., :end] = _bits(by_block.permute(2, 0, 1, 3), self.index_bits).flatten(2)
        if field is not None and self.field_bits:
            bits[..., end : end + self.field_bits] = _bits(field, self.field_bits)
        return _from_bits(bits.view(blocks, words, -1, 8)).to(torch.uint8)

    def unpack(self, words: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Indices uint8 [rows, groups] and fields int32 [blocks, words] of packed words."""
        bits = _bits(words, 8).flatten(2)
        end = self.outputs_per_word * self.tables * self.index_bits
        stored = bits[..., :end].reshape(*words.shape[:2], self.outputs_per_word, self.tables, self.index_bits)
        by_row = _from_bits(stored).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[:rows]
        field = _from_bits(bits[..., end : end + self.field_bits])
        return by_row.to(torch.uint8), field.to(torch.int32)


TELLME = TableLookup()
# One table at a time, looked up for a vector register of outputs; words are what such a register takes. The clock is
# that of a common server core and no measurement.
TL1 = TableLookup(group=2, tables=1, lanes=32, word_bits=128, field_bits=0, accumulator_bits=32, reads=32, clock=3e9)
TL2 = TableLookup(group=3, tables=1, lanes=32, word_bits=160, field_bits=0, accumulator_bits=32, reads=32, clock=3e9)
T_MAC = TableLookup(
    group=4, digits="binary", tables=1, lanes=32, word_bits=128, field_bits=0, accumulator_bits=32, reads=32, clock=3e9
)
POINTS = {"TeLLMe": TELLME, "TL1": TL1, "TL2": TL2, "T-MAC": T_MAC}


class Quantised(NamedTuple):
    """Activations `values` int8 [tokens, columns] and `largest` float32 [tokens, 1]; value x largest / 127."""

    values: Tensor
    largest: Tensor


def quantise(x: Tensor) -> Quantised:
    """Per token m = max|x| and round(127 x / m), halves to even, within +-127; a token of zeros stays zero.

    ValueError where x is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("activations must be finite")
    exact = x.double()  # 127 x is exact, so that ties are those of the definition
    largest = exact.abs().amax(-1, keepdim=True)
    scaled = torch.round(exact * LARGEST / largest.where(largest > 0, 1.0))
    return Quantised(scaled.clamp(-LARGEST, LARGEST).to(torch.int8), largest.float())


def dequantise(sums: Tensor, largest: Tensor, weight_scale: float) -> Tensor:
    """fp16 [tokens, rows]: sums x (largest / 127) x weight_scale, rounded to fp16 once (sums alone do not fit fp16)."""
    return (sums.double() * (largest.double() / LARGEST) * weight_scale).half()


@functools.lru_cache(maxsize=8)
def _patterns(group: int, digits: str) -> Tensor:
    allowed = (-1, 0, 1) if digits == "ternary" else (-1, 1)

    def mirrored(pattern: tuple[int, ...]) -> bool:  # its negative is the one that is stored
        terms = [digit for digit in pattern if digit]
        minus = terms.count(-1)
        return 2 * minus > len(terms) or (2 * minus == len(terms) and bool(terms) and terms[0] < 0)

    def order(pattern: tuple[int, ...]) -> tuple[object, ...]:
        places = [i for i, digit in enumerate(pattern) if digit]
        minus = [-i for i, digit in enumerate(pattern) if digit < 0]
        return len(places), places, len(minus), sorted(minus)

    stored = sorted((p for p in itertools.product(allowed, repeat=group) if not mirrored(p)), key=order)
    positive = torch.tensor(stored, dtype=torch.int8)
    return torch.cat([positive, -positive[int(digits == "ternary") :]])


@functools.lru_cache(maxsize=8)
def _chain(group: int, digits: str) -> tuple[Step, ...]:
    """Ternary: an entry of n > 1 terms is one of n - 1 terms and one activation. Binary: the first entry takes
    group - 1 additions, every other differs from an earlier one in one sign, which is twice an activation."""
    patterns = _patterns(group, digits)
    known = {tuple(p): i for i, p in enumerate(patterns.tolist())}
    zero = int(digits == "ternary")
    half = (len(patterns) - zero) // 2
    steps: list[Step] = []
    if digits == "binary":
        steps += [Step(0, 0, 1, column, 1) for column in range(1, group)]
    for target in range(group + 1 if zero else 1, zero + half):
        steps.append(_step(patterns[target].tolist(), target, known, half, zero))
    return tuple(steps)


def _step(pattern: list[int], target: int, known: dict[tuple[int, ...], int], half: int, zero: int) -> Step:
    """How an entry comes from one that is built before it, or from the negative of one."""
    for column, digit in reversed(list(enumerate(pattern))):
        if not digit:
            continue
        other = list(pattern)
        other[column] = 0 if zero else -digit
        parent = known[tuple(other)]
        sign = 1
        if parent >= zero + half:
            parent, sign = parent - half, -1
        if parent < target:
            return Step(target, parent, sign, column, digit if zero else 2 * digit)
    raise AssertionError("every entry has a simpler one")


def _bits(values: Tensor, width: int) -> Tensor:
    """uint8 [..., width], the lowest bit first."""
    return (values.unsqueeze(-1).to(torch.int32) >> torch.arange(width, dtype=torch.int32) & 1).to(torch.uint8)


def _from_bits(bits: Tensor) -> Tensor:
    return (bits.to(torch.int32) << torch.arange(bits.shape[-1], dtype=torch.int32)).sum(-1, dtype=torch.int32)
