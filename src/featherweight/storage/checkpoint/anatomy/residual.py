"""The residual stream: which tensors read it, which write it, and along which of their dimensions.

Hidden channels can be permuted, rotated or removed only in all of these at once. A model is described wholly or not at
all: a parameter with a dimension as long as the hidden size that has no place in the description is a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.anatomy.family import Family, find_family
from featherweight.storage.checkpoint.anatomy.geometry import HEAD_NORM, QUERY, config_number, is_last, read_geometry
from featherweight.storage.checkpoint.anatomy.tensor_index import FLOATING, TensorIndex
from featherweight.storage.checkpoint.anatomy.units import Slice, Unit

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
Role = Literal["reader", "writer", "bias", "norm", "embedding"]


@dataclass(frozen=True)
class Port:
    """A dimension of a stored tensor that runs over the hidden channels.

    role : "reader" (columns of W [out, in]), "writer" (rows), "bias" (of a writer), "norm" (its weight or bias),
        "embedding" (of tokens, positions, types; the output layer too where it is tied to the first)
    layer : name of the linear layer; of others the tensor's
    dim : the dimension of the stored tensor
    norm : weight of the norm through which a reader reads or a writer writes, None where it is none or not known
    block : number of the block, None outside
    """

    role: Role
    layer: str
    tensor: str
    dim: int
    norm: str | None = None
    block: int | None = None

    def channel(self, index: int) -> Slice:
        """One hidden channel of it."""
        sides = {"reader": "columns", "writer": "rows", "bias": "rows"}
        return Slice(self.layer, sides.get(self.role, "entries"), index, index + 1, self.tensor, self.dim)


@dataclass(frozen=True)
class Residual:
    """What reads and writes the residual stream of a model.

    hidden : number of channels
    ports : every dimension of a stored tensor that runs over them, each once; experts in a stacked tensor are one
    norm_offset : what the norms add to their stored weights (1 in Gemma)
    rotation_refusal : why the channels can be permuted or removed only, not rotated; None where norms can be folded
        into their readers and the stream be rotated
    """

    hidden: int
    ports: tuple[Port, ...]
    norm_offset: float
    rotation_refusal: str | None

    def of(self, role: Role) -> tuple[Port, ...]:
        """The ports of one role."""
        return tuple(port for port in self.ports if port.role == role)

    def channel(self, index: int) -> Unit:
        """A hidden channel: everything that goes with it. Norms average over fewer channels without it."""
        return Unit("channel", None, index, "", tuple(port.channel(index) for port in self.ports))

    def arranged(self, stored: Mapping[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
        """The tensors that change when hidden channels are put in another order, and those left out are removed.

        Parameters
        ----------
        stored : tensors by name, as they are stored
        order : numbers of channels, each at most once; the others are removed

        Raises
        ------
        CheckpointError : a number is out of range or there twice
        """
        if len(set(order)) != len(order) or not all(0 <= number < self.hidden for number in order):
            raise CheckpointError(
                f"an order of {self.hidden} hidden channels holds each of 0 to {self.hidden - 1} at most once, not "
                f"{list(order)[:20]}"
            )
        index = torch.tensor(list(order), dtype=torch.long)
        made: dict[str, Tensor] = {}
        for port in self.ports:
            value = made.get(port.tensor, stored[port.tensor])
            made[port.tensor] = value.index_select(port.dim, index.to(value.device))
        return made


def read_residual(checkpoint: TensorIndex, anatomy: Anatomy | None = None) -> Residual:
    """The residual stream of a checkpoint, from names, shapes and config.json alone.

    Raises
    ------
    CheckpointError : the anatomy cannot be read, or something of the hidden size has a use that is not known
    """
    anatomy = anatomy or read_anatomy(checkpoint)
    return _Reading(checkpoint, anatomy).residual()


class _Reading:
    def __init__(self, checkpoint: TensorIndex, anatomy: Anatomy) -> None:
        self.checkpoint, self.anatomy = checkpoint, anatomy
        self.family: Family | None = find_family(checkpoint.config) if anatomy.family != "structure" else None
        found = config_number(checkpoint.config, HIDDEN)
        if found is None and anatomy.embeddings:
            found = checkpoint.entry(anatomy.embeddings[0]).shape[-1]
        if found is None:
            raise self._refusal(f"how wide its residual stream is: config.json has none of {', '.join(HIDDEN)}")
        self.hidden = found
        self.ports: dict[tuple[str, int], Port] = {}
        self.known: set[str] = set()  # tensors all of whose dimensions are understood

    def residual(self) -> Residual:
        if self.family is None:
            self._check_found()
        for layer in self.anatomy.layers:
            self._layer(layer)
        self._outside()
        self._norms()
        self._embeddings()
        head = self.anatomy.head
        if head:
            self.known.update(name for name in (head.tensor, head.bias) if name)
            if head.shape[1] == self.hidden:
                self._add(Port("reader", head.name, head.tensor, 1, head.norm))
            elif not self.family or not self.family.readers:
                raise self._refusal(f"what {head.name} {list(head.shape)} reads")
        self._check()
        offset = self.family.norm_offset if self.family else 0.0
        return Residual(self.hidden, tuple(self.ports.values()), offset, self._rotation_refusal())

    def _add(self, port: Port) -> None:
        self.ports.setdefault((port.tensor, port.dim), port)

    def _layer(self, layer: LinearLayer) -> None:
        self.known.update(name for name in (layer.tensor, layer.bias) if name)
        writes = is_last(layer)
        size = layer.shape[0 if writes else 1]
        if layer.kind == "other" or layer.kernel or size != self.hidden:
            use = "writes to" if writes else "reads of"
            raise self._refusal(f"what {layer.name} {list(layer.shape)} {use} the {self.hidden} hidden channels")
        stacked = int(layer.fused_slice)
        name = layer.name.partition("[")[0] if stacked else layer.name
        dim = stacked + int(writes == layer.transposed)
        norm = layer.post if writes else layer.norm
        self._add(Port("writer" if writes else "reader", name, layer.tensor, dim, norm, layer.block))
        if writes and layer.bias:
            self._add(Port("bias", name, layer.bias, stacked, norm, layer.block))

    def _outside(self) -> None:
        """Layers outside the blocks that the family's file names."""
        family = self.family
        for reads, paths in ((True, family.readers), (False, family.writers)) if family else ():
            for path in paths:
                names = [f"{self.anatomy.base_prefix}.{path}" if self.anatomy.base_prefix else path, path]
                name = next((name for name in names if f"{name}.weight" in self.checkpoint.names), None)
                if name is None:
                    continue
                self.known.update((f"{name}.weight", f"{name}.bias"))
                self._add(Port("reader" if reads else "writer", name, f"{name}.weight", int(reads)))
                if not reads and f"{name}.bias" in self.checkpoint.names:
                    self._add(Port("bias", name, f"{name}.bias", 0))

    def _norms(self) -> None:
        prefix = f"{self.anatomy.block_prefix}."
        for name in self.anatomy.norms:
            of_heads = HEAD_NORM.fullmatch(".".join(name.split(".")[-2:])) is not None
            if not of_heads and self.checkpoint.entry(name).shape == (self.hidden,):
                number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
                self._add(Port("norm", name, name, 0, block=int(number) if number.isdigit() else None))
            elif not of_heads:
                raise self._refusal(f"what the norm {name} {list(self.checkpoint.entry(name).shape)} goes over")

    def _embeddings(self) -> None:
        for name in self.anatomy.embeddings:
            self.known.add(name)
            shape = self.checkpoint.entry(name).shape
            if len(shape) == 2 and shape[1] == self.hidden:
                self._add(Port("embedding", name, name, 1))
            elif not self.family or not self.family.writers:
                raise self._refusal(f"how the embedding {name} {list(shape)} becomes {self.hidden} channels")

    def _check(self) -> None:
        """A refusal where a parameter as long as the hidden size has no place."""
        tied = {f"{head}.weight" for head, _ in self.anatomy.tied}  # a stored copy of the embedding
        for name in self.anatomy.others:
            entry = self.checkpoint.entry(name)
            if name in tied:
                self._add(Port("embedding", name, name, 1))
            elif name not in self.known and self.hidden in entry.shape and self._is_weight(name):
                raise self._refusal(f"what {name} {list(entry.shape)} is to the {self.hidden} hidden channels")

    def _is_weight(self, name: str) -> bool:
        """Not a mask or another buffer."""
        entry = self.checkpoint.entry(name)
        return entry.dtype in FLOATING and len(entry.shape) < 4

    def _check_found(self) -> None:
        """A refusal where roles that were told from names are not those of ordinary blocks."""
        refusal = read_geometry(self.checkpoint, self.anatomy).refusals.get("neuron")
        counts: dict[int | None, int] = {}
        for layer in self.anatomy.layers:
            if layer.kind == "attention":
                starts = layer.role in QUERY or bool(layer.fused)
                counts[layer.block] = counts.get(layer.block, 0) + starts - is_last(layer)
        block = next((block for block, count in counts.items() if count), None)
        if refusal and not any(layer.fused for layer in self.anatomy.layers if layer.kind in ("mlp", "expert")):
            raise CheckpointError(refusal)
        if block is not None:
            raise self._refusal(f"which layer of the attention of block {block} writes to the residual stream")

    def _rotation_refusal(self) -> str | None:
        """Rotations need norms without means, each in front of all that reads the stream."""
        if self.family is None:
            return "which norm feeds which layer is known for declared families only"
        if any(port.role == "norm" and port.tensor.endswith(".bias") for port in self.ports.values()):
            return "its norms take off the mean and have biases"
        behind = next((p for p in self.ports.values() if p.role in ("writer", "bias") and p.norm), None)
        if behind:
            return f"{behind.norm} stands between {behind.layer} and the residual stream"
        bare = next((p for p in self.ports.values() if p.role == "reader" and p.norm is None), None)
        return f"{bare.layer} reads the residual stream without a norm of its own" if bare else None

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.folder} does not say {what}: its hidden channels cannot be permuted or removed; use a "
            "method that leaves them as they are"
        )
