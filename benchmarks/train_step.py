#!/usr/bin/env python
"""What a training step costs in low-bit layers, by what it costs in dense ones: forwards and backwards, in turns.

    python benchmarks/train_step.py --json bench-out/train_step.json

Both are the same block of a Llama, under autocast in bfloat16 with float32 latents, as `feather train` runs them; a
step of the one follows a step of the other, so what else the machine does meets both. The median ratio is printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from featherweight import train
from featherweight.system.precision import autocast, choose_precision

PRESETS = ("bitnet-b158", "trilm", "tequila", "hgf", "sherry-train")


def block(width: int, tokens: int) -> nn.Module:
    """One block without an embedding to speak of; its input is given."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=tokens,
    )
    return LlamaModel(config).train()


def step(model: nn.Module, inputs: torch.Tensor, precision: str) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    with autocast(precision, "cpu"):  # type: ignore[arg-type]
        out = model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    out.float().square().mean().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    precision = choose_precision("auto")
    dense = block(options.width, options.length)
    inputs = torch.randn(options.batch, options.length, options.width)
    print(f"a block {options.width} wide, {options.batch} x {options.length} tokens, {precision}")
    found = {}
    for preset in options.presets:
        low = train.prepare(copy.deepcopy(dense), preset)
        for model in (dense, low):
            step(model, inputs, precision)
        pairs = [(step(dense, inputs, precision), step(low, inputs, precision)) for _ in range(options.steps)]
        ratios = [mine / theirs for theirs, mine in pairs]
        seconds = statistics.median(theirs for theirs, _ in pairs)
        found[preset] = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        print(f"{preset:14} {found[preset]['ratio']:.2f} times dense ({min(ratios):.2f} to {max(ratios):.2f}), "
              f"whose step takes {seconds * 1e3:.0f} ms")  # fmt: skip
    if options.json:
        options.json.absolute().parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"precision": precision, "presets": found}, indent=1))


if __name__ == "__main__":
    main()
