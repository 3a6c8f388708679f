"""GGUF, the format of llama.cpp and what is built on it: the whole model in one file, with tokenizer and metadata.

Codes that blocks of ggml hold are taken over bit by bit, without the weights; others are decoded and rounded, and what
that changes is measured. `interop/gguf_writing` has the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor

from featherweight.errors import CheckpointError, OutputError
from featherweight.interop.exports import Exporter, Told, Verdict
from featherweight.interop.gguf_writing.architecture import (
    Architecture,
    Placed,
    architecture_of,
    placed_tensors,
    rope_factors,
)
from featherweight.interop.gguf_writing.block_types import TYPES, BlockType, Bytes
from featherweight.interop.gguf_writing.choice import Choice, Wishes, choose
from featherweight.interop.gguf_writing.ggml_library import check_library
from featherweight.interop.gguf_writing.importance import Importance, names_by_module, read_importance
from featherweight.interop.gguf_writing.metadata import add_hyperparameters
from featherweight.interop.gguf_writing.mixtures import known_types, type_in
from featherweight.interop.gguf_writing.planes import add_keys, exact_scales, plane_rows, planes_of
from featherweight.interop.gguf_writing.rows import OWN, Loss, encoded_rows
from featherweight.interop.gguf_writing.vocabulary import Vocabulary, vocabulary_of
from featherweight.interop.gguf_writing.writing import Item, header, write_file
from featherweight.interop.stored import StoredModel
from featherweight.registry import nearest, register
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.version import __version__

MOSTLY = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15},
    **{"Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26},
    **{"IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41},
}
"""`general.file_type`: the type that most weights are of, by llama.cpp's numbers for whole files."""


@dataclass
class Part:
    """A tensor on its way: place, type, and what it came to lose."""

    placed: Placed
    choice: Choice
    planes: TritPlanes | None = None
    loss: Loss = field(default_factory=Loss)

    def verdict(self, *, done: bool) -> Verdict:
        """done : whether it is written"""
        choice, name = self.choice, self.placed.tensor.name
        error = None
        if choice.fate == "exact":
            error = 0.0
        elif done:
            error = self.loss.error
        becomes, bits = choice.type.name, choice.type.bits
        if self.planes is not None:
            becomes, bits = f"{self.planes.planes} x {becomes}", bits * self.planes.planes
        return Verdict(name, becomes, choice.fate, bits, choice.why, error)


@dataclass
class _Plan:
    """What was found out for the verdicts, so that it is not again for the writing."""

    model: StoredModel
    parts: list[Part]
    lost: list[str]
    vocabulary: Vocabulary | None


@register("exporter", "gguf")
class Gguf(Exporter):
    """See the module. What is not set is decided tensor by tensor."""

    title: ClassVar[str] = "GGUF"
    is_file: ClassVar[bool] = True

    type: str = Field(
        "auto",
        description="Of matrices: auto takes codes over where a type holds them and leaves plain values as they are; a "
        "type (q8_0, q4_0, bf16) or a mixture (q4_k_m) encodes all of them",
    )
    ternary: Literal["auto", "tq1_0", "tq2_0", "q2_0", "q1_0", "q2_k"] = Field(
        "auto", description="Of one plane of trits: q2_k is for programs that know no newer type and rounds the scales"
    )
    other: Literal["auto", "q8_0", "bf16", "f16", "f32"] = Field(
        "auto", description="Of codes that no type holds: q8_0 where not set"
    )
    lossless: bool = Field(False, description="Rather a larger type than values that differ by rounding")
    planes: Literal["joined", "siblings"] = Field(
        "joined",
        description="siblings: trit-planes as tensors NAME.ptqtp0, ptqtp1, ..., for engines that add planes up",
    )
    imatrix: Path | None = Field(
        None, description="An importance matrix of llama.cpp, or statistics of `feather calibrate`, to encode by"
    )
    types: dict[str, str] = Field(
        {}, description="Of single matrices, by their names in the folder: {model.embed_tokens.weight: q6_k}"
    )
    pre: str = Field("", description="llama.cpp's name for how the tokenizer cuts words, where it is not found out")
    name: str = Field("", description="Of the model, in the file; the folder's where not set")
    _plan: _Plan | None = PrivateAttr(None)

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        known = ("auto", *known_types())
        if value.lower() not in known:
            raise ValueError(f"there is no such type{nearest(value, known)}; types: {', '.join(known)}")
        return value.lower()

    @field_validator("types")
    @classmethod
    def _all_known(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            if name.upper() not in TYPES:
                raise ValueError(f"there is no such type{nearest(name, TYPES)}; types: {', '.join(TYPES)}")
        return value

    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        found = architecture_of(model)
        parts, lost = self._parts(model, found)
        self._check_library(parts)
        vocabulary = None if lost else self._vocabulary(model, parts)
        self._plan = _Plan(model, parts, lost, vocabulary)
        missing = [
            Verdict(name, "nothing", "impossible", 0.0, f"llama.cpp's {found.name} has no such tensor") for name in lost
        ]
        return (*(part.verdict(done=False) for part in parts), *missing)

    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        found = architecture_of(model)
        if self._plan is None or self._plan.model is not model:
            self.verdicts(model)
        assert self._plan is not None
        parts, lost = self._plan.parts, self._plan.lost
        if lost:
            raise OutputError(f"{lost[0]} has no place in a GGUF of {found.name}")
        importance = self._importance(parts)
        total = sum(_source_bytes(part) for part in parts)
        done = 0

        def count(item: Item, written: int) -> None:
            nonlocal done
            done += written * sizes.get(item.name, 0) // max(1, item.nbytes)
            told(min(done, total), total)

        with header(out, found.name) as writer:
            self._add_metadata(writer, model, found, parts)
            items = [item for part in parts for item in _items(part, importance)]
            sizes = {item.name: _source_bytes(part) for part in parts for item in _items(part, importance)}
            items += [_extra(name, values) for name, values in rope_factors(model.config, found).items()]
            write_file(writer, items, count)
        told(total, total)
        return [part.verdict(done=True) for part in parts]

    def _parts(self, model: StoredModel, found: Architecture) -> tuple[list[Part], list[str]]:
        placed, lost = placed_tensors(model, found)
        blocks = int(model.config["num_hidden_layers"])
        tied = not any(one.name == "output.weight" for one in placed)
        wishes = Wishes(
            None,
            None if self.ternary == "auto" else self.ternary.upper(),
            None if self.other == "auto" else self.other.upper(),
            self.lossless,
        )
        parts = []
        for one in placed:
            own = wishes
            if self.type != "auto":
                own = replace(wishes, type=type_in(self.type.upper(), one.name, blocks, tied))
            if one.tensor.name in self.types:
                own = replace(wishes, type=self.types[one.tensor.name].upper())
            code = planes_of(one.tensor) if self.planes == "siblings" and self.type == "auto" else None
            if code is None:
                parts.append(Part(one, choose(one.tensor, own)))
                continue
            exact = exact_scales(code)
            why = "" if exact else "trits as they are; scales rounded to fp16"
            parts.append(Part(one, Choice(TYPES["TQ2_0"], "exact" if exact else "rounded", why), code))
        return parts, lost

    def _importance(self, parts: list[Part]) -> Importance | None:
        if self.imatrix is None:
            return None
        return read_importance(self.imatrix.expanduser(), names_by_module([part.placed for part in parts]))

    def _check_library(self, parts: list[Part]) -> None:
        """OutputError before the work, where ggml's own encoder is needed and not here."""
        for part in parts:
            kind = part.choice.type
            encoded = part.choice.form is None and part.planes is None and kind.name not in ("F32", "F16", "BF16")
            if encoded and (kind.name not in OWN or self.imatrix is not None):
                check_library(kind)
        self._importance(parts)

    def _add_metadata(
        self, writer: gguf.GGUFWriter, model: StoredModel, found: Architecture, parts: list[Part]
    ) -> None:
        writer.add_type("model")
        vocabulary = self._plan.vocabulary if self._plan is not None else None
        assert vocabulary is not None
        writer.add_name(_safe_name(self.name or model.folder.resolve().name, vocabulary))
        writer.add_quantized_by(f"featherweight {__version__}")
        if model.recipe:
            writer.add_string("featherweight.recipe", model.recipe)
        add_hyperparameters(writer, model.config, found)
        vocabulary.add_to(writer)
        most = _most(parts)
        writer.add_file_type(MOSTLY[most.name])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        codes = [part.planes for part in parts if part.planes is not None]
        if codes:
            add_keys(writer, codes)

    def _vocabulary(self, model: StoredModel, parts: list[Part]) -> Vocabulary:
        rows = [part.placed.tensor.shape[0] for part in parts if part.placed.name == "token_embd.weight"]
        if not rows:
            raise CheckpointError(f"{model.folder} has no embedding: a GGUF is a whole model")
        return vocabulary_of(model.folder, model.config, rows[0], self.pre)


def _most(parts: list[Part]) -> BlockType:
    """The type that most weights of matrices are of."""
    counts: dict[str, int] = {}
    for part in parts:
        if len(part.placed.tensor.shape) == 2:
            counts[part.choice.type.name] = counts.get(part.choice.type.name, 0) + part.placed.tensor.elements
    return TYPES[max(counts, key=lambda name: counts[name])]


def _safe_name(name: str, vocabulary: Vocabulary) -> str:
    """llama.cpp takes a name with "phi3" in it for a sign that the vocabulary is Phi-3's, and fails where it is not."""
    if not any(part in name.lower() for part in ("phi-3", "phi3")):
        return name
    own = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(vocabulary.tokens)
    return name if own else name.lower().replace("phi-3", "phi_3").replace("phi3", "phi_3")


def _source_bytes(part: Part) -> int:
    return part.placed.tensor.elements * 4


def _items(part: Part, importance: Importance | None) -> list[Item]:
    """The tensors of the file that a tensor of the model becomes."""
    placed, choice = part.placed, part.choice
    if part.planes is not None:
        code = part.planes
        return [
            Item(
                f"{placed.name}.ptqtp{k}", code.shape, choice.type, _ordered(placed.order, _plane_maker(part, code, k))
            )
            for k in range(code.planes)
        ]
    if len(placed.tensor.shape) != 2:
        return [Item(placed.name, placed.tensor.shape, choice.type, lambda: _vector(placed))]
    weights = None if importance is None else importance.means.get(placed.name)
    return [Item(placed.name, placed.tensor.shape, choice.type, _ordered(placed.order, _maker(part, weights)))]


def _maker(part: Part, weights: NDArray[np.float32] | None) -> Callable[[], Iterator[Bytes]]:
    return lambda: encoded_rows(part.placed.tensor, part.choice, part.loss, weights)


def _plane_maker(part: Part, code: TritPlanes, plane: int) -> Callable[[], Iterator[Bytes]]:
    return lambda: plane_rows(code, plane)


def _ordered(order: Tensor | None, rows: Callable[[], Iterator[Bytes]]) -> Callable[[], Iterator[Bytes]]:
    """Rows in another order: whole, as the first may be the last."""
    if order is None:
        return rows
    return lambda: iter([np.concatenate(list(rows()))[order.numpy()]])


def _vector(placed: Placed) -> Iterator[Bytes]:
    """Norms and biases: float32."""
    values = placed.tensor.values().float()
    if placed.shift:
        values = values + placed.shift
    if placed.order is not None:
        values = values[placed.order]
    yield values.contiguous().numpy().view(np.uint8).reshape(1, -1)


def _extra(name: str, values: Tensor) -> Item:
    data = values.to(torch.float32).numpy().view(np.uint8).reshape(1, -1)
    return Item(name, tuple(values.shape), TYPES["F32"], lambda: iter([data]))
