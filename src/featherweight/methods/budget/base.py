"""The axis of allocation: how much each layer gets.

An allocator is given every layer's candidates: treatments, the bytes each would store and, if it asks for them, the
error each would leave. It names one of them for every layer.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from featherweight.methods.quantize.base import Choice
from featherweight.methods.quantize.treatment import Treatment
from featherweight.storage.checkpoint.anatomy import LinearLayer


@dataclass(frozen=True)
class Candidate:
    """A treatment that a layer may get.

    Attributes
    ----------
    treatment : its choices
    nbytes : bytes stored for the layer, from the layout of its code
    error : relative squared error of the layer with it, no unit: ||W - Q||^2 / ||W||^2 of the weights, or
        tr(E G E') / tr(W G W') of the outputs, E = W - Q, G the second moment of its inputs; None where the allocator
        did not ask for errors
    """

    treatment: Treatment
    nbytes: int
    error: float | None = None


@dataclass(frozen=True)
class LayerCandidates:
    """What may be done to one layer.

    Attributes
    ----------
    shape : (out_features, in_features)
    candidates : at least one
    layer : what it is in its model; None for a matrix of which only the shape is known
    importance : of its block, more for a higher value; None where the allocator did not ask for it
    """

    shape: tuple[int, int]
    candidates: tuple[Candidate, ...]
    layer: LinearLayer | None = None
    importance: float | None = None

    @classmethod
    def of(
        cls, layer: LinearLayer, treatments: Sequence[Treatment], errors: Sequence[float] | None = None
    ) -> LayerCandidates:
        """Candidates from treatments, with the bytes they store and the errors where these are known."""
        known: Sequence[float | None] = (None,) * len(treatments) if errors is None else errors
        found = (Candidate(t, t.nbytes(layer.shape), error) for t, error in zip(treatments, known, strict=True))
        return cls(layer.shape, tuple(found), layer)

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


class Allocator(Choice, abc.ABC):
    """How much each layer gets.

    needs_errors : whether `assign` wants candidates with measured errors; measuring makes the code of every candidate
    """

    needs_errors: ClassVar[bool] = False

    @property
    def judges(self) -> Literal["weights", "outputs"]:
        """Of what errors are measured. Outputs take second moments, which `needs` then names; where it names them and
        errors are of weights, codes are made with them all the same."""
        return "outputs" if self.needs else "weights"

    @property
    def importance(self) -> str | None:
        """The score of blocks that `assign` orders them by: "lim" or "zd"; None for none."""
        return None

    @property
    def measures(self) -> bool:
        """Whether layers or blocks are measured before `assign` is asked."""
        return self.needs_errors or self.importance is not None

    def treatments(self, treatment: Treatment) -> tuple[Treatment, ...]:
        """The treatments that a layer may get in the place of the one its recipe gives it, this one among them or not.

        Not asked for layers whose grid an override names: these keep it.
        """
        return (treatment,)

    def most_bytes(self, layers: Mapping[str, LayerCandidates]) -> int:
        """An upper bound of the bytes that `assign` gives to all layers, known without errors."""
        return sum(max(candidate.nbytes for candidate in layer.candidates) for layer in layers.values())

    @abc.abstractmethod
    def assign(self, layers: Mapping[str, LayerCandidates]) -> dict[str, Treatment]:
        """The treatment of every layer, one of its candidates'.

        Raises RecipeError where the budget cannot be met.
        """
