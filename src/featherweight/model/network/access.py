"""What choices of block and model scope see of the network: two protocols, so that the mathematics stays testable.

`featherweight.methods.calibrate` implements both: `BlockSession` with only one block in memory, and `WholeModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer


class BlockAccess(Protocol):
    """One block of the network in float, with its calibration inputs; see `featherweight.methods.calibrate`."""

    index: int
    names: list[str]
    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the block runs. What `weight` and `tensor` give, inputs and targets are in main memory."""
        ...

    @property
    def layers(self) -> Mapping[str, LinearLayer]:
        """Layer name -> anatomy."""
        ...

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Layers that share an input, in order of execution."""
        ...

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Hidden states of the stream quantised so far, a batch each [batch, tokens, hidden]."""
        ...

    @property
    def targets(self) -> Sequence[Tensor]:
        """Outputs of the full-precision block on the full-precision stream, a batch each."""
        ...

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """Tensors that were set, by checkpoint name; they are stored with the compressed model."""
        ...

    def weight(self, name: str) -> Tensor:
        """float32 [out, in], what the block computes with now; a copy."""
        ...

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Make the block compute with this weight [out, in]."""
        ...

    def tensor(self, tensor_name: str) -> Tensor:
        """A norm or bias of the block, by its name in the checkpoint."""
        ...

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        """Replace a norm or bias."""
        ...

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Add [out] to the bias of a layer, which gets one if it had none; listed in `changed` as NAME.bias."""
        ...

    @property
    def output_layer(self) -> str | None:
        """Module of the network's output layer, if this is the last block before it; `add_bias` takes it too."""
        ...

    def output_weight(self) -> Tensor:
        """float32 [vocabulary, hidden] of the output layer; a copy."""
        ...

    def output_inputs(self, hidden: Tensor, batch_index: int) -> Tensor:
        """What the output layer reads [batch, tokens, hidden] for hidden states behind the last block."""
        ...

    def original(self) -> AbstractContextManager[None]:
        """Within it, the block computes with its original weights and tensors."""
        ...

    def run(self, hidden: Tensor, batch_index: int) -> Tensor:
        """The block's output for hidden states of batch `batch_index`; differentiable."""
        ...

    def overridden(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it, `run` uses these tensors in place of weights (by layer name) or of norms and biases (by tensor
        name); gradients flow into them."""
        ...


class ModelAccess(Protocol):
    """A whole causal language model in float, with windows of calibration text."""

    @property
    def device(self) -> torch.device:
        """Where the model runs, and what `hidden` and `head` give is. What `weight` and `tensor` give is in main
        memory."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """Of the checkpoint."""
        ...

    @property
    def model(self) -> Any:
        """The PreTrainedModel."""
        ...

    @property
    def layers(self) -> Mapping[str, LinearLayer]:
        """Layer name -> anatomy."""
        ...

    @property
    def windows(self) -> Sequence[Tensor]:
        """Token ids int64 [tokens] to calibrate with."""
        ...

    @property
    def held_out(self) -> Sequence[Tensor]:
        """Token ids int64 [tokens] that nothing is fitted to; for choosing the best step."""
        ...

    @property
    def changed(self) -> Mapping[str, Tensor]:
        """Tensors that were set, by checkpoint name; they are stored with the compressed model."""
        ...

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that must change with them."""
        ...

    def weight(self, name: str) -> Tensor:
        """float32 [out, in] of the original model, or what was set; a copy."""
        ...

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace the weight of a linear layer."""
        ...

    def tensor(self, tensor_name: str) -> Tensor:
        """Any tensor, by its name in the checkpoint; a copy."""
        ...

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        """Replace any tensor."""
        ...

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output layer reads [batch, tokens, hidden] for token ids int64 [batch, tokens]; differentiable."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] for what the output layer reads."""
        ...

    def overridden(
        self, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """Within it, the model uses these weights (by layer) and tensors (by checkpoint name); differentiable."""
        ...

    def original(self) -> AbstractContextManager[None]:
        """Within it, no override counts: the teacher."""
        ...
