"""Compressed folders with random weights of a given shape, made directly as codes: for measuring speed alone.

Codes are those of Gaussian weights and plausible scales, so their digits have the frequencies that solvers leave; no
solver runs. One pool of codes is made for a variant, and every matrix is a window of it from a random place.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.native.packing import pack_bits, pack_trits
from featherweight.storage.checkpoint.format import quantization_config
from featherweight.storage.checkpoint.writer import blob_of, write_safetensors
from featherweight.storage.codes import Code
from featherweight.storage.codes.hadamard import Hadamard
from featherweight.storage.codes.trit_planes import TritPlanes
from featherweight.storage.codes.uniform import Uniform

ROOT = Path(__file__).resolve().parent.parent
POOL = 5 * (1 << 20)  # weights; a multiple of five and of eight
DEVIATION = 0.02


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


shapes = _script("make_synthetic")


class Pool:
    """Packed codes of POOL Gaussian weights in units of their deviation; `window` takes a matrix's bytes from it."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.weights = torch.from_numpy(self.random.standard_normal(POOL, dtype=np.float32))

    def trits(self, levels: Tensor, digits: Tensor) -> Tensor:
        """uint8 [planes, bytes]: the digits int8 [levels, planes] of the nearest of rising `levels`."""
        middles = (levels[1:] + levels[:-1]) / 2
        chosen = digits[torch.bucketize(self.weights, middles)]
        return torch.stack([pack_trits(plane.contiguous(), "base3") for plane in chosen.T])

    def codes(self, bits: int, step: float) -> Tensor:
        """uint8 [bytes]: symmetric codes of `bits` bits."""
        half = 1 << (bits - 1)
        return pack_bits((self.weights / step).round().clamp(-half, half - 1).add(half).to(torch.uint8), bits)

    def window(self, packed: Tensor, count: int) -> Tensor:
        """`count` bytes of each row of uint8 [..., bytes] from a random place, around the end and again."""
        start = int(self.random.integers(packed.shape[-1]))
        rolled = packed.roll(-start, -1)
        repeats = -(-count // packed.shape[-1])
        return torch.cat([rolled] * repeats, -1)[..., :count].contiguous()

    def scales(self, *shape: int) -> Tensor:
        """float32 of about one deviation."""
        spread = 0.1 * self.random.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(DEVIATION * np.exp(spread))


Maker = Callable[[int, int, int], Code]
"""Rows, columns, and the seed of the layer's input to a code."""


def planes(pool: Pool, units: tuple[float, ...], group: int, weights: tuple[int, ...] | None = None) -> Maker:
    """Trit-planes with scales of about `units` deviations. With `weights`: tied, log8, under a Hadamard transform."""
    count = len(units)
    digits = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * count).view(-1, count)
    values, order = (digits.float() @ torch.tensor(units)).sort()
    packed = pool.trits(values, digits[order])

    def make(rows: int, columns: int, seed: int) -> Code:
        trits = pool.window(packed, -(-rows * columns // 5))
        if rows * columns % 5:
            trits[:, -1] %= 3 ** (rows * columns % 5)  # missing digits are stored as 0
        groups = -(-columns // group)
        if weights is None:
            scales = pool.scales(rows, groups, count) * torch.tensor(units)
            return TritPlanes(trits, scales.half(), (rows, columns), group)
        scales = pool.scales(rows, groups) * (units[0] / weights[0])
        code = TritPlanes(trits, scales, (rows, columns), group, True, "base3", "log8", weights)
        return Hadamard(code, min(128, columns & -columns), seed)

    return make


def uniform(pool: Pool, bits: int, step: float, group: int = 128) -> Maker:
    packed = pool.codes(bits, step)

    def make(rows: int, columns: int, seed: int) -> Code:
        codes = pool.window(packed, -(-rows * columns * bits // 8))
        scales = (pool.scales(rows, -(-columns // group)) * step).half()
        return Uniform(codes, scales, None, (rows, columns), bits, group)

    return make


@dataclass(frozen=True)
class Variant:
    """What the linear layers become. `head_bits`: uniform bits of the output layer; llama.cpp has Q6_K or Q8_0."""

    title: str
    make: Callable[[Pool], Maker] | None  # None: bf16
    head_bits: int = 6


# Steps in deviations are those of least error for a normal distribution, roughly.
VARIANTS = {
    "planes-1": Variant("one trit-plane, g128", lambda pool: planes(pool, (1.22,), 128)),
    "planes-2": Variant("two trit-planes, g128", lambda pool: planes(pool, (0.77, 0.50), 128)),
    "planes-2-tied": Variant(
        "two trit-planes, 3:2, g32, rotated (trit-2)", lambda pool: planes(pool, (1.14, 0.76), 32, (3, 2))
    ),
    "planes-3": Variant("three trit-planes, g128", lambda pool: planes(pool, (0.9, 0.5, 0.25), 128)),
    "uniform-2": Variant("uniform 2 bit, g128", lambda pool: uniform(pool, 2, 1.0)),
    "uniform-3": Variant("uniform 3 bit, g128", lambda pool: uniform(pool, 3, 0.6)),
    "uniform-4": Variant("uniform 4 bit, g128", lambda pool: uniform(pool, 4, 0.34)),
    "uniform-8": Variant("uniform 8 bit, g128", lambda pool: uniform(pool, 8, 0.0315), head_bits=8),
    "bf16": Variant("bf16", None),
}
STEPS = {2: 1.0, 3: 0.6, 4: 0.34, 5: 0.19, 6: 0.1, 8: 0.0315}


def write_folder(folder: Path, shape: str, name: str, head_bits: int | None = None, seed: int = 0) -> Path:
    """Write the folder unless it is complete already. Embedding and norms stay bf16."""
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    variant, size = VARIANTS[name], shapes.SHAPES[shape]
    if variant.make is None:
        shapes.write_checkpoint(folder, size, 1 << 30, seed)
        return folder
    folder.mkdir(parents=True)
    pool = Pool(seed)
    head = uniform(pool, head_bits or variant.head_bits, STEPS[head_bits or variant.head_bits])
    specs: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_parts(size, variant.make(pool), head, pool, specs)):
        file = f"model-{number + 1:05d}-of-{size.blocks + 2:05d}.safetensors"
        write_safetensors(folder / file, [blob_of(key, tensor) for key, tensor in tensors.items()], {}, sync=False)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    shapes.write_tokenizer(folder)
    shapes.write_config(folder, size)
    config = json.loads((folder / "config.json").read_text())
    recipe = {"name": f"synthetic-{name}", "title": variant.title}
    config["quantization_config"] = quantization_config(specs, recipe)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _parts(
    size: Any, make: Maker, head: Maker, pool: Pool, specs: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Tensor]]:
    """The tensors of the embedding, of each block, and of the rest, in turn; fills `specs`."""
    for _, entries in itertools.groupby(shapes.tensors(size), lambda entry: _place(entry[0])):
        part: dict[str, Tensor] = {}
        for name, dims in entries:
            module = name.removesuffix(".weight")
            if len(dims) == 1:
                part[name] = torch.ones(dims, dtype=torch.bfloat16)
            elif module == "model.embed_tokens":
                rows = pool.random.standard_normal(dims, dtype=np.float32) * DEVIATION
                part[name] = torch.from_numpy(rows).bfloat16()
            else:
                code = (head if module == "lm_head" else make)(*dims, _input_seed(module))
                specs[module] = code.spec
                part |= {f"{module}.{key}": tensor for key, tensor in code.tensors().items()}
        yield part


def _place(name: str) -> str:
    """What goes into one file: the embedding, a block, or the last norm with the output layer."""
    return name.split(".")[2] if ".layers." in name else str("embed" in name)


def _input_seed(module: str) -> int:
    """Layers that share an input share its rotation, as in a compressed model."""
    parts = module.split(".")
    role = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(parts[-1], parts[-1])
    places = ("q_proj", "o_proj", "gate_proj", "down_proj")
    return 4 * int(parts[2]) + places.index(role) if role in places else 0
