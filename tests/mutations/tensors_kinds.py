"""Mutations of tensors and of the index: names, shapes, types, values, places."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import torch

from mutations.files import HASHES, INDEX, SINGLE, Files, Shard, Stored, Unreadable, renamed
from mutations.kinds import ODD, kind, some

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32,
}  # fmt: skip
SAME_SIZE = (("F16", "BF16", "I16", "U16"), ("F32", "I32", "U32"), ("U8", "I8", "F8_E4M3", "F8_E5M2", "BOOL"))
WRAPPERS = (
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "model.",
    "transformer.",
    "language_model.",
    "student.",
    "_fsdp",
)
BLOCK = re.compile(r"((?:layers|h|layer)\.)(\d+)\.")


def value_of(tensor: Stored) -> torch.Tensor:
    if tensor.dtype not in DTYPES:
        raise Unreadable(tensor.dtype)
    flat = torch.frombuffer(bytearray(tensor.data) or bytearray(1), dtype=torch.uint8)[: len(tensor.data)]
    try:
        return flat.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
    except RuntimeError as error:
        raise Unreadable(str(error)) from error


def stored(name: str, value: torch.Tensor) -> Stored:
    dtype = next(text for text, found in DTYPES.items() if found == value.dtype)
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return Stored(name, dtype, tuple(value.shape), data)


def _pick(chance: random.Random, files: Files) -> tuple[str, Shard, int]:
    """A shard, and the place of one of its tensors."""
    name = some(chance, files.shards)
    shard = files.shard(name)
    some(chance, shard.tensors)
    return name, shard, chance.randrange(len(shard.tensors))


def _change(files: Files, name: str, shard: Shard, place: int, *new: Stored) -> None:
    shard.tensors[place : place + 1] = new
    files.put(name, shard)


def _each_shard(files: Files, names: dict[str, str]) -> None:
    """Rename tensors everywhere, in the hashes and the index too, as a tool that saves them would."""
    for name in files.shards:
        shard = files.shard(name)
        shard.tensors = renamed(shard.tensors, names)
        if shard.metadata and HASHES in shard.metadata:
            hashes = json.loads(shard.metadata[HASHES])
            shard.metadata[HASHES] = json.dumps({names.get(key, key): value for key, value in hashes.items()})
        files.put(name, shard)
    if INDEX in files.content:
        index = files.object(INDEX)
        index["weight_map"] = {names.get(key, key): value for key, value in index.get("weight_map", {}).items()}
        files.put_json(INDEX, index)


def _drop(files: Files, names: set[str]) -> None:
    if not names:
        raise Unreadable("none")
    for name in files.shards:
        shard = files.shard(name)
        shard.tensors = [tensor for tensor in shard.tensors if tensor.name not in names]
        if shard.metadata and HASHES in shard.metadata:
            hashes = json.loads(shard.metadata[HASHES])
            shard.metadata[HASHES] = json.dumps({key: value for key, value in hashes.items() if key not in names})
        files.put(name, shard)
    if INDEX in files.content:
        index = files.object(INDEX)
        index["weight_map"] = {key: value for key, value in index.get("weight_map", {}).items() if key not in names}
        files.put_json(INDEX, index)


@kind("tensor: missing")
def missing(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    gone = shard.tensors[place].name
    if chance.random() < 0.5:
        _drop(files, {gone})
    else:  # the index still has it
        _change(files, name, shard, place)
    return gone


@kind("tensor: missing in all blocks, or a whole block")
def missing_role(chance: random.Random, files: Files) -> str:
    names = list(files.tensors())
    chosen = some(chance, [name for name in names if BLOCK.search(name)])
    if chance.random() < 0.3:
        block = BLOCK.search(chosen)
        assert block
        _drop(files, {name for name in names if block.group(0) in name})
        return f"all of {block.group(0)}"
    _drop(files, {name for name in names if BLOCK.sub("*", name) == BLOCK.sub("*", chosen)})
    return BLOCK.sub(r"\1*.", chosen)


@kind("tensor: a name with a slip")
def typo(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    old = shard.tensors[place].name
    where = chance.randrange(len(old))
    new = chance.choice(
        [old[:where] + old[where + 1 :], old + "s", old.replace("_", ""), old.upper(), f"x{old}", old.replace(".", "/")]
    )
    if chance.random() < 0.5:
        _each_shard(files, {old: new})
    else:
        _change(files, name, shard, place, replace(shard.tensors[place], name=new))
    return f"{old} -> {new}"


@kind("tensor: another block's name")
def another_block(chance: random.Random, files: Files) -> str:
    names = list(files.tensors())
    if chance.random() < 0.5:
        shift = chance.choice([1, 2, 10])
        change = {n: BLOCK.sub(lambda m: f"{m.group(1)}{int(m.group(2)) + shift}.", n) for n in names}
        _each_shard(files, {old: new for old, new in change.items() if old != new})
        return f"all blocks {shift} later"
    old = some(chance, [name for name in names if BLOCK.search(name)])
    number = chance.choice([0, 1, 2, 7, 10**6])
    new = BLOCK.sub(lambda m: f"{m.group(1)}{number}.", old)
    if new in names:
        _each_shard(files, {old: new, new: old})
        return f"{old} and {new} exchanged"
    _each_shard(files, {old: new})
    return f"{old} -> {new}"


@kind("tensor: names behind a wrapper's prefix")
def wrapped(chance: random.Random, files: Files) -> str:
    names = list(files.tensors())
    some(chance, names)
    prefix = chance.choice(WRAPPERS)
    chosen = names if chance.random() < 0.7 else names[::2]
    _each_shard(files, {name: prefix + name for name in chosen})
    return f"{prefix} before {'all' if chosen is names else 'half of the names'}"


@kind("tensor: names without their prefix")
def unwrapped(chance: random.Random, files: Files) -> str:
    prefixes = ("model.", "transformer.", "bert.")
    names = [name for name in files.tensors() if name.startswith(prefixes)]
    some(chance, names)
    _each_shard(files, {name: name.partition(".")[2] for name in names})
    return f"without {names[0].partition('.')[0]}."


@kind("tensor: a surplus one")
def surplus(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    like = shard.tensors[place]
    module = like.name.rpartition(".")[0]
    value = value_of(like)
    rows = value.shape[0] if value.dim() else 1
    extra: dict[str, torch.Tensor] = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "model.layers.2.self_attn.q_proj.weight": torch.zeros(32, 32, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(32, generator=torch.Generator().manual_seed(1)),
        "model.layers.1.mlp.down_proj.bias": torch.ones(32),
        "model.layers.0.self_attn.q_norm.weight": torch.ones(8),
        "lm_head.weight": torch.randn(260, 32, generator=torch.Generator().manual_seed(2)),
        "lm_head.bias": torch.ones(260),
        "model.norm.bias": torch.ones(32),
        "step": torch.tensor(17),
        "optimizer.state": torch.zeros(3),
        "": torch.zeros(2),
        "model.embed_tokens.weight": torch.zeros(260, 32),
        f"{module}.weight_scale": torch.ones(rows),
        f"{module}.weight_scale_inv": torch.ones(rows),
        f"{module}.qweight": torch.zeros(4, rows, dtype=torch.int32),
        f"{module}.g_idx": torch.zeros(32, dtype=torch.int32),
        f"{module}.lora_A.weight": torch.zeros(4, 32),
        f"{module}.lora_A.default.weight": torch.zeros(4, 32),
        f"{module}.bias": torch.ones(rows),
        f"{module}.weight": torch.ones(rows, 32),
        f"{module}.base_layer.weight": torch.ones(rows, 32),
        f"{like.name}_copy": value,
    }
    there = {tensor.name for tensor in shard.tensors}
    added = some(chance, [key for key in extra if key not in there])
    shard.tensors.insert(chance.randrange(len(shard.tensors) + 1), stored(added, extra[added]))
    files.put(name, shard)
    return added or "one without a name"


@kind("tensor: another shape")
def reshaped(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    tensor = shard.tensors[place]
    value = value_of(tensor)
    ways = {
        "a row less": value[:-1] if value.dim() else value,
        "a row more": torch.cat([value, value[-1:]]) if value.dim() and value.shape[0] else value,
        "a column less": value[..., :-1] if value.dim() else value,
        "twice the rows": torch.cat([value, value]) if value.dim() else value,
        "transposed": value.T if value.dim() == 2 else value,
        "flat": value.reshape(-1),
        "one more dimension": value[None],
        "a column": value.reshape(-1, 1),
        "a scalar": value.reshape(-1)[0] if value.numel() else value,
        "nothing": value[:0] if value.dim() else value,
        "rows and columns exchanged": value.reshape(value.shape[::-1]),
        "heads apart": value.reshape(2, -1, value.shape[-1]) if value.dim() == 2 and value.shape[0] % 2 == 0 else value,
    }
    changed = {way: new for way, new in ways.items() if new.shape != value.shape}
    way = some(chance, sorted(changed))
    _change(files, name, shard, place, stored(tensor.name, changed[way]))
    return f"{tensor.name} {way}: {list(changed[way].shape)}"


@kind("tensor: another dtype")
def converted(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    tensor = shard.tensors[place]
    dtype = chance.choice(sorted(set(DTYPES) - {tensor.dtype}))
    if chance.random() < 0.4:
        for name in files.shards:
            shard = files.shard(name)
            shard.tensors = [stored(tensor.name, value_of(tensor).to(DTYPES[dtype])) for tensor in shard.tensors]
            files.put(name, shard)
        return f"all {dtype}"
    _change(files, name, shard, place, stored(tensor.name, value_of(tensor).to(DTYPES[dtype])))
    return f"{tensor.name} {dtype}"


@kind("tensor: a dtype that is not the data's")
def relabelled(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    tensor = shard.tensors[place]
    alike = next((group for group in SAME_SIZE if tensor.dtype in group), ())
    dtype = some(chance, [other for other in (*alike, "F4", "F8_E8M0", "X9") if other != tensor.dtype])
    _change(files, name, shard, place, replace(tensor, dtype=dtype))
    return f"{tensor.name} {tensor.dtype} -> {dtype}"


@kind("tensor: odd values")
def values(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    tensor = shard.tensors[place]
    value = value_of(tensor).clone()
    if not value.is_floating_point() or not value.numel():
        raise Unreadable("no floats")
    odd = chance.choice([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30, 6e4, 1e-40, -1.0])
    whole = chance.random() < 0.3
    value.reshape(-1)[slice(None) if whole else chance.randrange(value.numel())] = odd
    _change(files, name, shard, place, stored(tensor.name, value))
    return f"{tensor.name} {'all' if whole else 'one'} {odd}"


@kind("tensor: two exchanged")
def exchanged(chance: random.Random, files: Files) -> str:
    tensors = files.tensors()
    first = tensors[some(chance, list(tensors))]
    alike = [t.name for t in tensors.values() if t.shape == first.shape and t.name != first.name]
    second = some(chance, alike)
    names = {first.name: second, second: first.name}
    for name in files.shards:
        shard = files.shard(name)
        files.put(name, Shard(renamed(shard.tensors, names), shard.metadata))
    return f"{first.name} and {second}"


@kind("tensor: in two shards")
def duplicated(chance: random.Random, files: Files) -> str:
    name, shard, place = _pick(chance, files)
    tensor = shard.tensors[place]
    other = some(chance, [one for one in files.shards if one != name])
    target = files.shard(other)
    same = chance.random() < 0.5
    target.tensors.append(tensor if same else replace(tensor, data=bytes(len(tensor.data))))
    files.put(other, target)
    return f"{tensor.name} also in {other}, {'the same' if same else 'zeros'}"


@kind("tensor: order and spaces")
def order(chance: random.Random, files: Files) -> str:
    """Legitimate: another order of the tensors, and spaces in the header."""
    name = some(chance, files.shards)
    shard = files.shard(name)
    chance.shuffle(shard.tensors)
    content = shard.dump()
    length = int.from_bytes(content[:8], "little")
    spaces = chance.choice([0, 1, 3, 800])
    files.content[name] = (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces
    files.content[name] += content[8 + length :]
    return f"{name}, {spaces} spaces"


@kind("tensor: metadata of a file")
def metadata(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    shard = files.shard(name)
    key = chance.choice(sorted(shard.metadata or {"format": "pt"}))
    changes = [None, {}, {"format": "tf"}, {"format": "mlx"}, {"format": "np"}, {"format": 1}, {"more": "words"}]
    kept = {k: v for k, v in (shard.metadata or {}).items() if k != key}
    changes += [kept, {**kept, key: "{"}, {**kept, key: "[]"}, {**kept, key: '{"a": 1}'}, {**kept, key: "9"}]
    shard.metadata = chance.choice(changes)
    files.put(name, shard)
    return f"{name}: {str(shard.metadata)[:60]}"


@kind("index: changed")
def index(chance: random.Random, files: Files) -> str:
    found = files.object(INDEX)
    places = found.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise Unreadable(INDEX)
    name = chance.choice(sorted(places))
    others = sorted(set(places.values()) - {places[name]})
    way = chance.choice(
        ["missing", "surplus", "wrong shard", "no such shard", "outside", "absolute", "null", "number", "no map",
        "list",
         "odd", "size", "no metadata", "half", "a slash", "empty", "all in one", "metadata odd"]
    )  # fmt: skip
    if way == "missing":
        del places[name]
    elif way == "half":
        found["weight_map"] = dict(list(places.items())[::2])
    elif way == "no map":
        del found["weight_map"]
    elif way == "no metadata":
        found.pop("metadata", None)
    elif way in ("size", "metadata odd"):
        found["metadata"] = {"total_size": chance.choice(ODD)} if way == "size" else chance.choice(ODD)
    elif way == "all in one":
        found["weight_map"] = dict.fromkeys(places, places[name])
    elif way in ("list", "empty", "odd"):
        found["weight_map"] = {"list": list(places.items()), "empty": {}, "odd": chance.choice(ODD)}[way]
    else:
        new = {
            "surplus": places[name], "wrong shard": some(chance, others), "no such shard": "model-9.safetensors",
            "outside": "../model.safetensors", "absolute": "/etc/passwd", "null": None, "number": 3,
            "a slash": f"./{places[name]}",
        }[way]  # fmt: skip
        places[name if way != "surplus" else "model.layers.9.mlp.up_proj.weight"] = new
    files.put_json(INDEX, found)
    return f"{way} ({name})"


@kind("index: shards in one file, or the other way round")
def regrouped(chance: random.Random, files: Files) -> str:
    """Legitimate as long as nothing is hashed: the same tensors in one file."""
    if INDEX not in files.content:
        raise Unreadable(INDEX)
    tensors = [tensor for name in files.shards for tensor in files.shard(name).tensors]
    kept = files.shard(some(chance, files.shards)).metadata
    for name in [*files.shards, INDEX]:
        del files.content[name]
    files.put(SINGLE, Shard(tensors, kept))
    return "all in one file"
