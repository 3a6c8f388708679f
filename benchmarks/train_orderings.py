#!/usr/bin/env python
"""Do low-bit trainings order themselves as their papers say? Every arm with the same text, first weights and order.

From scratch: full, HGF, BitNet's absmean, TriLM's schedule and the same without its two drops. On from the bundled
model: absmean, Tequila, Sherry. Several seeds; losses on held-out text, means with their spread, and each claim with
what was found. Interrupted, the same command goes on. For the figures of the documents (2 M tokens an arm):

    python benchmarks/train_orderings.py --text NOVELS --steps 1000 --batch 8 --length 256 --seeds 3 --work orderings
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from seeds import spread
from transformers import LlamaConfig

import featherweight
from featherweight import train
from featherweight.model.layers.modules import CodedModule
from featherweight.system.places import ASSETS

REFERENCE = ASSETS / "reference"
COSINE = "schedule={kind: cosine, learning_rate: %g, warmup: 0.05, final: 0.1, weight_decay: 0.1}"
NO_DROPS = ("schedule.second=1.0", "schedule.decay_until=1.0")
SCRATCH: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("full", (COSINE % 2e-3,)),
    "hgf": ("hgf", (COSINE % 2e-3,)),
    "bitnet": ("bitnet-b158", (COSINE % 2e-3,)),
    "trilm": ("trilm", ()),
    "trilm without drops": ("trilm", NO_DROPS),
}
TUNED: dict[str, tuple[str, tuple[str, ...]]] = {
    "absmean": ("tequila", ("side={kind: none}", COSINE % 5e-4)),
    "tequila": ("tequila", (COSINE % 5e-4,)),
    "sherry": ("sherry-train", (COSINE % 5e-4,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-out/train-orderings"), help="folder of the trainings")
    parser.add_argument("--text", default=str(ASSETS / "calibration.txt"), help="to train on; a file or a folder")
    parser.add_argument("--held-out", default=str(ASSETS / "evaluation.txt"), help="to evaluate on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model from scratch")
    parser.add_argument("--layers", type=int, default=4, help="its depth")
    parser.add_argument("--arms", nargs="*", default=[*SCRATCH, *TUNED], help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    config = write_config(options.work, options.hidden, options.layers)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for arm in options.arms:
            found.setdefault(arm, []).append(one(arm, seed, config, options))
            print(f"seed {seed}, {arm}: {found[arm][-1]}", flush=True)
    claims = orderings(found)
    for arm, runs in found.items():
        losses = [run["held_out"] for run in runs]
        print(f"{arm:22} {spread(losses, '.4f')} nats, {runs[0]['bits']:.3f} bits")
    for claim, values, holds in claims:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim} ({', '.join(f'{v:.4f}' for v in values)} by seed)")
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        told = [{"claim": claim, "by_seed": values, "holds": holds} for claim, values, holds in claims]
        options.json.write_text(json.dumps({"settings": settings, "arms": found, "claims": told}, indent=1))


def write_config(work: Path, hidden: int, layers: int) -> Path:
    """A small llama with the vocabulary of the bundled model."""
    vocabulary = json.loads((REFERENCE / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = work / "architecture"
    config.save_pretrained(folder)
    return folder


def one(arm: str, seed: int, config: Path, options: argparse.Namespace) -> dict[str, float]:
    """A training, or what is known of it; `moved` is the share of weights that change their state."""
    scratch = arm in SCRATCH
    recipe, changes = (SCRATCH if scratch else TUNED)[arm]
    out = options.work / f"{arm.replace(' ', '-')}-{seed}"
    settings = train.TrainSettings(
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        seed=seed,
        eval_every=max(1, options.steps // 10),
        held_out_windows=64,
    )
    done = train.run(
        out,
        recipe,
        None if scratch else REFERENCE,
        config=config if scratch else None,
        tokenizer=REFERENCE,
        text=options.text,
        held_out=options.held_out,
        changes=changes,
        settings=settings,
        device=options.device,
        threads=options.threads,
    )
    result = {"held_out": done.held_out, "bits": done.bits_per_weight, "bytes": float(done.bytes)}
    return result if scratch else result | {"moved": moved(out, recipe, changes)}


def moved(out: Path, recipe: str, changes: tuple[str, ...]) -> float:
    """Share of weights whose sign or zero is another than that of the bundled model, rounded the same way."""
    first, _ = featherweight.load(REFERENCE, dtype=torch.float32)
    train.prepare(first, recipe, changes)
    last, _ = featherweight.load(out, dtype=torch.float32)
    coded = {name: module for name, module in last.named_modules() if isinstance(module, CodedModule)}
    count = total = 0
    for name, layer in train.low_bit_layers(first).items():
        before, after = layer.rounded().value.sign(), coded[name].decode().sign()
        count, total = count + int((before != after).sum()), total + before.numel()
    return count / total


def orderings(found: dict[str, list[dict[str, float]]]) -> list[tuple[str, list[float], bool]]:
    """Each claim with a number a seed, and whether it holds on their mean."""

    def by_seed(names: tuple[str, ...], number: Callable[..., float], key: str = "held_out") -> list[float]:
        if not all(name in found for name in names):
            return []
        return [number(*(run[key] for run in runs)) for runs in zip(*(found[name] for name in names), strict=True)]

    def less(one: float, other: float) -> float:
        return one - other

    made: list[tuple[str, list[float], Any]] = [
        ("full below HGF", by_seed(("full", "hgf"), less), lambda v: v < 0),
        ("HGF below BitNet's absmean", by_seed(("hgf", "bitnet"), less), lambda v: v < 0),
        (
            "HGF recovers 40 % of the gap",
            by_seed(("bitnet", "hgf", "full"), lambda b, h, f: (b - h) / (b - f)),
            lambda v: v >= 0.4,
        ),
        (
            "at 15 % more bytes of low-bit layers at most",
            by_seed(("hgf", "bitnet"), lambda h, b: h / b - 1, "bits"),
            lambda v: v <= 0.15,
        ),
        (
            "TriLM's schedule below the same without its drops",
            by_seed(("trilm", "trilm without drops"), less),
            lambda v: v < 0,
        ),
        ("Tequila below absmean", by_seed(("tequila", "absmean"), less), lambda v: v < 0),
        (
            "Tequila has more weights change state than absmean",
            by_seed(("tequila", "absmean"), less, "moved"),
            lambda v: v > 0,
        ),
        ("Sherry within 5 % of Tequila", by_seed(("sherry", "tequila"), lambda s, t: s / t - 1), lambda v: v <= 0.05),
    ]
    return [(claim, values, bool(holds(statistics.mean(values)))) for claim, values, holds in made if values]


if __name__ == "__main__":
    main()
