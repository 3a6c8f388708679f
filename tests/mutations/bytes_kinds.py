"""Mutations of bytes: what disks, downloads and editors do to files."""

from __future__ import annotations

import random

from mutations.files import INDEX, SINGLE, Files
from mutations.kinds import kind, some

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 123456789\n"


def _header(content: bytes) -> int:
    return min(len(content), 8 + int.from_bytes(content[:8], "little"))


def _flip(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def _text_files(files: Files) -> list[str]:
    return sorted(name for name, content in files.content.items() if name.endswith((".json", ".jinja")) and content)


@kind("bytes: bit of a header")
def header_bit(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    content = files.content[name]
    place = chance.randrange(8, max(9, _header(content)))
    files.content[name] = _flip(content, place, chance.randrange(8))
    return f"bit at {place} of {name}"


@kind("bytes: length of a header")
def length_bit(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    place = chance.randrange(8)
    files.content[name] = _flip(files.content[name], place, chance.randrange(8))
    return f"byte {place} of {name}"


@kind("bytes: bits of the data")
def data_bits(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    content = files.content[name]
    first, count = _header(content), chance.choice([1, 1, 1, 8])
    for _ in range(count):
        content = _flip(content, chance.randrange(first, len(content)), chance.randrange(8))
    files.content[name] = content
    return f"{count} bits of the data of {name}"


@kind("bytes: a stretch of zeros")
def zeros(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    content = files.content[name]
    first = chance.randrange(len(content))
    length = min(len(content) - first, chance.choice([16, 512, 4096]))
    files.content[name] = content[:first] + bytes(length) + content[first + length :]
    return f"{length} bytes of {name} from {first}"


@kind("bytes: a file cut off")
def truncated(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    length = chance.choice([0, 4, 8, 100, len(files.content[name]) - 1, chance.randrange(len(files.content[name]))])
    files.content[name] = files.content[name][:length]
    return f"{name} after {length} bytes"


@kind("bytes: a file with more behind it")
def appended(chance: random.Random, files: Files) -> str:
    name = some(chance, files.shards)
    files.content[name] += bytes(chance.choice([1, 7, 4096]))
    return name


@kind("bytes: bit of a text file")
def text_bit(chance: random.Random, files: Files) -> str:
    name = some(chance, _text_files(files))
    content = files.content[name]
    place = chance.randrange(len(content))
    files.content[name] = _flip(content, place, chance.randrange(8))
    return f"bit at {place} of {name}"


@kind("bytes: a text file cut off or odd")
def text_cut(chance: random.Random, files: Files) -> str:
    name = some(chance, _text_files(files))
    content = files.content[name]
    what = chance.choice(["empty", "cut", "bom", "utf-16", "null", "list", "number", "deep", "twice", "invalid"])
    files.content[name] = {
        "empty": b"",
        "cut": content[: chance.randrange(len(content))],
        "bom": b"\xef\xbb\xbf" + content,
        "utf-16": content.decode("utf-8", "replace").encode("utf-16"),
        "null": b"null",
        "list": b"[" + content + b"]",
        "number": b"17",
        "deep": b"[" * 5000,
        "twice": content + content,
        "invalid": content[:-2] + b"\xff\xfe\x80" + content[-2:],
    }[what]
    return f"{name} {what}"


@kind("bytes: a Git LFS pointer")
def lfs_pointer(chance: random.Random, files: Files) -> str:
    name = some(chance, [n for n in files.content if n.endswith((".safetensors", ".json"))])
    files.content[name] = LFS % (b"%064x" % chance.randrange(2**256))
    return name


@kind("files: one is gone")
def gone(chance: random.Random, files: Files) -> str:
    name = some(chance, sorted(files.content))
    del files.content[name]
    return name


@kind("files: one is a folder")
def folder(chance: random.Random, files: Files) -> str:
    name = some(chance, sorted(files.content))
    del files.content[name]
    files.folders.append(name)
    return name


@kind("files: one has another name")
def another_name(chance: random.Random, files: Files) -> str:
    name = some(chance, sorted(files.content))
    if name.endswith(".safetensors"):
        choices = ["weights.safetensors", "model.SAFETENSORS", "pytorch_model.safetensors", "adapter_model.safetensors"]
        new = chance.choice([*choices, "consolidated.safetensors", f"{name}.part", "model-00001-of-00001.safetensors"])
    else:
        new = chance.choice([name.upper(), f"{name} (1)", f"{name}.bak"])
    files.content[new] = files.content.pop(name)
    return f"{name} -> {new}"


@kind("files: a stray one")
def stray(chance: random.Random, files: Files) -> str:
    shard = next((files.content[name] for name in files.shards), b"")
    content = {
        "pytorch_model.bin": b"PK\x03\x04 no pickle",
        "model.gguf": b"GGUF\x03\0\0\0",
        "consolidated.safetensors": shard,
        "extra.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "junk.safetensors": b"junk",
        "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}',
        "adapter_model.safetensors": shard,
        "tf_model.h5": b"\x89HDF",
        "model.safetensors.index.json.bak": b"{",
        "tokenizer.model": b"\x0a\x0e",
        "vocab.json": b"{}",
        "merges.txt": b"",
        "vocab.txt": b"a\nb\n",
        "special_tokens_map.json": b'{"bos_token": "</s>"}',
        "added_tokens.json": b'{"<more>": 260}',
        "preprocessor_config.json": b"{}",
        "processor_config.json": b'{"processor_class": "Nonsense"}',
        "modeling_strange.py": b"raise SystemExit('code of a model was run')",
        ".DS_Store": b"\0\0\0\1Bud1",
        "quantize_config.json": b'{"bits": 4, "group_size": 128}',
        "params.json": b'{"dim": 32}',
    }
    name = some(chance, [name for name in sorted(content) if name not in files.content])
    files.content[name] = content[name]
    return name


@kind("files: an index beside a whole file")
def index_beside(chance: random.Random, files: Files) -> str:
    """Left from an earlier download: it names shards that are not there."""
    names = list(files.tensors())
    if SINGLE not in files.content or not names:
        shard = files.shard(some(chance, files.shards))
        files.put(SINGLE, shard)
        return f"{SINGLE} with the tensors of one shard beside the index"
    target = chance.choice([SINGLE, "model-00001-of-00002.safetensors"])
    files.put_json(INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, target)})
    return f"{INDEX} that places all in {target}"
