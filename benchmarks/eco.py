#!/usr/bin/env python
"""ECO against master weights and their naive removal: the bundled model's architecture trained from random weights.

    python benchmarks/eco.py OUT --steps 200 --seeds 0 1 2

Linear layers of the blocks are quantised, embedding and norms are not; AdamW, a linear rise and a cosine to a tenth;
the text is the bundled calibration text, the loss that of the bundled evaluation text, in nats a token. Printed are the
mean over seeds, the ratio to the run with master weights on the same seed, and bytes that stay between steps: weights
as codes, moments, masters. OUT has a file for each finished run, and where an unfinished one is; called again, it goes
on, to the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from featherweight.methods.train.eco import Eco
from featherweight.methods.train.quantisers import Codes, Fp8, Uniform

ASSETS = Path(__file__).resolve().parent.parent / "src" / "featherweight" / "assets"
QUANTISERS: dict[str, Codes] = {"fp8": Fp8(), "4bit": Uniform(bits=4, group_size=64)}
STOCHASTIC: dict[str, Codes] = {"fp8": Fp8(True), "4bit": Uniform(True, bits=4, group_size=64)}
WAYS = ("masters", "eco", "eco-stochastic", "naive")
SAVE_STEPS = 25


class Masters:
    """The usual way: float32 masters are stepped, the network computes with what they round to."""

    def __init__(self, base: Any, quantised: list[Tensor], quantiser: Codes) -> None:
        self.quantised, self.quantiser = quantised, quantiser
        self.masters = [value.detach().clone() for value in quantised]
        self.base = base
        self.round()

    def round(self) -> None:
        with torch.no_grad():
            for value, master in zip(self.quantised, self.masters, strict=True):
                value.copy_(self.quantiser(master))

    def step(self) -> None:
        with torch.no_grad():
            for value, master in zip(self.quantised, self.masters, strict=True):
                value.copy_(master)
            self.base.step()
            for value, master in zip(self.quantised, self.masters, strict=True):
                master.copy_(value)
        self.round()

    def nbytes(self) -> int:
        codes = sum(self.quantiser.nbytes(value.shape) for value in self.quantised)
        held = {id(value) for value in self.quantised}
        others = sum(p.nbytes for group in self.base.param_groups for p in group["params"] if id(p) not in held)
        state = sum(t.nbytes for kept in self.base.state.values() for t in kept.values())
        return codes + others + state + sum(master.nbytes for master in self.masters)

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self.masters, "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masters = state["masters"]
        self.base.load_state_dict(state["base"])


def windows(name: str, length: int) -> Tensor:
    """[windows, length] token ids of a bundled text."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "reference")
    ids = tokenizer((ASSETS / name).read_text("utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // length * length].reshape(-1, length)


def write(path: Path, save: Any) -> None:
    """Write aside, then rename."""
    aside = path.with_suffix(".part")
    save(aside)
    os.replace(aside, path)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def run(options: argparse.Namespace, out: Path, levels: str, way: str, seed: int) -> dict[str, Any]:
    """Train one model, or go on with it."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(ASSETS / "reference", num_hidden_layers=options.blocks)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text, held_out = windows("calibration.txt", options.length), windows("evaluation.txt", options.length)
    quantised = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    base = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    optimiser: Any
    if way == "masters":
        optimiser = Masters(base, quantised, QUANTISERS[levels])
    else:
        quantiser = (STOCHASTIC if way == "eco-stochastic" else QUANTISERS)[levels]
        optimiser = Eco(base, dict.fromkeys(quantised, quantiser), feedback=way != "naive", seed=seed)
    saved, first = out / f"{levels}.{way}.{seed}.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))
    for step in range(first, options.steps):
        rising = options.steps // 20
        share = (step + 1) / (rising + 1) if step < rising else 0.55 + 0.45 * math.cos(math.pi * step / options.steps)
        for group in base.param_groups:
            group["lr"] = options.rate * share
        batch = text[order[torch.arange(step * options.batch, (step + 1) * options.batch) % len(text)]]
        loss = loss_of(model, batch)
        base.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % SAVE_STEPS == 0:
            kept = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            write(saved, lambda path, kept=kept: torch.save(kept, path))
            print(f"{levels} {way} {seed}: step {step + 1}, loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        measured = [float(loss_of(model, part)) for part in held_out[: options.held_out].split(16)]
    count = optimiser.nbytes()
    found = {
        "levels": levels,
        "way": way,
        "seed": seed,
        "loss": statistics.mean(measured),
        "bytes": count if isinstance(count, int) else sum(count.values()),
    }
    write(out / f"{levels}.{way}.{seed}.json", lambda path: path.write_text(json.dumps(found) + "\n"))
    saved.unlink(missing_ok=True)
    return found


def tell(runs: list[dict[str, Any]]) -> None:
    """A line for each way."""
    masters = {(one["levels"], one["seed"]): one for one in runs if one["way"] == "masters"}
    print("levels  way             held-out loss   to masters (each seed)      MB    to masters")
    for levels in QUANTISERS:
        for way in WAYS:
            own = [one for one in runs if (one["levels"], one["way"]) == (levels, way)]
            pairs = [(one, masters[levels, one["seed"]]) for one in own if (levels, one["seed"]) in masters]
            if not pairs:
                continue
            losses = [one["loss"] for one, _ in pairs]
            ratios = " ".join(f"{one['loss'] / other['loss'] - 1:+.2%}" for one, other in pairs)
            size, whole = pairs[0][0]["bytes"], pairs[0][1]["bytes"]
            print(
                f"{levels:7s} {way:15s} {statistics.mean(losses):.4f}          {ratios:26s} {size / 1e6:6.1f}  "
                f"{size / whole - 1:+.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=8, help="of the network; the bundled model has 8")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--held-out", type=int, default=128, help="windows that the loss is measured on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--levels", nargs="+", choices=QUANTISERS, default=list(QUANTISERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("steps", "batch", "length", "blocks", "rate", "held_out")}
    note = options.out / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{options.out} has runs of other settings ({note.read_text().strip()}): give another folder")
    note.write_text(json.dumps(settings) + "\n")
    for seed in options.seeds:
        for levels in options.levels:
            for way in options.ways:
                if not (options.out / f"{levels}.{way}.{seed}.json").exists():
                    print(run(options, options.out, levels, way, seed), flush=True)
    names = [f"{levels}.{way}.{seed}.json" for levels in QUANTISERS for way in WAYS for seed in options.seeds]
    tell([json.loads((options.out / name).read_text()) for name in names if (options.out / name).exists()])


if __name__ == "__main__":
    main()
