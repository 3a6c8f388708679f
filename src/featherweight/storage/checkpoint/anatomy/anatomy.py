"""The anatomy of a model: which of its tensors are linear layers, what feeds them, and which tensors are tied.

Read from tensor names, shapes and config.json alone; the model is never built or traced. A family file
(families/*.yaml) says where things are; without one the same description is inferred from structure (structure.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.family import Family, InputGroup, find_family
from featherweight.storage.checkpoint.anatomy.structure import NUMBER, infer_family, no_structure
from featherweight.storage.checkpoint.anatomy.tensor_index import FLOATING, TensorIndex

NORM_NAME = re.compile(r"(norm|(^|_)ln(_|\d|$))", re.IGNORECASE)
HEADED = re.compile(r"(CausalLM|LMHead|MaskedLM|PreTraining|ConditionalGeneration)")


@dataclass(frozen=True)
class LinearLayer:
    """One linear map y = W x + b with W of `shape` (out_features, in_features).

    name : module path as in the checkpoint; for a slice of a 3-D expert tensor the tensor's name and "[3]"
    tensor : name of the stored tensor
    transposed : it is stored as [in, out]
    expert : number of the expert, None outside experts
    fused_slice : it is slice `expert` of a 3-D tensor; its bias, if any, the row `expert` of a 2-D one
    block : number of the block, None for the head
    role : "q_proj", "down_proj", ... as the model calls it
    kind : "attention", "mlp", "expert", "router", "head" or "other"
    input_group : layers with the same input have the same id
    norm : weight of the norm whose output is read by this input group and nothing else; None where there is no such
        norm (post-norm models: the residual stream reads it too), and always None when found by structure
    bias : name of the bias tensor; for a slice of a 3-D tensor a 2-D one, of which row `expert` counts
    fused : the parts of a layer that is several in one, e.g. ("q_proj", "k_proj", "v_proj"); how their rows are laid
        out (one part behind the other, or interleaved) is the model's own affair
    producer : name of the layer whose outputs enter this layer's inputs linearly, channel by channel, and go nowhere
        else: up_proj for down_proj (times the activated gate), v_proj for o_proj (averaged over tokens; with grouped
        queries a channel of v serves several of o). None where there is none, and always when found by structure
    interleaved : the parts of a fused layer lie head by head (neuron by neuron), not one behind the other
    post : weight of a norm between this layer's output and the residual stream (Gemma 2 and 3), None where there is
        none, and always None when found by structure
    kernel : sizes of a convolution's kernel, () for others. The weight is stored as [out, in / groups, *kernel], and
        `shape` is that of the matrix (out, in / groups * product of kernel) which it is in its memory
    groups : groups of a convolution's channels, each with inputs of its own
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    expert: int | None
    fused_slice: bool
    block: int | None
    role: str
    kind: str
    input_group: str
    norm: str | None
    bias: str | None
    fused: tuple[str, ...]
    producer: str | None = None
    interleaved: bool = False
    post: str | None = None
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Anatomy:
    """What every tensor of a checkpoint is. `layers` are the blocks' linear layers in model order.

    family : name of the family file, or "structure"
    blocks : number of blocks
    base_prefix, block_prefix : "model" and "model.layers"
    head : None when tied to the embedding (a copy of it stored all the same is among `others`), or absent
    embedding : the token embedding as a matrix [vocabulary, hidden], None if there is none. Where the output layer is
        tied to it, its input group and norm are the output layer's, which multiplies with it
    embeddings : names of tensors; the token embedding first
    tied : pairs (head module, embedding tensor)
    norms : weights and biases of norms
    others : tensors that are none of these
    """

    family: str
    blocks: int
    base_prefix: str
    block_prefix: str
    layers: tuple[LinearLayer, ...]
    head: LinearLayer | None
    embeddings: tuple[str, ...]
    tied: tuple[tuple[str, str], ...]
    norms: tuple[str, ...]
    others: tuple[str, ...]
    embedding: LinearLayer | None = None

    @property
    def outside(self) -> tuple[LinearLayer, ...]:
        """The matrices outside the blocks that can be compressed: token embedding and output layer, in this order."""
        return tuple(layer for layer in (self.embedding, self.head) if layer is not None)

    @property
    def tied_head(self) -> str | None:
        """Name of the output layer's module where the token embedding is its weight too."""
        name = self.embedding.tensor if self.embedding else None
        return next((head for head, embedding in self.tied if embedding == name), None)

    @property
    def tensors(self) -> dict[str, str]:
        """Every tensor of the checkpoint once: "linear", "bias", "head", "embedding", "norm" or "other"."""
        found = dict.fromkeys((layer.tensor for layer in self.layers), "linear")
        found.update((layer.bias, "bias") for layer in self.layers if layer.bias)
        if self.head:
            found[self.head.tensor] = "head"
            if self.head.bias:
                found[self.head.bias] = "bias"
        for names, what in ((self.embeddings, "embedding"), (self.norms, "norm"), (self.others, "other")):
            found.update(dict.fromkeys(names, what))
        return found


def read_anatomy(checkpoint: TensorIndex) -> Anatomy:
    """The anatomy of a checkpoint; a CheckpointError if neither a family file nor its structure explains it."""
    names = frozenset(checkpoint.names)
    family = find_family(checkpoint.config)
    base = family.find_base(names) if family else None
    if family is not None and base is None:
        raise _other_names(checkpoint, family)
    if family is None or base is None:
        family, base = infer_family(checkpoint), ""
    reader = _Reader(checkpoint, family, base)
    layers = tuple(reader.block_linears())
    if not layers:
        raise no_structure(checkpoint)
    return reader.finish(layers)


def own_head(checkpoint: TensorIndex) -> bool:
    """Whether config.json ties the output layer to the embedding, but the checkpoint has another one of its own.

    Then it is not tied: transformers 5 decides so, and what we write says so in config.json. A stored copy of the
    embedding is no head of its own. The values are compared only where both are stored.
    """
    try:
        return config_ties(checkpoint) and read_anatomy(checkpoint).head is not None
    except CheckpointError:
        return False


def own_head_text(checkpoint: TensorIndex) -> str:
    """The note about a head that is not the embedding."""
    return (
        f"config.json of {checkpoint.folder} ties the output layer to the embedding, but another one is stored: the "
        "stored one is used"
    )


def config_ties(checkpoint: TensorIndex) -> bool:
    """Whether config.json, or the family where it is silent, ties the output layer to the embedding."""
    family = find_family(checkpoint.config)
    return checkpoint.config.get("tie_word_embeddings", family.tied_by_default if family else False) is True


def _other_names(checkpoint: TensorIndex, family: Family) -> CheckpointError:
    places = " or ".join(f"{base}.{family.blocks[0]}.0" if base else f"{family.blocks[0]}.0" for base in family.base)
    return CheckpointError(
        f"config.json of {checkpoint.folder} describes a model of the family {family.name}, whose blocks begin with "
        f"{places}, but there is no such tensor (the first is {next(iter(checkpoint.names), 'none')[:120]}): the "
        "weights are another model's, or were saved under other names"
    )


class _Reader:
    """Applies a family's description to the names of one checkpoint."""

    def __init__(self, checkpoint: TensorIndex, family: Family, base: str) -> None:
        self.checkpoint, self.family, self.base = checkpoint, family, base
        self.names = frozenset(checkpoint.names)
        self.post_norm = any(checkpoint.config.get(key) == value for key, value in family.post_norm_when.items())
        self.block_names = self._split_blocks()

    def join(self, path: str) -> str:
        return f"{self.base}.{path}" if self.base else path

    def _split_blocks(self) -> list[tuple[str, dict[str, str]]]:
        """For every block its prefix, and its tensors by their path within the block."""
        prefixes = [self.join(path) for path in self.family.blocks]
        blocks: dict[tuple[int, int], dict[str, str]] = {}
        for name in self.checkpoint.names:
            for position, prefix in enumerate(prefixes):
                number, _, path = name[len(prefix) + 1 :].partition(".")
                if name.startswith(prefix + ".") and NUMBER.fullmatch(number) and path:
                    blocks.setdefault((position, int(number)), {})[path] = name
        if len(prefixes) == 1:
            self._compare_with_config(blocks, prefixes[0])
        return [(f"{prefixes[position]}.{number}", blocks[position, number]) for position, number in sorted(blocks)]

    def _compare_with_config(self, blocks: dict[tuple[int, int], dict[str, str]], prefix: str) -> None:
        """Blocks beyond the config's number (for multi-token prediction, say) are not the model's, so not layers."""
        config = self.checkpoint.config
        wanted = config.get("num_hidden_layers", config.get("n_layer"))
        if not isinstance(wanted, int) or wanted < 1:
            return
        missing = [number for number in range(min(wanted, 100_000)) if (0, number) not in blocks]
        if missing and self.family.declared:
            raise CheckpointError(
                f"{self.checkpoint.folder} has no weights for {prefix}.{missing[0]}, though config.json "
                f"says {wanted} blocks ({len(missing)} missing); the checkpoint is incomplete"
            )
        if not missing:
            for beyond in [key for key in blocks if key[1] >= wanted]:
                del blocks[beyond]

    def block_linears(self) -> Iterator[LinearLayer]:
        for block, (prefix, tensors) in enumerate(self.block_names):
            for group in self.family.input_groups:
                yield from self._group_linears(block, prefix, tensors, group)

    def _group_linears(
        self, block: int, prefix: str, tensors: dict[str, str], group: InputGroup
    ) -> Iterator[LinearLayer]:
        norm = None if self.post_norm else _first(tensors, [f"{path}.weight" for path in group.norm])
        producer = _first(tensors, [f"{group.producer}.weight"]) if group.producer else None
        found: list[tuple[int | None, LinearLayer]] = []
        for role, path in group.linears.items():
            for expert, tensor in _matches(tensors, path):
                layer = self._linear(tensor, role, group)
                owner = group.input if expert is None else f"{group.input}.{expert}"
                layer = replace(layer, block=block, expert=expert, input_group=f"{prefix}:{owner}", norm=norm)
                layer = replace(layer, producer=producer.removesuffix(".weight") if producer else None)
                layer = replace(layer, post=self._post_norm(tensors, group))
                found.append((expert, layer))
        found.sort(key=lambda item: -1 if item[0] is None else item[0])  # stable: expert by expert, gate before up
        for _, layer in found:
            yield from self._slices(layer, prefix, group)

    def _post_norm(self, tensors: dict[str, str], group: InputGroup) -> str | None:
        """The norm behind a group's layers: the first there is, if it is not the one in front of others."""
        before = {_first(tensors, [f"{path}.weight" for path in other.norm]) for other in self.family.input_groups}
        found = _first(tensors, [f"{path}.weight" for path in group.post])
        return None if found in before else found

    def _linear(self, tensor: str, role: str, group: InputGroup) -> LinearLayer:
        entry = self.checkpoint.entry(tensor)
        wanted = (3,) if group.stacked else (2, 3, 4, 5) if group.convolution else (2,)  # 2: the matrix, compressed
        if len(entry.shape) not in wanted or 0 in entry.shape or entry.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor} in {self.checkpoint.file_of(tensor).path} should hold {wanted[-1]}-dimensional "
                f"floating-point weights, but is {entry.dtype} {list(entry.shape)}; is the model compressed already?"
            )
        rows, columns = entry.shape[-2:]
        if group.convolution:
            rows, columns = entry.shape[0], math.prod(entry.shape[1:])
        module = tensor.removesuffix(".weight")
        bias = next((name for name in (f"{module}.bias", f"{module}_bias") if name in self.names), None)
        return LinearLayer(
            name=module,
            tensor=tensor,
            shape=(columns, rows) if group.transposed else (rows, columns),
            transposed=group.transposed,
            expert=None,
            fused_slice=group.stacked,
            block=None,
            role=role,
            kind=group.kind,
            input_group="",
            norm=None,
            bias=bias,
            fused=group.fused.get(role, ()),
            interleaved=group.interleaved and role in group.fused,
            kernel=tuple(entry.shape[2:]) if group.convolution else (),
        )

    def _slices(self, layer: LinearLayer, prefix: str, group: InputGroup) -> Iterator[LinearLayer]:
        if not group.stacked:
            yield layer
            return
        for expert in range(self.checkpoint.entry(layer.tensor).shape[0]):
            owner = f"{prefix}:{group.input}.{expert}"
            yield replace(layer, name=f"{layer.name}[{expert}]", expert=expert, input_group=owner)

    def finish(self, layers: tuple[LinearLayer, ...]) -> Anatomy:
        """Sort all that is not a linear layer of a block."""
        family = self.family
        used = {layer.tensor for layer in layers} | {layer.bias for layer in layers if layer.bias}
        embeddings = tuple(n for n in (f"{self.join(path)}.weight" for path in family.embeddings) if n in self.names)
        used.update(embeddings)
        head, tied = self._head(embeddings)
        embedding = self._embedding(embeddings, tied)
        if head:
            used.update(name for name in (head.tensor, head.bias) if name)
        rest = [name for name in self.checkpoint.names if name not in used]
        norms = dict.fromkeys(name for name in rest if self._is_norm(name))
        return Anatomy(
            family=family.name,
            blocks=len(self.block_names),
            base_prefix=self.base if family.declared else self.family.blocks[0].rpartition(".")[0],
            block_prefix=self.join(family.blocks[0]),
            layers=layers,
            head=head,
            embeddings=embeddings,
            tied=tied,
            norms=tuple(norms),
            others=tuple(name for name in rest if name not in norms),
            embedding=embedding,
        )

    def _embedding(self, embeddings: tuple[str, ...], tied: tuple[tuple[str, str], ...]) -> LinearLayer | None:
        """The token embedding as a layer; None where it is no matrix of floating-point numbers."""
        if not embeddings:
            return None
        entry = self.checkpoint.entry(embeddings[0])
        if len(entry.shape) != 2 or 0 in entry.shape or entry.dtype not in FLOATING:
            return None
        role = embeddings[0].removesuffix(".weight").rpartition(".")[2]
        layer = self._linear(embeddings[0], role, InputGroup({}, "embedding", "embedding"))
        if embeddings[0] not in dict(tied).values():
            return replace(layer, input_group="embedding", bias=None)
        return replace(layer, input_group="head", norm=self._head_norm(), bias=None)

    def _head_norm(self) -> str | None:
        """Weight of the norm in front of the output layer."""
        norm = f"{self.join(self.family.head_norm)}.weight" if self.family.head_norm and not self.post_norm else None
        return norm if norm in self.names else None

    def _head(self, embeddings: tuple[str, ...]) -> tuple[LinearLayer | None, tuple[tuple[str, str], ...]]:
        family, config = self.family, self.checkpoint.config
        if family.head is None:
            return None, ()
        tensor = f"{family.head}.weight"
        ties = config_ties(self.checkpoint)
        says_tied = bool(embeddings) and ties
        if family.declared and ties and not embeddings:
            return None, ()  # the embedding is stored as the head, which transformers 5 reads
        if tensor in self.names and (not says_tied or self.checkpoint.differ(tensor, embeddings[0])):
            head = self._linear(tensor, family.head.rpartition(".")[2], InputGroup({}, "head", "head"))
            return replace(head, input_group="head", norm=self._head_norm()), ()
        classes = architectures(config)
        headed = any(HEADED.search(name) for name in classes) if classes else says_tied
        return None, ((family.head, embeddings[0]),) if embeddings and headed else ()

    def _is_norm(self, name: str) -> bool:
        path = name.rpartition(".")[0]
        return len(self.checkpoint.entry(name).shape) == 1 and NORM_NAME.search(path.rpartition(".")[2]) is not None


def architectures(config: dict[str, Any]) -> list[str]:
    """The config's `architectures`, as far as they are text."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _first(tensors: dict[str, str], paths: list[str]) -> str | None:
    return next((tensors[path] for path in paths if path in tensors), None)


def _matches(tensors: dict[str, str], path: str) -> Iterator[tuple[int | None, str]]:
    """The tensors of a block at `path`, in which "{expert}" stands for a number."""
    if "{expert}" not in path:
        found = _first(tensors, [f"{path}.weight", path])
        if found:
            yield None, found
        return
    pattern = re.compile(re.escape(path).replace(r"\{expert\}", f"({NUMBER.pattern})") + r"\.weight")
    for inner, name in tensors.items():
        match = pattern.fullmatch(inner)
        if match:
            yield int(match[1]), name
