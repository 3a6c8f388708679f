"""Which files of a folder are the model's weights: the rule of transformers, and what it leaves open.

`model.safetensors` counts before an index, an index before anything else, and of an index only the names of the files:
all tensors in them are the model's. A single file under another name, and a complete set of numbered shards whose index
is lost, are understood as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import CheckpointError, shown
from featherweight.storage.checkpoint.resolve import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PICKLE_SUFFIXES,
    adapter_text,
    gguf_text,
    pickle_text,
    refuse_lfs_pointer,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Shards:
    """names : weight files, in the order in which they are read
    placed : tensor -> file as an index says, which the files themselves overrule
    notes : what is odd about the folder, a sentence each
    readable : transformers reads the index as it is; it also wants to find `metadata` there
    """

    names: tuple[str, ...]
    placed: dict[str, str]
    notes: tuple[str, ...] = ()
    readable: bool = True


def find_shards(folder: Path) -> Shards:
    """The weight files of a folder; CheckpointError if there are none, or it cannot be said which."""
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    if SINGLE_NAME in present:
        beside = f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}: the single file is used, as transformers does"
        return Shards((SINGLE_NAME,), {}, (beside,) if (folder / INDEX_NAME).exists() and len(present) > 1 else ())
    if (folder / INDEX_NAME).exists():
        placed, readable = _read_index(folder)
        names = tuple(sorted(set(placed.values())))
        left = [name for name in present if name not in names and not name.startswith("consolidated")]
        note = f"{folder} holds {', '.join(left[:3])}, which {INDEX_NAME} does not name: not used"
        return Shards(names, placed, (note,) if left else (), readable)
    if len(present) == 1 or _is_whole_set(present):
        return Shards(tuple(present), {})
    raise CheckpointError(_no_shards(folder, present))


def _is_whole_set(names: list[str]) -> bool:
    """Whether these are all shards of one numbered set."""
    found = [NUMBERED.fullmatch(name) for name in names]
    if not names or any(match is None for match in found):
        return False
    parts = [(match[1], int(match[2]), int(match[3])) for match in found if match]
    return {part[:1] + part[2:] for part in parts} == {(parts[0][0], len(parts))} and (
        [number for _, number, _ in parts] == list(range(1, len(parts) + 1))
    )


def _no_shards(folder: Path, present: list[str]) -> str:
    if present:
        return f"{folder} has {len(present)} safetensors files but no {INDEX_NAME} to say what they hold"
    if (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER_WEIGHTS).exists():
        return adapter_text(folder)
    files = sorted(folder.iterdir())
    pickles = [path for path in files if path.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        return pickle_text(pickles[0])
    gguf = [path for path in files if path.suffix.lower() == ".gguf"]
    return gguf_text(gguf[0]) if gguf else f"{folder} has no weights: there is no .safetensors file in it"


def _read_index(folder: Path) -> tuple[dict[str, str], bool]:
    """Tensor -> file, and whether transformers can read it, too."""
    path = folder / INDEX_NAME
    refuse_lfs_pointer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    index = parse_object(path, content)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names")
    weight_map = {tensor: shard.removeprefix("./") for tensor, shard in weight_map.items()}
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {shown(shard)}, which is not a safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks the shard {shard} that its index names; download it again")
    return weight_map, isinstance(index.get("metadata"), dict)


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(parsed).__name__}")
    return parsed
