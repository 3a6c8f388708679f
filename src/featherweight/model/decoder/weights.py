"""A model folder's weights as the native decoder takes them: packed linear layers, norms in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError, FeatherError, FeatherWarning
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.network import Network
from featherweight.model.products import PackedLinear, pack_dense, pack_linear
from featherweight.storage.checkpoint.accounting import missing_text, refuse_other_kinds, some
from featherweight.storage.checkpoint.anatomy import own_head_text
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD, module_specs
from featherweight.storage.checkpoint.integrity import TensorHashes, Verify
from featherweight.storage.checkpoint.weights import FLOATING_DTYPES
from featherweight.storage.codes import code_from, code_layout
from featherweight.system.threads import thread_count

IGNORED = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints hold and nobody reads."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A block. norms: float32 vectors by role; linears: by role."""

    norms: dict[str, Tensor]
    linears: dict[str, PackedLinear]


@dataclass(frozen=True, eq=False)
class Weights:
    """All that a decoder points to. embedding: uint8, the operand of the input embedding."""

    layers: tuple[Layer, ...]
    embedding: Tensor
    norm: Tensor
    head: PackedLinear

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights read to generate one token."""
        linears = [linear for layer in self.layers for linear in layer.linears.values()]
        return sum(linear.weight_bytes for linear in (*linears, self.head))

    @property
    def notes(self) -> tuple[str, ...]:
        """Layers that run as dense matrices although they are stored otherwise, and why."""
        linears = [linear for layer in self.layers for linear in layer.linears.values()]
        return tuple(dict.fromkeys(linear.note for linear in (*linears, self.head) if linear.note))


def load_weights(
    checkpoint: Checkpoint,
    network: Network,
    threads: int | None = None,
    told: Callable[[int, int], None] | None = None,
    verify: Verify = None,
) -> Weights:
    """Pack every layer; `told` gets (done, total) blocks, `verify` says whether hashes are compared.

    Raises
    ------
    UnsupportedModelError
        the folder has tensors, or codes, that the native decoder does not know.
    CheckpointError
        a tensor is missing, damaged or of the wrong shape.
    """
    specs, given = _specs(checkpoint)
    refuse_other_kinds(checkpoint, bool(specs))
    base = network.architecture.block.partition(".")[0]
    with TensorHashes(checkpoint.files, verify, thread_count(threads), used=True) as hashes:
        return _packed(_Loader(checkpoint, specs, given, threads, hashes, base), network, told)


def _packed(loader: _Loader, network: Network, told: Callable[[int, int], None] | None) -> Weights:
    checkpoint = loader.checkpoint
    architecture = network.architecture
    head_shape = (network.vocabulary, network.hidden)
    if (
        network.tied
        and not checkpoint.has(f"{architecture.embedding}.weight")
        and checkpoint.has(f"{architecture.head}.weight")
    ):
        raise UnsupportedModelError(
            f"the native decoder reads a tied embedding as {architecture.embedding}, not as {architecture.head}"
        )
    if network.tied and architecture.head in loader.specs:
        raise CheckpointError(
            f"quantization_config compresses {architecture.head!r}, but config.json ties the output layer to the "
            "embedding: set tie_word_embeddings to false in config.json, or compress the model again without that layer"
        )
    embedding = loader.linear(architecture.embedding, head_shape)
    layers = []
    for number in range(network.layers):
        layers.append(_layer(loader, network, architecture.block.format(layer=number)))
        if told:
            told(number + 1, network.layers)
    norm = loader.vector(architecture.norm, network.hidden)
    tied = network.tied and not loader.has_own_head(architecture.head, architecture.embedding)
    head = loader.tied(architecture.head, embedding) if tied else loader.linear(architecture.head, head_shape)
    loader.refuse_others(architecture.head if tied else None)
    loader.refuse_other_codes()
    return Weights(tuple(layers), _rows_operand(loader, embedding, architecture.embedding), norm, head)


def _specs(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    """Codes by module, and the modules to which the compression gave a bias that the class has not."""
    config = checkpoint.quantization_config
    if config is None:
        return {}, frozenset()
    if config.get("quant_method") != METHOD:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is quantised by {str(config.get('quant_method'))[:40]!r}, which the native decoder "
            "does not read"
        )
    specs, listed = module_specs(config), config.get("biases", [])
    given = [name for name, spec in specs.items() if spec.get("bias") is True]
    return specs, frozenset([*given, *(listed if isinstance(listed, list) else [])])


def _layer(loader: _Loader, network: Network, block: str) -> Layer:
    parts = network.architecture.parts
    sizes = {"attention_norm": network.hidden, "mlp_norm": network.hidden}
    if network.architecture.head_norms:
        sizes |= {"query_norm": network.head_dim, "key_norm": network.head_dim}
    return Layer(
        {role: loader.vector(f"{block}.{parts[role]}", size) for role, size in sizes.items()},
        {
            role: loader.linear(f"{block}.{parts[role]}", shape, role in network.biased)
            for role, shape in network.shapes().items()
        },
    )


def _rows_operand(loader: _Loader, embedding: PackedLinear, module: str) -> Tensor:
    """Rows are read from one operand; an embedding that is a sum, or that rotates its input, is decoded to one."""
    term = embedding.terms[0]
    if len(embedding.terms) > 1 or term.kind != "operand" or term.steps:
        embedding = pack_dense(loader.decoded(module), threads=loader.threads)
    (operand,) = embedding.operands
    return operand.memory


class _Loader:
    """Reads modules of a checkpoint and remembers which tensors have been used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        specs: dict[str, dict[str, Any]],
        given: frozenset[str],
        threads: int | None,
        hashes: TensorHashes,
        base: str,
    ) -> None:
        self.checkpoint, self.specs, self.given, self.threads = checkpoint, specs, given, threads
        self.hashes = hashes
        self.base = base
        self.used: set[str] = set()
        self.coded: set[str] = set()  # modules that may have a code
        self.plain: set[str] = set()  # biases of layers that the class has without

    def tensor(self, name: str) -> Tensor:
        if not self.checkpoint.has(name):
            raise self._missing(name)
        self.used.add(name)
        self.hashes.check(name)
        return self.checkpoint.tensor(name)

    def _missing(self, name: str) -> CheckpointError:
        """transformers finds a tensor whose name has the base model's prefix once too often, or lacks it."""
        base, _, rest = name.partition(".")
        if base != self.base:
            rest = name
        found = next((n for n in self.checkpoint.names if n == rest or n.endswith(f".{rest}")), None)
        if found is None:
            return CheckpointError(missing_text(self.checkpoint, [name]))
        return UnsupportedModelError(f"the native decoder reads {name}, which is stored as {found[:120]}")

    def vector(self, module: str, size: int, name: str = "weight") -> Tensor:
        found = self.tensor(f"{module}.{name}")
        if tuple(found.shape) != (size,) or found.dtype not in FLOATING_DTYPES:
            raise CheckpointError(f"tensor {module}.{name} is {found.dtype} {list(found.shape)}, expected [{size}]")
        return found.to(torch.float32).contiguous().clone()

    def linear(self, module: str, shape: tuple[int, int], biased: bool = False) -> PackedLinear:
        """A layer with a bias if its class has one, or the compression gave it one; what else is stored is unused."""
        biased = biased or module in self.given
        bias = self.vector(module, shape[0], "bias") if biased else None
        if not biased:
            self.plain.add(f"{module}.bias")
        spec = self.specs.get(module)
        self.coded.add(module)
        if spec is None:
            packed = pack_dense(self._matrix(module, shape), bias, threads=self.threads)
            self.checkpoint.release(f"{module}.weight")
            return packed
        if tuple(spec["shape"]) != shape:
            raise CheckpointError(
                f"the layer {module!r} is {spec['shape']} in quantization_config, expected {list(shape)}"
            )
        tensors = self._stored(module, spec)
        try:
            packed = pack_linear(spec, tensors, bias, threads=self.threads)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(module, error) from None
        finally:
            for name in tensors:
                self.checkpoint.release(f"{module}.{name}")
        if packed.products:
            raise UnsupportedModelError(
                "the native decoder multiplies by a product of two codes only where each is a single matrix that is "
                f"not sparse, which those of {module[:120]!r} are not"
            )
        return packed

    def tied(self, module: str, embedding: PackedLinear) -> PackedLinear:
        """The output layer with the embedding's matrix, and a bias where the compression gave it one."""
        if module not in self.given:
            return embedding
        shape = (embedding.rows, embedding.cols)
        return PackedLinear(shape, embedding.terms, self.vector(module, shape[0], "bias"), embedding.note)

    def has_own_head(self, head: str, embedding: str) -> bool:
        """Whether a head is stored that is no copy of the embedding: then it counts, as in transformers 5."""
        names = (f"{head}.weight", f"{embedding}.weight")
        if head in self.specs:
            return True
        own = self.checkpoint.has(names[0]) and (embedding in self.specs or self.checkpoint.differ(*names))
        if own:
            warnings.warn(own_head_text(self.checkpoint), FeatherWarning, stacklevel=4)
        return own

    def decoded(self, module: str) -> Tensor:
        """The matrix of a module, float32."""
        spec = self.specs.get(module)
        if spec is None:
            return self.tensor(f"{module}.weight").float()
        return code_from(spec, self._stored(module, spec)).decode()

    def refuse_others(self, unused_module: str | None) -> None:
        """UnsupportedModelError if a tensor has played no part: the network would be another one.

        A bias that config.json does not ask for is no part of it, as in transformers; that is said.
        """
        biases = [name for name in self.checkpoint.names if name in self.plain]
        if biases:
            text = f"{self.checkpoint.folder} holds {some(biases)}, which config.json does not ask for: not used"
            warnings.warn(text, FeatherWarning, stacklevel=4)
        for name in self.checkpoint.names:
            if name in self.used or name in self.plain or name.endswith(IGNORED):
                continue
            if unused_module is not None and name == f"{unused_module}.weight":
                continue
            raise UnsupportedModelError(f"the native decoder does not know what the tensor {name[:120]!r} is for")

    def refuse_other_codes(self) -> None:
        """UnsupportedModelError if quantization_config has a code for a module that the network has not."""
        left = sorted(self.specs.keys() - self.coded)
        if left:
            raise UnsupportedModelError(
                f"quantization_config compresses {left[0][:120]!r}, which the native decoder does not know"
            )

    def _matrix(self, module: str, shape: tuple[int, int]) -> Tensor:
        weight = self.tensor(f"{module}.weight")
        if weight.dtype not in FLOATING_DTYPES:
            raise UnsupportedModelError(
                f"tensor {module}.weight is {weight.dtype}, which the native decoder does not read"
            )
        if tuple(weight.shape) != shape:
            raise CheckpointError(f"tensor {module}.weight is {list(weight.shape)}, config.json asks for {list(shape)}")
        return weight

    def _stored(self, module: str, spec: dict[str, Any]) -> dict[str, Tensor]:
        try:
            layout = code_layout(spec)
        except (FeatherError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the code of the module {module!r} in quantization_config cannot be read ({error}): "
                "install a newer featherweight, or compress the model again"
            ) from None
        return {name: self.tensor(f"{module}.{name}") for name in layout}

    def _damaged(self, module: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the compressed layer {module!r} is damaged ({error}): download or compress the model again"
        )
