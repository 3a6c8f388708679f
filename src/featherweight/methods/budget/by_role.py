"""A finer grid for the layers that cost most, told by what they are: no measuring, no data.

Where queries share heads of keys and values, these layers are few and all of a block's attention goes through them; the
last layers of the first and last MLPs write into a stream that is still, or already, what is predicted from. Not from a
paper; llama.cpp's mixed types give more bits to much the same layers. docs/results.md has what was measured: the
divergence that noise of the same relative size in single layers causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from featherweight.methods.budget.base import Allocator, LayerCandidates
from featherweight.methods.quantize.choosing import with_settings
from featherweight.methods.quantize.treatment import Treatment
from featherweight.registry import register
from featherweight.storage.checkpoint.anatomy.geometry import attention_part, is_last


@register("allocation", "by-role")
class ByRole(Allocator):
    """The recipe's grid, and a finer one for layers that cost most by what they are (see the module)."""

    grid: dict[str, Any] = Field(
        ..., description="what those layers get in place of the recipe's grid's settings; with a kind, another grid"
    )
    attention: tuple[Literal["q", "k", "v", "o"], ...] = Field(
        ("k", "v"), description="which layers of an attention, where they are layers of their own"
    )
    widest: float = Field(
        0.5, gt=0, description="of queries, keys and values only those with at most so many outputs for each input"
    )
    ends: float = Field(
        0.07,
        ge=0,
        le=0.5,
        description="share of the blocks at either end, one at least, whose MLPs' last layers get it",
    )
    last_mlps: int = Field(0, ge=0, description="blocks at the end of whose MLPs all layers get it")

    def treatments(self, treatment: Treatment) -> tuple[Treatment, ...]:
        """The recipe's own, and that with the finer grid. RecipeError naming the setting that is wrong."""
        return treatment, replace(treatment, grid=with_settings("grid", treatment.grid, self.grid, "allocation.grid"))

    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        blocks = 1 + max((x.layer.block for x in layers.values() if x.layer and x.layer.block is not None), default=-1)
        return {
            name: layer.candidates[-1 if self._matters(layer, blocks) else 0].treatment
            for name, layer in layers.items()
        }

    def _matters(self, candidates: LayerCandidates, blocks: int) -> bool:
        """Whether a layer, of a model with so many blocks, is one of those that cost most."""
        layer = candidates.layer
        if layer is None or layer.block is None:
            return False
        if layer.kind == "attention":
            part = attention_part(layer)
            outputs, inputs = layer.shape
            return part in self.attention and (part == "o" or outputs <= self.widest * inputs)
        if layer.kind not in ("mlp", "expert"):
            return False
        ends = max(1, round(self.ends * blocks)) if self.ends else 0
        from_end = min(layer.block, blocks - 1 - layer.block)
        return (is_last(layer) and from_end < ends) or blocks - layer.block <= self.last_mlps
