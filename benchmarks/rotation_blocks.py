#!/usr/bin/env python
"""Errors of single layers by the size of the blocks in which their inputs are rotated: weights, and outputs on a text.

    python benchmarks/rotation_blocks.py MODEL TEXT --layers 0 10 20 29

Round to nearest with 4 and 3 bits and two trit-planes (PTQTP), all in groups of 64; blocks of 64, of 192, and of the
whole width. Printed are relative errors |Q - W| / |W| and |(Q - W) x| / |W x|, root mean squares over the layers, of
each the mean over the seeds, and how far the ratio to blocks of 64 goes from layer to layer.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from featherweight.methods.quantize.base import Grid
from featherweight.methods.quantize.transforms.hadamard import HadamardTransform
from featherweight.registry import find

ROLES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCKS: tuple[Any, ...] = (None, 64, 192, "whole")


def inputs_of(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The inputs [tokens, in] of layers, float32."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given: found.__setitem__(name, given[0].reshape(-1, given[0].shape[-1]))

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def errors(weight: Tensor, x: Tensor, grid: Grid, block: Any, seed: int) -> tuple[float, float]:
    """Relative errors of the weights and of the outputs."""
    if block is None:
        rounded = grid.quantize(weight).decode()
    else:
        turn = HadamardTransform(block=block).for_layer(weight, {}, seed)
        rounded = turn.wrap(grid.quantize(turn.apply(weight))).decode()
    lost = rounded - weight
    return float(lost.norm() / weight.norm()), float((x @ lost.T).norm() / (x @ weight.T).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text()[: 20 * given.tokens]).input_ids
    names = [f"model.layers.{layer}.{role}" for layer in given.layers for role in ROLES]
    inputs = inputs_of(model, torch.tensor(ids[: given.tokens // 256 * 256]).view(-1, 256), names)
    uniform, planes = find("grid", "uniform"), find("grid", "trit-planes")
    grids = {"4 bits": uniform(bits=4, group_size=64), "3 bits": uniform(bits=3, group_size=64)}
    grids["two trit-planes"] = planes(group_size=64)
    for label, grid in grids.items():
        made: dict[tuple[int, Any], list[Tensor]] = defaultdict(list)
        for name in names:
            weight = model.get_submodule(name).weight.detach()
            for block in BLOCKS:
                seeds = range(1 if block is None else given.seeds)
                pairs = torch.tensor([errors(weight, inputs[name], grid, block, seed) for seed in seeds])
                made[weight.shape[1], block].append(pairs.square().mean(0))
        for (width, block), found in made.items():
            squares, base = torch.stack(found), torch.stack(made[width, 64])
            ratio, mean = (squares / base).sqrt(), squares.mean(0).sqrt()
            said = [
                f"{what} {mean[i]:.4f} (ratio {ratio[:, i].min():.3f} to {ratio[:, i].max():.3f})"
                for i, what in enumerate(("weights", "outputs"))
            ]
            print(f"{label}, width {width} ({len(found)} layers), block {block}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
