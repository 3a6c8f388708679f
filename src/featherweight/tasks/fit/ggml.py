"""A fit whose choices are ggml's own types: a plain GGUF of so many bytes, for llama.cpp and what is built on it.

Blocks come from ggml's own encoder, with the diagonals of the second moments as its importance matrix. Which types a
matrix may have hangs on its width: rows that are no whole blocks of 256 weights have the types of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import FeatherError
from featherweight.interop.exporting import export, remove
from featherweight.interop.gguf_writing.architecture import architecture_of, placed_tensors
from featherweight.interop.gguf_writing.block_types import TYPES, decode_blocks
from featherweight.interop.gguf_writing.ggml_library import check_library, encode_rows
from featherweight.interop.gguf_writing.importance import names_by_module
from featherweight.interop.stored import StoredModel
from featherweight.storage.checkpoint.anatomy import LinearLayer
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.codes import Code
from featherweight.storage.codes.dense import Dense
from featherweight.system.files import PART_SUFFIX
from featherweight.tasks.compress.plan import Job
from featherweight.tasks.compress.solve import HELD_OUT, InputStatistics, output_error
from featherweight.tasks.fit.choosing import Problem
from featherweight.tasks.fit.curves import Curves, Measured
from featherweight.tasks.fit.making import ATTEMPTS, Made, too_large
from featherweight.tasks.fit.study import Study
from featherweight.tasks.fit.ways import Way

KINDS = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K"),
    *("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"),
)
"""Types that compete."""
SLACK = 0.005
"""Of the budget: a file that leaves more is made once more with what is left."""


class GgmlCurves(Curves):
    """Bytes and errors of ggml's types in each layer."""

    def _one(self, job: Job, way: Way, inputs: InputStatistics, exactly: bool = False) -> Measured:
        kind = TYPES[way.name]
        key = self._key(job.layer.name, {"ggml": kind.name})
        record = self.store.record(key)
        if record is None:
            source = LayerWeight(self.checkpoint, job.layer)
            source.scan(self.plan.options.window_rows(source.shape, source.dtype.itemsize, 1))
            weight = source.rows(0, source.shape[0]).float().contiguous()
            gram = inputs.statistics.get("gram")
            importance = None if gram is None else gram.diagonal().float().numpy().copy()
            blocks = torch.from_numpy(encode_rows(kind, weight.numpy(), importance))
            judge = inputs.statistics.get(HELD_OUT, gram)
            code = _decoded(kind.name, blocks, weight.shape)
            judge = torch.eye(weight.shape[1]) if judge is None else judge
            error = output_error(weight, code, judge)
            record = {"error": error, "nbytes": blocks.numel(), "type": kind.name, "shape": list(weight.shape)}
            self.store.keep(key, {"blocks": blocks}, record)
        return Measured(way, int(record["nbytes"]), float(record["error"]), key)

    def _allow_for_descents(self, jobs: Sequence[Job], ways: Callable[[LinearLayer], Sequence[Way]]) -> None:
        """Nothing follows ggml's encoder."""

    def code(self, one: Measured) -> Code:
        record, tensors = self.store.load(one.key)
        return _decoded(record["type"], tensors["blocks"], record["shape"])


def _decoded(name: str, blocks: torch.Tensor, shape: Sequence[int]) -> Dense:
    kind = TYPES[name]
    values = decode_blocks(kind, blocks.numpy().reshape(-1, kind.nbytes))
    return Dense(torch.from_numpy(values.reshape(tuple(shape)).copy()))


class GgmlStudy(Study):
    """What is known of a model that is to become a GGUF. FeatherError where ggml's encoder or the architecture is
    missing."""

    def _curves(self) -> Curves:
        check_library(TYPES["Q4_K"])
        with StoredModel(self.checkpoint.folder) as stored:
            placed, lost = placed_tensors(stored, architecture_of(stored))
        if lost:
            raise FeatherError(f"{lost[0]} has no place in a GGUF")
        self.names = names_by_module(placed)
        self.overhead = sum(4 * one.tensor.elements for one in placed if len(one.tensor.shape) != 2)
        return GgmlCurves(self.plan, self.checkpoint, self.store, self._statistics(), self.settings.seed)

    def ways(self, layer: LinearLayer) -> tuple[Way, ...]:
        names = self.settings.ways or KINDS
        unknown = [name for name in names if name.upper() not in TYPES]
        if unknown:
            raise FeatherError(f"ggml has no type {unknown[0]!r}; types: {', '.join(KINDS)}")
        kinds = [TYPES[name.upper()] for name in names]
        fitting = [kind.name for kind in kinds if kind.fits_columns(layer.shape[1])] or ["F16"]
        return tuple(Way(name, (), {}, {}) for name in fitting)  # rows are shared whole, whatever the type

    def file_bytes(self, problem: Problem, chosen: Mapping[str, int]) -> int:
        return self.overhead + problem.nbytes(chosen)

    def types(self, problem: Problem, chosen: Mapping[str, int]) -> dict[str, str]:
        """Type of each matrix, by its name in the folder."""
        return {f"{name}.weight": problem.measured[name][place].way.name for name, place in chosen.items()}


def make_gguf(study: GgmlStudy, problem: Problem, budget: int | None, out: Path) -> Made:
    """The file; made anew where it is too large, or leaves more than SLACK, as its tokenizer's size is only known
    then. FeatherError where it is larger than the budget whatever is tried."""
    nbytes = 0
    part = out.with_name(f"{out.name}.fit{PART_SUFFIX}")
    statistics = study.statistics
    for _ in range(ATTEMPTS):
        chosen, refined = study.choose(problem, budget)
        types = study.types(problem, chosen)
        settings: dict[str, Any] = {"types": types}
        if statistics is not None:
            settings["imatrix"] = statistics
        remove(part)
        nbytes = export(study.checkpoint.folder, "gguf", part, settings=settings).bytes
        beside = nbytes - problem.nbytes(chosen)  # metadata, vectors, padding
        known, study.overhead = study.overhead == beside, beside
        if budget is None or nbytes <= budget and (known or nbytes >= (1 - SLACK) * budget):
            part.rename(out)
            lines = tuple(
                f"--tensor-type {study.names[name.removesuffix('.weight')]}={kind.lower()}"
                for name, kind in types.items()
            )
            return Made(out, chosen, refined, {"name": "fit", "types": types}, nbytes, None, lines)
    remove(part)
    raise too_large(out, nbytes)
