"""Importance matrices for llama.cpp's own quantiser, from statistics that `feather calibrate --needs gram` gathered.

`llama-quantize --imatrix FILE` takes them; one that llama.cpp gathered goes the other way, as the setting `imatrix` of
GGUF.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from featherweight.errors import RecipeError
from featherweight.interop.exports import Exporter, Told, Verdict
from featherweight.interop.gguf_writing.architecture import architecture_of, placed_tensors
from featherweight.interop.gguf_writing.importance import from_statistics, names_by_module, write_importance
from featherweight.interop.stored import StoredModel
from featherweight.methods.calibrate.statistics_file import StatisticsFile
from featherweight.registry import register


@register("exporter", "imatrix")
class Imatrix(Exporter):
    """The mean square of every input column of every layer; the model gives names alone."""

    title: ClassVar[str] = "an importance matrix"
    is_file: ClassVar[bool] = True

    statistics: Path | None = Field(None, description="File of `feather calibrate MODEL --needs gram`")
    form: Literal["gguf", "dat"] = Field("gguf", description="gguf, or dat for programs that read the older form alone")

    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        with self._open(model) as statistics:
            placed = self._placed(model)
            from_statistics(statistics, placed)
            return tuple(
                Verdict(f"{module}.weight", "mean squares", "exact", 32 / model.tensors[f"{module}.weight"].shape[0])
                for module in placed
                if statistics.place(module) is not None
            )

    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        with self._open(model) as statistics:
            found = from_statistics(statistics, self._placed(model))
        write_importance(found, out, self.form)
        told(1, 1)
        return self.verdicts(model)

    def _open(self, model: StoredModel) -> StatisticsFile:
        if self.statistics is None:
            raise RecipeError(
                "an importance matrix is made of statistics: --set statistics=FILE of `feather calibrate`"
            )
        return StatisticsFile.open(self.statistics.expanduser(), model.checkpoint)

    @staticmethod
    def _placed(model: StoredModel) -> dict[str, str]:
        found, _ = placed_tensors(model, architecture_of(model))
        return names_by_module(found)
