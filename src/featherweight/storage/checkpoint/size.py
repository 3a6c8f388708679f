"""True sizes: bits per weight of the linear layers and of the whole model, bytes on disk, bytes read for a token.

Everything stored counts: codes, scales, zero points, codebooks. Bits of the *linear* layers are those of the weight
matrices inside the blocks, compressed or not; biases, norms, embeddings and the output layer are not among them. Bits
of the *model* are 8 times the bytes of all tensors over the number of parameters of the original; a tied output layer
is counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import METHOD, module_layout, module_specs

if TYPE_CHECKING:
    from featherweight.storage.checkpoint.anatomy import Anatomy

SLICE = re.compile(r"(.*)\[(\d+)\]")  # "experts.down_proj[3]": one expert of a stacked tensor
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Size:
    """Counts and bytes of a folder. None where they cannot be told: the linear layers of a model of unknown structure,
    and all but `bytes` for a model that another tool has compressed.

    `bytes` is that of the weight files on disk, headers included; `tensor_bytes` that of the tensors.
    """

    bytes: int
    tensor_bytes: int
    model_weights: int | None
    linear_bytes: int | None
    linear_weights: int | None

    @property
    def linear_bits(self) -> float | None:
        """Bits per weight of the linear layers in the blocks."""
        return _bits(self.linear_bytes, self.linear_weights)

    @property
    def model_bits(self) -> float | None:
        """Bits per weight of the whole model."""
        return _bits(self.tensor_bytes, self.model_weights)


def _bits(size: int | None, weights: int | None) -> float | None:
    return 8 * size / weights if size is not None and weights else None


def measure_size(folder: str | Path) -> Size:
    """The size of a model folder, an original or one written by featherweight. Only headers are read."""
    with Checkpoint.open(folder) as checkpoint:
        on_disk = sum(file.size for file in checkpoint.files)
        config = checkpoint.quantization_config
        if config is not None and config.get("quant_method") != METHOD:
            return Size(on_disk, checkpoint.total_bytes, None, None, None)
        original = OriginalView(checkpoint)
        anatomy = original.anatomy()
        twice = _stored_twice(original, anatomy)
        kept = [name for name in original.names if name not in twice]
        linears = set(original.compressed) if anatomy is None else {layer.tensor for layer in anatomy.layers}
        return Size(
            bytes=on_disk,
            tensor_bytes=sum(original.stored_bytes(name) for name in kept),
            model_weights=sum(original.entry(name).elements for name in kept),
            linear_bytes=sum(original.stored_bytes(name) for name in linears) if linears else None,
            linear_weights=sum(original.entry(name).elements for name in linears) if linears else None,
        )


def bytes_per_token(folder: str | Path) -> int:
    """Stored bytes read to generate one token: every tensor once, except embeddings that only give one row, and except
    the experts that a token is not sent to."""
    with Checkpoint.open(folder) as checkpoint:
        if (checkpoint.quantization_config or {"quant_method": METHOD}).get("quant_method") != METHOD:
            return checkpoint.total_bytes
        original = OriginalView(checkpoint)
        anatomy = original.anatomy()
        if anatomy is None:
            return checkpoint.total_bytes
        shared = {embedding for _, embedding in anatomy.tied}
        skipped = _stored_twice(original, anatomy) | (set(anatomy.embeddings) - shared)
        experts = {layer.tensor for layer in anatomy.layers if layer.kind == "expert"}
        total = sum(original.stored_bytes(n) for n in original.names if n not in skipped and n not in experts)
        return total + round(_active_share(checkpoint.config) * sum(original.stored_bytes(n) for n in experts))


def _stored_twice(original: OriginalView, anatomy: Anatomy | None) -> set[str]:
    """Output layers that are stored although they are the embedding."""
    tied = () if anatomy is None else anatomy.tied
    return {f"{head}.weight" for head, _ in tied if f"{head}.weight" in original.names}


def _active_share(config: dict[str, Any]) -> float:
    """Experts a token is sent to over experts there are."""

    def first(names: tuple[str, ...]) -> int | None:
        return next((config[n] for n in names if isinstance(config.get(n), int) and config[n] > 0), None)

    there, used = first(EXPERT_COUNTS), first(EXPERTS_A_TOKEN)
    return min(1.0, used / there) if there and used else 1.0


class _Shape(NamedTuple):
    """Stands for a tensor of the original: what an anatomy asks of one."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class OriginalView:
    """The tensors of the original as far as a folder tells: names and shapes, with the bytes that stand for them now.

    Of a compressed module `m` the stored tensors `m.trits`, `m.scales`, ... are hidden and `m.weight` is shown; slices
    `m[0]`, `m[1]`, ... are shown as one stacked tensor `m`.

    names : in the order of the files, a compressed tensor where the first of what stands for it lies
    compressed : tensor -> the modules whose codes it is, in the order of their slices
    specs : module -> spec of its code
    stored : module -> names of its stored tensors

    Parameters
    ----------
    checkpoint : Checkpoint
    shapes : Mapping[str, tuple[int, ...]], optional
        Of compressed tensors that are not [out, in] in the original.
    """

    def __init__(self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.folder = checkpoint.folder
        self.config = checkpoint.config
        self.file_of, self._differ = checkpoint.file_of, checkpoint.differ
        config = checkpoint.quantization_config
        self.specs = module_specs(config) if config else {}
        self.stored = {m: tuple(f"{m}.{name}" for name in module_layout(m, spec)) for m, spec in self.specs.items()}
        self.compressed = _modules_by_tensor(self.specs)
        self._shapes: dict[str, _Shape] = {}
        self._bytes: dict[str, int] = {}
        tensor_of = {n: t for t, ms in self.compressed.items() for m in ms for n in self.stored[m]}
        for name in checkpoint.names:
            entry, tensor = checkpoint.entry(name), tensor_of.get(name, name)
            self._bytes[tensor] = self._bytes.get(tensor, 0) + entry.nbytes
            if tensor not in self._shapes:
                self._shapes[tensor] = self._shape(tensor) if name in tensor_of else _Shape(entry.dtype, entry.shape)
        self._shapes |= {name: _Shape("F16", shape) for name, shape in (shapes or {}).items()}
        for name in tensor_of:
            checkpoint.entry(name)  # a CheckpointError where it is not there
        self.names = tuple(self._shapes)

    def _shape(self, tensor: str) -> _Shape:
        """Of a compressed tensor, as if it were stored [out, in]."""
        modules = self.compressed[tensor]
        matrix = tuple(self.specs[modules[0]]["shape"])
        return _Shape("F16", (len(modules), *matrix) if SLICE.fullmatch(modules[0]) else matrix)

    def entry(self, name: str) -> _Shape:
        return self._shapes[name]

    def differ(self, one: str, other: str) -> bool:
        """See Checkpoint.differ; what is compressed is no copy of what is not."""
        return bool({one, other} & self.compressed.keys()) or self._differ(one, other)

    def stored_bytes(self, name: str) -> int:
        """Bytes stored for a tensor of the original."""
        return self._bytes[name]

    def anatomy(self) -> Anatomy | None:
        """None where the structure is not understood; counting what is stored does not depend on it."""
        from featherweight.storage.checkpoint.anatomy import read_anatomy

        try:
            return read_anatomy(self)
        except CheckpointError:
            return None


def _modules_by_tensor(specs: dict[str, dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Tensor of the original -> the compressed modules that it is, slices in their order."""
    found: dict[str, dict[int, str]] = {}
    for module in specs:
        part = SLICE.fullmatch(module)
        found.setdefault(part[1] if part else f"{module}.weight", {})[int(part[2]) if part else 0] = module
    return {tensor: tuple(module for _, module in sorted(slices.items())) for tensor, slices in found.items()}
