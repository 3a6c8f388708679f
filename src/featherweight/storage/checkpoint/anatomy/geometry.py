"""Heads, neurons and experts of a model: which slices of its stored tensors belong to each.

What a layer is (a query projection, an MLP's last layer) is told by its role and kind in the anatomy, for families with
a file and for models found by structure alike; numbers of heads come from config.json and are compared with the shapes.
Where several projections are fused in one layer, their layout is known from the family's file only. What cannot be
told is refused with a sentence: nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.anatomy.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.anatomy.tensor_index import TensorIndex
from featherweight.storage.checkpoint.anatomy.units import Slice, Unit

QUERY = {"q_proj", "q", "query", "wq", "to_q", "q_lin", "query_proj", "W_q"}
KEY = {"k_proj", "k", "key", "wk", "to_k", "k_lin", "key_proj", "W_k"}
VALUE = {"v_proj", "v", "value", "wv", "to_v", "v_lin", "value_proj", "W_v"}
LAST = {"down_proj", "down", "w2", "wo", "fc2", "c_proj", "dense_4h_to_h", "output", "linear_out", "lin2"}
"""What the last layer of an MLP is called."""
HEAD_NORM = re.compile(r"(?P<which>[qk])_(layer)?norm\.(weight|bias)")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
BUFFER = re.compile(r"^(masked_)?bias$|rotary_emb\.|inv_freq$")
Found = TypeVar("Found", "Attention", "Mlp", Unit)
ATTENTION_KINDS, MLP_KINDS = ("head", "kv-group", "value", "query-key"), ("neuron", "expert")


@dataclass(frozen=True)
class Rows:
    """Outputs of a layer that belong to one projection: its unit i has rows first + i * step, `size` of them."""

    layer: LinearLayer
    first: int
    step: int
    size: int

    def slices(self, unit: int, offset: int = 0, size: int | None = None) -> list[Slice]:
        """Rows and biases of a unit, or `size` of its rows from number `offset` on."""
        start = self.first + unit * self.step + offset
        return rows_of(self.layer, start, start + (self.size if size is None else size))


@dataclass(frozen=True)
class Attention:
    """One attention of a block.

    name : path of the module that q (or all three in one) is in
    heads, kv_heads : query heads; heads of keys and values, each of which serves heads / kv_heads query heads in a row
    head_size, value_size : channels of a head of q and k; of v
    q, k, v : a unit is a head of each
    o : the layer that reads all heads; head h has its columns h * value_size, `value_size` of them
    norms : (weight or bias of a norm of q or k, "q" or "k"); of one head's channels for all, or of all heads' channels
    sinks : a logit of each head that competes with those of the keys (gpt-oss), None where there is none
    """

    block: int
    name: str
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    q: Rows
    k: Rows
    v: Rows
    o: LinearLayer
    norms: tuple[tuple[str, str], ...] = ()
    norm_sizes: dict[str, int] = field(default_factory=dict)
    sinks: str | None = None

    def of_head(self, head: int) -> list[Slice]:
        """What only this query head uses: its rows of q, its norm and sink if it has them, its columns of o."""
        found = [*self.q.slices(head), *self._own_norm("q", head)]
        found += [Slice(name, "entries", head, head + 1, name, 0) for name in (self.sinks,) if name]
        return [*found, *columns_of(self.o, head * self.value_size, (head + 1) * self.value_size)]

    def of_kv_head(self, kv_head: int) -> list[Slice]:
        """What only this head of keys and values uses."""
        return [*self.k.slices(kv_head), *self._own_norm("k", kv_head), *self.v.slices(kv_head)]

    def heads_of(self, kv_head: int) -> range:
        """Numbers of the query heads that a group serves."""
        each = self.heads // self.kv_heads
        return range(kv_head * each, (kv_head + 1) * each)

    def _own_norm(self, which: str, head: int) -> list[Slice]:
        size = self.head_size
        mine = [name for name, of in self.norms if of == which and self.norm_sizes[name] > size]
        return [Slice(name, "entries", head * size, (head + 1) * size, name, 0) for name in mine]

    def units(self, kind: str) -> Iterator[Unit]:
        """See `Geometry.units`."""
        if kind == "head":
            for head in range(self.heads):
                own = self.of_kv_head(head) if self.kv_heads == self.heads else []
                yield self._unit(kind, head, [*self.of_head(head), *own])
        elif kind == "kv-group":
            for kv_head in range(self.kv_heads):
                heads = [part for head in self.heads_of(kv_head) for part in self.of_head(head)]
                yield self._unit(kind, kv_head, [*heads, *self.of_kv_head(kv_head)])
        elif kind == "value":
            for kv_head in range(self.kv_heads):
                for channel in range(self.value_size):
                    starts = [head * self.value_size + channel for head in self.heads_of(kv_head)]
                    columns = [part for start in starts for part in columns_of(self.o, start, start + 1)]
                    parts = [*self.v.slices(kv_head, channel, 1), *columns]
                    yield self._unit(kind, kv_head * self.value_size + channel, parts)
        elif kind == "query-key":
            for channel in range(self.head_size):
                yield self._unit(kind, channel, self._query_key(channel))

    def _query_key(self, channel: int) -> list[Slice]:
        found = [part for head in range(self.heads) for part in self.q.slices(head, channel, 1)]
        found += [part for kv_head in range(self.kv_heads) for part in self.k.slices(kv_head, channel, 1)]
        for name, _ in self.norms:
            for start in range(channel, self.norm_sizes[name], self.head_size):
                found.append(Slice(name, "entries", start, start + 1, name, 0))
        return found

    def _unit(self, kind: str, index: int, parts: list[Slice]) -> Unit:
        return Unit(kind, self.block, index, self.name, tuple(parts))


@dataclass(frozen=True)
class Mlp:
    """An MLP, or an expert: `ups` are what makes its neurons (gate and up), `down` the layer that reads them."""

    block: int
    name: str
    expert: int | None
    neurons: int
    ups: tuple[Rows, ...]
    down: LinearLayer

    def units(self) -> Iterator[Unit]:
        """Its neurons."""
        for neuron in range(self.neurons):
            rows = [part for up in self.ups for part in up.slices(neuron)]
            parts = (*rows, *columns_of(self.down, neuron, neuron + 1))
            yield Unit("neuron", self.block, neuron, self.name, parts, self.expert)


@dataclass(frozen=True)
class Geometry:
    """What the layers of a model's blocks are made of.

    attentions, mlps : of all blocks in order; experts are MLPs, shared ones too
    experts : every routed expert with its place in the router
    refusals : kind of unit -> why it cannot be told for this model
    """

    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    experts: tuple[Unit, ...]
    refusals: dict[str, str]

    def units(self, kind: str, block: int | None = None) -> tuple[Unit, ...]:
        """All units of a kind, of one block or of all.

        head : a query head: rows of q, columns of o; with as many heads of keys and values, those of k and v too
        kv-group : a head of keys and values with all query heads that it serves
        value : a channel of a head of v, and the columns of o that read it
        query-key : a channel of q and k in all heads of an attention, with its entries of their norms; where positions
            are rotated into q and k, channels i and i + head_size / 2 (in some models 2i and 2i + 1) are a pair
        neuron : of an MLP or an expert: rows of gate and up, a column of down
        expert : all matrices of a routed expert, and its row of the router

        Raises
        ------
        CheckpointError : the model does not say enough to tell them, or there is no such kind
        """
        if kind not in (*ATTENTION_KINDS, *MLP_KINDS):
            raise CheckpointError(f"there are no units {kind!r}: ask for {', '.join((*ATTENTION_KINDS, *MLP_KINDS))}")
        if kind in self.refusals:
            raise CheckpointError(self.refusals[kind])
        if kind == "expert":
            found: Iterable[Unit] = self.experts
        elif kind == "neuron":
            found = (unit for mlp in self.mlps if block in (None, mlp.block) for unit in mlp.units())
        else:
            found = (unit for one in self.attentions if block in (None, one.block) for unit in one.units(kind))
        return tuple(unit for unit in found if block in (None, unit.block))


def read_geometry(checkpoint: TensorIndex, anatomy: Anatomy | None = None) -> Geometry:
    """The geometry of a checkpoint.

    Raises
    ------
    CheckpointError : its anatomy cannot be read. What of the geometry cannot be told is in `refusals`.
    """
    known = anatomy or read_anatomy(checkpoint)
    refusals: dict[str, str] = {}
    blocks: dict[int | None, list[LinearLayer]] = {}
    for layer in known.layers:
        blocks.setdefault(layer.block, []).append(layer)

    def understood(
        read: Callable[[TensorIndex, Anatomy, list[LinearLayer]], list[Found]], kinds: Iterable[str]
    ) -> list[Found]:
        found: list[Found] = []
        for layers in blocks.values():
            try:
                found += read(checkpoint, known, layers)
            except CheckpointError as error:
                for kind in kinds:
                    refusals.setdefault(kind, str(error))
        return found

    attentions, mlps = understood(_attentions, ATTENTION_KINDS), understood(_mlps, ("neuron",))
    return Geometry(tuple(attentions), tuple(mlps), tuple(understood(_experts, ("expert",))), refusals)


def is_last(layer: LinearLayer) -> bool:
    """Whether a layer of a block gives its output to the residual stream: o of an attention, down of an MLP."""
    if layer.kind == "attention":
        return attention_part(layer) == "o"
    return layer.kind in ("mlp", "expert") and _leaf(layer) in LAST


def _leaf(layer: LinearLayer) -> str:
    """The last telling component of a layer's name."""
    parts = re.sub(r"\[\d+\]$", "", layer.name).split(".")
    return parts[-2] if parts[-1] == "dense" and layer.kind != "attention" and len(parts) > 1 else parts[-1]


def attention_part(layer: LinearLayer) -> str:
    """What a layer of an attention is: "q", "k", "v", "qkv" or "o"."""
    leaf = _leaf(layer)
    named = {"q": QUERY, "k": KEY, "v": VALUE}
    return next((part for part, names in named.items() if leaf in names), "qkv" if layer.fused else "o")


def _parent(layer: LinearLayer) -> str:
    return layer.name.rpartition(".")[0]


def rows_of(layer: LinearLayer, start: int, stop: int) -> list[Slice]:
    """Outputs of a layer, with their biases, in what is stored."""
    expert = layer.expert if layer.fused_slice else None
    found = [Slice(layer.name, "rows", start, stop, layer.tensor, int(layer.transposed), expert)]
    if layer.bias:
        found.append(Slice(layer.name, "rows", start, stop, layer.bias, 0, expert))
    return found


def columns_of(layer: LinearLayer, start: int, stop: int) -> list[Slice]:
    """Inputs of a layer in what is stored."""
    expert = layer.expert if layer.fused_slice else None
    return [Slice(layer.name, "columns", start, stop, layer.tensor, int(not layer.transposed), expert)]


# Attention -----------------------------------------------------------------------------------------------------------


def _attentions(checkpoint: TensorIndex, anatomy: Anatomy, layers: list[LinearLayer]) -> list[Attention]:
    own = [layer for layer in layers if layer.kind == "attention"]
    starts = [layer for layer in own if attention_part(layer) in ("q", "qkv")]
    found = []
    for start in starts:
        members = own if len(starts) == 1 else [layer for layer in own if _parent(layer) == _parent(start)]
        found.append(_attention(checkpoint, anatomy, start, members))
    if own and not starts:
        raise _unknown(checkpoint, f"the layer that makes queries among {', '.join(layer.name for layer in own)}")
    return found


def _attention(checkpoint: TensorIndex, anatomy: Anatomy, start: LinearLayer, members: list[LinearLayer]) -> Attention:
    by_part: dict[str, list[LinearLayer]] = {}
    for layer in members:
        by_part.setdefault(attention_part(layer), []).append(layer)
    wanted = ("qkv", "o") if attention_part(start) == "qkv" else ("q", "k", "v", "o")
    if sorted(by_part) != sorted(wanted) or any(len(found) > 1 for found in by_part.values()):
        names = ", ".join(layer.name for layer in members)
        raise _unknown(checkpoint, f"which of {names} makes queries, keys and values, and which reads the heads")
    parts = {part: found[0] for part, found in by_part.items()}
    heads, kv_heads = _head_counts(checkpoint)
    q, k, v = (
        _fused(checkpoint, anatomy, parts["qkv"], heads, kv_heads) if "qkv" in parts else _apart(parts, heads, kv_heads)
    )
    o, name = parts["o"], _parent(start)
    norms, sizes = _norms(checkpoint, anatomy, name, q.size, heads, kv_heads)
    sinks = f"{name}.sinks" if f"{name}.sinks" in anatomy.others else None
    if q.size == 0 or q.size != k.size or o.shape[1] != heads * v.size:
        shapes = ", ".join(f"{layer.role} {list(layer.shape)}" for layer in members)
        raise _unknown(
            checkpoint, f"the heads of {name} ({shapes}), which are not {heads} of queries and {kv_heads} of keys"
        )
    return Attention(start.block or 0, name, heads, kv_heads, q.size, v.size, q, k, v, o, norms, sizes, sinks)


def _apart(parts: dict[str, LinearLayer], heads: int, kv_heads: int) -> tuple[Rows, Rows, Rows]:
    """Projections that are layers of their own; size 0 where heads do not divide the rows."""

    def rows(part: str, units: int) -> Rows:
        size = parts[part].shape[0] // units if parts[part].shape[0] % units == 0 else 0
        return Rows(parts[part], 0, size, size)

    return rows("q", heads), rows("k", kv_heads), rows("v", kv_heads)


def _fused(
    checkpoint: TensorIndex, anatomy: Anatomy, layer: LinearLayer, heads: int, kv_heads: int
) -> tuple[Rows, Rows, Rows]:
    """Projections in one layer: all of q, then k, then v; or of one head after the other."""
    if anatomy.family == "structure":
        raise _unknown(checkpoint, f"how queries, keys and values lie in {layer.name}, which is all in one")
    size, rest = divmod(layer.shape[0], heads + 2 * kv_heads)
    if rest or (layer.interleaved and heads != kv_heads):
        size = 0
    if layer.interleaved:
        q, k, v = (Rows(layer, part * size, 3 * size, size) for part in range(3))
        return q, k, v
    firsts = (0, heads * size, (heads + kv_heads) * size)
    q, k, v = (Rows(layer, first, size, size) for first in firsts)
    return q, k, v


def _norms(
    checkpoint: TensorIndex, anatomy: Anatomy, name: str, size: int, heads: int, kv_heads: int
) -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """Norms of q and k of an attention; a refusal where it has parameters whose use is not known."""
    norms: list[tuple[str, str]] = []
    sizes: dict[str, int] = {}
    for tensor in (*anatomy.norms, *anatomy.others):
        leaf = tensor.removeprefix(f"{name}.")
        entry = checkpoint.entry(tensor)
        if leaf == tensor or len(entry.shape) > 2 or BUFFER.search(leaf):
            continue
        if leaf == "sinks" and entry.shape == (heads,):
            continue
        match = HEAD_NORM.fullmatch(leaf)
        units = heads if match and match["which"] == "q" else kv_heads
        if match is None or len(entry.shape) != 1 or entry.shape[0] not in (size, units * size):
            if tensor in anatomy.norms and match is None:
                continue  # a norm of the hidden channels that the attention's module holds
            raise _unknown(checkpoint, f"what {tensor} {list(entry.shape)} is to the heads")
        norms.append((tensor, match["which"]))
        sizes[tensor] = entry.shape[0]
    return tuple(norms), sizes


def _head_counts(checkpoint: TensorIndex) -> tuple[int, int]:
    """Query heads, and heads of keys and values, as config.json says."""
    heads = config_number(checkpoint.config, HEADS)
    if heads is None:
        raise _unknown(checkpoint, f"how many heads there are: config.json has none of {', '.join(HEADS)}")
    kv_heads = config_number(checkpoint.config, KV_HEADS) or heads
    if heads % kv_heads:
        raise _unknown(checkpoint, f"how {heads} heads share {kv_heads} of keys and values")
    return heads, kv_heads


def config_number(config: dict[str, Any], keys: Iterable[str]) -> int | None:
    """The first positive integer of config.json, or of its text_config, under one of the keys."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, dict) else {}):
        for key in keys:
            value = holder.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _unknown(checkpoint: TensorIndex, what: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder} does not say {what}: its parts of this kind cannot be told apart; use a method that "
        "treats whole layers, or add a family file (storage/checkpoint/anatomy/families)"
    )


# MLPs and experts ----------------------------------------------------------------------------------------------------


def _mlps(checkpoint: TensorIndex, anatomy: Anatomy, layers: list[LinearLayer]) -> list[Mlp]:
    own = [layer for layer in layers if layer.kind in ("mlp", "expert")]
    downs = [layer for layer in own if is_last(layer)]
    homes = {(_parent(down), down.expert) for down in downs}
    found = []
    for down in downs:
        ups = [u for u in own if not is_last(u) and (_parent(u), u.expert) == (_parent(down), down.expert)]
        if not ups:  # in a module beside that of the last layer
            ups = [u for u in own if not is_last(u) and (_parent(u), u.expert) not in homes and u.expert == down.expert]
        neurons = down.shape[1]
        rows: list[Rows] = []
        for up in ups:
            parts = len(up.fused) or 1
            if up.shape[0] != parts * neurons or (parts > 1 and anatomy.family == "structure"):
                raise _unknown(checkpoint, f"how the rows of {up.name} {list(up.shape)} go into {down.name}")
            step = parts if up.interleaved else 1
            rows += [Rows(up, part if up.interleaved else part * neurons, step, 1) for part in range(parts)]
        if not rows:
            raise _unknown(checkpoint, f"which layer makes the inputs of {down.name}")
        name = f"{_parent(down)}[{down.expert}]" if down.fused_slice else _parent(down)
        found.append(Mlp(down.block or 0, name, down.expert, neurons, tuple(rows), down))
    fed = {rows.layer.name for mlp in found for rows in mlp.ups} | {layer.name for layer in downs}
    left = [layer.name for layer in own if layer.name not in fed]
    if left:
        raise _unknown(checkpoint, f"which layer reads the outputs of {left[0]}")
    return found


def _experts(checkpoint: TensorIndex, anatomy: Anatomy, layers: list[LinearLayer]) -> list[Unit]:
    routed = [layer for layer in layers if layer.kind == "expert" and layer.expert is not None]
    if not routed:
        return []
    count = 1 + max(layer.expert for layer in routed if layer.expert is not None)
    routers = [layer for layer in layers if layer.kind == "router" and layer.shape[0] == count]
    if len(routers) != 1:
        raise _unknown(checkpoint, f"which layer sends tokens to the {count} experts of block {routed[0].block}")
    router = routers[0]
    extra = [n for n in anatomy.others if n.startswith(f"{router.name}.") and checkpoint.entry(n).shape == (count,)]
    owner = re.sub(r"(\.\d+)?\.[^.]+$", "", routed[0].name)
    units = []
    for number in range(count):
        parts: list[Slice] = []
        for layer in routed:
            if layer.expert == number:
                parts += _whole(layer)
        parts += rows_of(router, number, number + 1)
        parts += [Slice(name, "entries", number, number + 1, name, 0) for name in extra]
        units.append(Unit("expert", router.block, number, owner, tuple(parts), number))
    return units


def _whole(layer: LinearLayer) -> list[Slice]:
    """All of an expert's matrix and bias: their slice of the leading dimension where they are stacked."""
    if not layer.fused_slice:
        return rows_of(layer, 0, layer.shape[0])
    assert layer.expert is not None
    names = (layer.tensor, layer.bias) if layer.bias else (layer.tensor,)
    module = re.sub(r"\[\d+\]$", "", layer.name)
    return [Slice(module, "entries", layer.expert, layer.expert + 1, name, 0) for name in names]
