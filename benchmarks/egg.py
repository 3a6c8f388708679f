#!/usr/bin/env python
"""EGG, the language model of whole numbers, trained by evolution on the bytes of the bundled novels.

    python benchmarks/egg.py OUT --layers 2 --width 64 --pairs 512 --tokens 16 --updates 300

Printed are bits a byte on the bundled evaluation text, which is not trained on, and that text's own entropy of single
bytes and of bytes given the byte before. The model is measured with exact logarithms; its own scores are whole
sixteenths of a bit. OUT is the state, written every `--every` updates; called again, it goes on to the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from featherweight.methods.train.egg import Egg, EggSettings

ASSETS = Path(__file__).resolve().parent.parent / "src" / "featherweight" / "assets"


def bytes_of(name: str) -> Tensor:
    return torch.tensor(list((ASSETS / name).read_bytes()), dtype=torch.uint8)


def entropies(text: Tensor) -> tuple[float, float]:
    """Bits a byte: of single bytes, and of each given the one before."""
    pairs = torch.bincount(text[:-1].long() * 256 + text[1:].long(), minlength=65536).double().reshape(256, 256)

    def bits(counts: Tensor) -> float:
        share = counts[counts > 0] / counts.sum()
        return -float((share * share.log2()).sum())

    first = pairs.sum(1)
    return bits(first), bits(pairs.flatten()) - bits(first)


def measure(egg: Egg, text: Tensor, streams: int = 128, length: int = 100) -> float:
    """Bits a byte over streams spread over a text; the first ten bytes of each are only read."""
    at = torch.arange(streams) * (len(text) // streams)
    state, total = egg.start(streams), 0.0
    for step in range(length + 10):
        logits, state = egg.forward(text[at + step].long(), state)
        if step >= 10:
            logs = torch.log_softmax(logits.double() * math.log(2) / 16, 1) / math.log(2)
            total -= float(logs.gather(1, text[at + step + 1].long().unsqueeze(1)).mean())
    return total / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    egg = Egg(
        EggSettings(
            layers=options.layers,
            width=options.width,
            pairs=options.pairs,
            tokens=options.tokens,
            seed=options.seed,
        )
    )
    text, held_out = bytes_of("calibration.txt"), bytes_of("evaluation.txt")
    at, state = torch.arange(options.pairs) * (len(text) // options.pairs), egg.start(2 * options.pairs)
    if options.out.exists():
        kept = torch.load(options.out, weights_only=True)
        if kept["settings"] != repr(egg.settings):
            raise SystemExit(f"{options.out} is a model of other settings: give another file")
        egg.weights, egg.updates, at, state = kept["weights"], kept["updates"], kept["at"], kept["state"]
    unigram, bigram = entropies(held_out)
    print(f"the text: {unigram:.3f} bits a byte by single bytes, {bigram:.3f} given the byte before")
    begun, first = time.monotonic(), egg.updates
    while egg.updates < options.updates:
        at, state, _ = egg.update(text, at, state)
        if egg.updates % options.every == 0 or egg.updates == options.updates:
            aside = options.out.with_suffix(".part")
            kept = {"weights": egg.weights, "updates": egg.updates, "at": at, "state": state}
            torch.save(kept | {"settings": repr(egg.settings)}, aside)
            os.replace(aside, options.out)
            each = (time.monotonic() - begun) / (egg.updates - first)
            print(f"update {egg.updates}: {measure(egg, held_out):.3f} bits a byte, {each:.2f} s an update", flush=True)
    print(f"EGG: {measure(egg, held_out):.3f} bits a byte")


if __name__ == "__main__":
    main()
