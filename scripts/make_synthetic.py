"""Write a random Llama checkpoint of a given shape, bf16 and sharded, at the speed of the disk and in little memory.

    python scripts/make_synthetic.py --shape 1.1b --out /somewhere/llama-1.1b

For measuring speed and memory on real sizes. Weights are Gaussian with standard deviation 0.02, the usual
initialisation. One pool of random numbers is drawn, and every window of a tensor is the pool from a fresh random
offset: within a window, so within every group of weights, the numbers are independent; only far-apart ones repeat.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

POOL = (1 << 24) + 43  # elements; 32 MB as bf16
WINDOW = 1 << 22  # elements written at once, 8 MB
DEVIATION = 0.02
BF16_ONE = 0x3F80


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(256, 512, 2, 4, 2, 512),
    "reference": Shape(256, 768, 8, 4, 2, 4096),
    "0.1b": Shape(512, 2048, 16, 8, 4, 32000),
    "0.5b": Shape(1024, 4096, 28, 16, 8, 32000),
    "1.1b": Shape(2048, 8192, 16, 32, 8, 32000),
    "3b": Shape(3072, 8192, 28, 24, 8, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in model order."""
    hidden, ffn, keys = shape.hidden, shape.ffn, shape.hidden // shape.heads * shape.key_value_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for block in range(shape.blocks):
        prefix = f"model.layers.{block}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def plan_shards(shape: Shape, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Consecutive tensors, at most `shard_bytes` a shard unless a single one is larger."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, size in tensors(shape):
        nbytes = 2 * math.prod(size)
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, size))
        used += nbytes
    return shards


def gaussian_pool(seed: int) -> np.ndarray:
    """POOL numbers as the bit patterns of bf16, rounded to nearest even."""
    generator = np.random.default_rng(seed)
    pool = np.empty(POOL, dtype=np.uint16)
    for start in range(0, POOL, WINDOW):
        count = min(WINDOW, POOL - start)
        bits = (generator.standard_normal(count, dtype=np.float32) * np.float32(DEVIATION)).view(np.uint32)
        pool[start : start + count] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return pool


def write_shard(
    path: Path, entries: list[tuple[str, tuple[int, ...]]], pool: np.ndarray, generator: np.random.Generator
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in entries:
        end = position + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, size in entries:
            if len(size) == 1:
                stream.write(np.full(size, BF16_ONE, dtype=np.uint16).data)
                continue
            count = math.prod(size)
            for start in range(0, count, WINDOW):
                offset = int(generator.integers(POOL - WINDOW))
                stream.write(pool[offset : offset + min(WINDOW, count - start)].data)


def write_config(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": DEVIATION,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 tokens, one for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # the rest stands from U+0100 on
    symbols = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")


def write_checkpoint(folder: Path, shape: Shape, shard_bytes: int, seed: int) -> int:
    """Write the whole folder; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} holds a checkpoint already; remove it or choose another folder")
    shards = plan_shards(shape, shard_bytes)
    pool, generator = gaussian_pool(seed), np.random.default_rng(seed + 1)
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, entries, pool, generator)
        weight_map.update((name, file) for name, _ in entries)
    total = sum(2 * math.prod(size) for _, size in tensors(shape))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_config(folder, shape)
    write_tokenizer(folder)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random Llama checkpoint of a given shape.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard-gb", type=float, default=1.0, help="largest shard, in 10^9 bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own; fewer where the disk is short")
    options = parser.parse_args()
    values = dict(SHAPES[options.shape].__dict__)
    values.update({key: getattr(options, key) for key in ("vocabulary", "blocks") if getattr(options, key)})
    start = time.perf_counter()
    total = write_checkpoint(options.out, Shape(**values), int(options.shard_gb * 1e9), options.seed)
    seconds = time.perf_counter() - start
    print(f"{options.out}: {total / 2e9:.3f} billion weights, {total / 1e9:.2f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
