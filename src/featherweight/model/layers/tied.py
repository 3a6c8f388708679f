"""An output layer whose matrix is the code of the token embedding: stored once, packed once, tied like a plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.model.layers.modules import CodedModule, FeatherLinear, Packed
from featherweight.model.layers.weight import DecodedWeight


class TiedLinear(FeatherLinear):
    """y = x E^T + b with E [vocabulary, hidden], the code that an embedding holds.

    It stores nothing but a bias: codes, the packed matrix and a decoded one that is kept are the embedding's.

    Parameters
    ----------
    embedding : the module that holds the code
    bias : that of the plain layer, [vocabulary], or None
    name : the module's name, for error messages
    """

    def __init__(self, embedding: CodedModule, bias: nn.Parameter | None = None, *, name: str = "") -> None:
        nn.Module.__init__(self)
        self.__dict__["embedding"] = embedding  # no submodule: its tensors are stored under one name
        self.layout = {}
        self.spec, self.name = embedding.spec, name
        self.input_rounding, self.factored = embedding.input_rounding, embedding.factored
        self.compute_dtype, self.precision, self.cache = embedding.compute_dtype, "float", False
        self._cached = self._packed = None
        self._is_hf_initialized = True
        self.out_features, self.in_features = embedding.spec["shape"]
        self._parameters["bias"] = bias

    @property
    def source(self) -> CodedModule:
        """The module that holds the code."""
        held: CodedModule = self.__dict__["embedding"]
        return held

    def _stored_device(self) -> torch.device:
        return self.source._stored_device()

    def _stored(self) -> dict[str, Tensor]:
        return self.source._stored()

    def _read(self, stored: dict[str, Tensor], read: Any) -> tuple[Tensor, ...]:
        return self.source._read(stored, read)

    def decode(self) -> Tensor:
        """The embedding's matrix, float32 [vocabulary, hidden]."""
        return self.source.decode()

    def packed(self) -> Packed | None:
        """That of the embedding."""
        self._packed = None if self.source.packed() is None else self.source._packed
        return None if self._packed is None else self._packed[1]

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        return self.source._decoded(dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, DecodedWeight):
            return  # transformers 4 ties anew: to the matrix that it is tied to
        super().__setattr__(name, value)


def tie(model: Any) -> None:
    """Make a model's output layer that of its compressed embedding, if config.json ties the two.

    transformers would tie parameters, of which there are none: what it knows of these two is taken out.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, CodedModule) or head is None or isinstance(head, CodedModule):
        return
    names = {id(module): name for name, module in model.named_modules()}
    own = {f"{names[id(module)]}.weight" for module in (embedding, head)}
    model.set_output_embeddings(TiedLinear(embedding, head._parameters.get("bias"), name=names[id(head)]))
    known = getattr(model, "_tied_weights_keys", None)
    if isinstance(known, dict):
        model._tied_weights_keys = {k: v for k, v in known.items() if not {k, v} & own}
        model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if not {k, v} & own}
    elif known:
        model._tied_weights_keys = [name for name in known if name not in own]
