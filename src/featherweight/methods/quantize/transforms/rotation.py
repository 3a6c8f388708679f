"""Rotation of the residual stream by a randomised Hadamard matrix, folded into the weights (QuaRot; RSQ's step R).

QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456), as used by RSQ (arXiv 2503.01820) and, with
blocks of 128, by D2Quant (arXiv 2602.02546). For models with RMS norms: the norms' weights are folded into the layers
that read them and become one; then the embedding's rows, what the readers read, and what the other layers write are
rotated: E T', W T', T W. With `heads`, v_proj's heads and o_proj's columns are rotated within each head, which cancels
as well. All in float64. A head that is tied to the embedding gets a tensor of its own, because only it absorbs the last
norm's weight.

Where this departs: no means are taken off the embedding's rows (the reference does, which is right for layer norms
only); instead of the online Hadamard transforms of whole inputs of o_proj and down_proj, a recipe may add the layer
transform `hadamard` for these roles, which works in blocks. The function is compared on a few tokens, and a model
whose function changes (norms that add one to their weight, norms behind layers) is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.events import Observer, silent
from featherweight.methods.quantize.base import Scope, Transform
from featherweight.methods.quantize.transforms.hadamard import block_for
from featherweight.model.network.access import ModelAccess
from featherweight.registry import register
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.codes.hadamard import SEEDS, hadamard_transform, rotate

PRESERVED = 1e-3  # relative change of logits that is put down to arithmetic,
PASSES = 4.0  # units of the type that the network runs in, by which its logits are uncertain
ROUNDINGS = 4  # and this many times what storing the head in the model's dtype changed in it
TOKENS = 16


@register("transform", "rotation")
class ResidualRotation(Transform):
    """Rotate the residual stream, and the heads of v_proj (see the module)."""

    scope: ClassVar[Scope] = "model"

    block: Annotated[int, Field(ge=1)] | Literal["whole"] = Field(
        "whole",
        description="channels rotated together, odd part up to 63; where a power of two does not divide, the largest "
        "that does; whole: the width, or its largest divisor of such an odd part",
    )
    heads: bool = Field(True, description="also rotate v_proj's outputs within each head")

    def refusal(self, anatomy: Anatomy) -> str | None:
        try:
            _final_norm(anatomy)
        except RecipeError as error:
            return str(error).removeprefix("transform rotation ")
        if len(anatomy.embeddings) != 1 or anatomy.family == "structure":
            what = [*anatomy.embeddings[1:], "a model without a family file"][0]
            return f"cannot rotate around {what}; use the layer transform hadamard"
        return None

    def transform_model(self, model: ModelAccess, notify: Observer = silent, seed: int = 0) -> None:
        """Set all tensors that change. RecipeError for a model that cannot be rotated."""
        anatomy = model.anatomy
        final_norm = _final_norm(anatomy)
        width = _width(model, anatomy, final_norm)
        ids = model.windows[0] if len(model.windows) else torch.arange(TOKENS, device="cpu")
        ids = ids[:TOKENS].unsqueeze(0)
        try:
            block = block_for(width, self.block)
        except ValueError as error:
            raise RecipeError(f"transform rotation: {error}") from None
        before = _logits(model, ids)
        _fold_norms(model, anatomy, final_norm)
        turn = _Turn(block, seed % SEEDS)
        for layer in anatomy.layers:
            _turn_layer(model, layer, turn)
        for name in anatomy.embeddings:
            model.set_tensor(name, turn(model.tensor(name).double()))
        head = anatomy.head
        head_tensor = head.tensor if head else f"{anatomy.tied[0][0]}.weight"
        turned = turn(model.tensor(head_tensor).double())
        model.set_tensor(head_tensor, turned)
        rounded = float((model.tensor(head_tensor).double() - turned).norm() / turned.norm())
        if self.heads:
            _turn_heads(model, anatomy)
        change = float((_logits(model, ids) - before).norm() / before.norm())
        notify({"event": "rotation", "block": block, "relative_change_of_logits": change})
        with torch.no_grad():
            passes = PASSES * torch.finfo(model.hidden(ids).dtype).eps
        if not change <= PRESERVED + ROUNDINGS * rounded + passes:
            raise RecipeError(
                f"transform rotation changes the function of this model (its logits by {change:.2g}): it has norms or "
                "paths that the rotation does not know; use the layer transform hadamard"
            )


class _Turn:
    """x -> T x along the last dimension."""

    def __init__(self, block: int, seed: int) -> None:
        self.block, self.seed = block, seed

    def __call__(self, x: Tensor) -> Tensor:
        return rotate(x, self.block, self.seed)


def _final_norm(anatomy: Anatomy) -> str:
    """The weight of the norm behind the last block; RecipeError for models without RMS norms in front of layers."""
    if any(name.endswith(".bias") for name in anatomy.norms):
        raise RecipeError("transform rotation is for models with RMS norms; this one's norms have biases")
    outside = [name for name in anatomy.norms if not name.startswith(f"{anatomy.block_prefix}.")]
    if len(outside) != 1 or not (anatomy.head or anatomy.tied):
        raise RecipeError(
            "transform rotation needs one norm between the last block and the output layer, but finds "
            f"{', '.join(outside) or 'none'}; use the layer transform hadamard"
        )
    return outside[0]


def _width(model: ModelAccess, anatomy: Anatomy, final_norm: str) -> int:
    """The width of the residual stream; RecipeError where something else than linear layers reads it."""
    width = model.tensor(final_norm).numel()
    read = {layer.norm for layer in anatomy.layers}
    unknown = [n for n in anatomy.norms if n not in read and n != final_norm and model.tensor(n).numel() == width]
    others = [layer.name for layer in anatomy.layers if layer.norm is None and layer.shape[0] != width]
    if unknown or others or len(anatomy.embeddings) != 1 or anatomy.family == "structure":
        what = (unknown or others or [*anatomy.embeddings[1:], "a model without a family file"])[0]
        raise RecipeError(f"transform rotation cannot rotate around {what}; use the layer transform hadamard")
    return width


def _fold_norms(model: ModelAccess, anatomy: Anatomy, final_norm: str) -> None:
    norms = {name: model.tensor(name).double() for name in {layer.norm for layer in anatomy.layers} if name}
    for layer in anatomy.layers:
        if layer.norm:
            model.set_weight(layer.name, model.weight(layer.name).double() * norms[layer.norm])
    head_norm = model.tensor(final_norm).double()
    if anatomy.head:
        model.set_tensor(anatomy.head.tensor, model.tensor(anatomy.head.tensor).double() * head_norm)
    else:
        head, embedding = anatomy.tied[0]
        model.set_tensor(f"{head}.weight", model.tensor(embedding).double() * head_norm)
        model.config_changes["tie_word_embeddings"] = False
    for name, value in {**norms, final_norm: head_norm}.items():
        model.set_tensor(name, torch.ones_like(value))


def _turn_layer(model: ModelAccess, layer: LinearLayer, turn: _Turn) -> None:
    weight = model.weight(layer.name).double()
    if layer.norm:  # reads the residual stream
        model.set_weight(layer.name, turn(weight))
        return
    model.set_weight(layer.name, turn(weight.T).T)
    if layer.bias and not (layer.fused_slice and layer.expert):  # one tensor holds the biases of all stacked experts
        model.set_tensor(layer.bias, turn(model.tensor(layer.bias).double()))


def _turn_heads(model: ModelAccess, anatomy: Anatomy) -> None:
    """Within each head: the outputs of v_proj by H, the columns of o_proj by H'."""
    config: Any = model.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block = block_for(head_dim, "whole")
    named = {layer.name: layer for layer in anatomy.layers}
    for layer in anatomy.layers:
        value = named.get(layer.producer or "")
        if layer.kind != "attention" or value is None:
            continue
        model.set_weight(value.name, hadamard_transform(model.weight(value.name).double().T, block).T)
        if value.bias:
            model.set_tensor(value.bias, hadamard_transform(model.tensor(value.bias).double(), block))
        model.set_weight(layer.name, hadamard_transform(model.weight(layer.name).double(), block))


def _logits(model: ModelAccess, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head(model.hidden(ids)).double()
