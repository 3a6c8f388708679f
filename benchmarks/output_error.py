#!/usr/bin/env python
"""Relative output error of presets' layers, on the inputs that the original model gives them.

    python benchmarks/output_error.py ptqtp trit-2 --seeds 0 --json bench-out/output_error.json

For every linear layer inside the blocks: |X W^T - layer(X)|^2 / |X W^T|^2 over the evaluation text, which no
calibration has seen, with X from the uncompressed model whatever the layers before became; then the mean over layers.
This is sum((W - What) H (W - What)^T) / sum(W H W^T) with H the second moment of X. A preset that turns the residual
stream itself (QuaRot, RSQ) has other inputs, and is refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import featherweight
from featherweight.methods.recipe import load_recipe
from featherweight.tasks.evaluate.evaluation import bundled_text

REFERENCE = Path(__file__).parents[1] / "src" / "featherweight" / "assets" / "reference"


@torch.no_grad()
def inputs_of(model: nn.Module, names: list[str], windows: Tensor) -> dict[str, list[Tensor]]:
    """float32 [tokens, in] of each layer, window by window."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda _, inputs: found[name].append(inputs[0].flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        for window in windows:
            model(input_ids=window[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def errors(original: nn.Module, compressed: nn.Module, inputs: dict[str, list[Tensor]]) -> dict[str, float]:
    norms = [name for name, module in original.named_modules() if name.endswith("norm") and module.state_dict()]
    for name in norms:
        theirs = compressed.get_submodule(name).state_dict().get("weight")
        if theirs is None or not torch.equal(
            theirs.float(), original.get_submodule(name).state_dict()["weight"].float()
        ):
            raise SystemExit(f"{name} was changed: the layers have other inputs than the original's")
    found = {}
    for name, parts in inputs.items():
        wanted, got = original.get_submodule(name), compressed.get_submodule(name)
        lost = sum((wanted(x) - got(x)).double().square().sum() for x in parts)
        found[name] = float(lost / sum(wanted(x).double().square().sum() for x in parts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows")
    parser.add_argument("--model", type=Path, default=REFERENCE)
    parser.add_argument("--set", nargs="+", default=(), dest="changes", help="recipe fields of all but the first")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original, tokenizer = featherweight.load(options.model, dtype="float32")
    ids = tokenizer(bundled_text(), add_special_tokens=False)["input_ids"][: options.tokens]
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    names = [n for n, m in original.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    inputs = inputs_of(original, names, windows)
    results: dict[str, dict[int, float]] = {}
    for preset in options.presets:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as work:
                out = Path(work) / "compressed"
                recipe = load_recipe(preset)
                changes = list(options.changes) if preset != options.presets[0] else []
                changes += [f"calibration.seed={seed}"] if recipe.calibrated else []
                featherweight.compress(options.model, preset, out, seed=seed, threads=options.threads, changes=changes)
                compressed, _ = featherweight.load(out, dtype="float32")
                found = errors(original, compressed, inputs)
            results.setdefault(preset, {})[seed] = statistics.fmean(found.values())
            print(f"{preset} seed {seed}: mean relative output error {results[preset][seed]:.5f}", flush=True)
            if not recipe.calibrated:
                break
    first = statistics.fmean(results[options.presets[0]].values())
    for preset, by_seed in results.items():
        mean = statistics.fmean(by_seed.values())
        print(f"{preset}: {mean:.5f}, {mean / first:.3f} of {options.presets[0]}'s")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
