#!/usr/bin/env python
"""TBT on a small encoder-decoder that restores corrupted sentences: trits of weights and of inputs, by distillation.

Words of a sentence are replaced by masks, byte by byte, and the whole sentence is to be said. A model in full precision
is trained first; every arm begins with its weights. Printed are the loss of held-out sentences in nats a byte, the
share of masked bytes that are found, and that of all bytes, with the right bytes before given.

    python benchmarks/tbt_bart.py --full-steps 400 --steps 200 --width 64 --longest 48      # the bundled texts, minutes
    python benchmarks/tbt_bart.py --text NOVELS.txt --full-steps 6000 --steps 6000
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from seeds import keep, spread
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from featherweight import train

ASSETS = Path(__file__).resolve().parent.parent / "src" / "featherweight" / "assets"
BEGIN, PAD, END, MASK, FIRST = range(5)
"""Tokens; a byte b is the token FIRST + b."""
VOCABULARY = FIRST + 256
SEEN = {"output_hidden_states": True, "output_attentions": True}
PLAIN = "forward={kind: absmean, scope: row}"
INPUTS_KEPT = ("activation={kind: none}", "attention.inputs=false")


class Arm(NamedTuple):
    """changes : of the recipe tbt
    distilled : by all terms; else only by the sentences
    """

    changes: tuple[str, ...]
    distilled: bool


ARMS = {
    "TBT": Arm((), True),
    "TBT, sentences only": Arm((), False),
    "absmean": Arm((PLAIN,), True),
    "TBT, inputs kept": Arm(INPUTS_KEPT, True),
    "absmean, inputs kept": Arm((PLAIN, *INPUTS_KEPT), True),
}
"""absmean is BitNet's scale of weights, mean|w|, where TBT has 4/3 of it; inputs are rounded in the same way."""


class Batch(NamedTuple):
    """Tokens [B, N], padded: corrupted sentences, whole ones, and where bytes were masked."""

    corrupted: Tensor
    whole: Tensor
    masked: Tensor

    @property
    def seen(self) -> Tensor:
        """[B, N], 0 where it is padding."""
        return (self.whole != PAD).long()

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        labels = self.whole.masked_fill(self.whole == PAD, -100)
        given = {"input_ids": self.corrupted, "attention_mask": self.seen, "labels": labels}
        return {key: value.to(device) for key, value in given.items()}


def sentences(path: Path, longest: int) -> list[bytes]:
    """Of a text, each of 16 to `longest` bytes; longer ones are cut between words."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", path.read_text("utf-8")):
        rest = sentence.strip().encode()
        while len(rest) > longest:
            cut = rest.rfind(b" ", 0, longest)
            cut = longest if cut < 16 else cut
            found.append(rest[:cut])
            rest = rest[cut:].strip()
        found.append(rest)
    kept = [one for one in found if len(one) >= 16]
    if not kept:
        sys.exit(f"{path} has no sentence of 16 bytes or more: give another --text")
    return kept


def corrupted(chosen: list[bytes], share: float, generator: torch.Generator) -> Batch:
    """About this share of words becomes masks, a mask a byte, at least one word of each sentence."""
    width = max(len(one) for one in chosen) + 1
    whole = torch.full((len(chosen), width), PAD, device="cpu")
    masked = torch.zeros(len(chosen), width, dtype=torch.bool, device="cpu")
    for row, one in enumerate(chosen):
        whole[row, : len(one)] = torch.tensor(list(one), device="cpu") + FIRST
        whole[row, len(one)] = END
        words = [match.span() for match in re.finditer(rb"\S+", one)]
        picked = torch.rand(len(words), generator=generator).tolist()
        for place, (first, last) in enumerate(words):
            if picked[place] <= max(share, min(picked)):
                masked[row, first:last] = True
    return Batch(whole.masked_fill(masked, MASK), whole, masked)


def network(width: int, layers: int, longest: int) -> Any:
    """From random weights; `layers` in the encoder and as many in the decoder."""
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=longest + 2,
        dropout=0.0,
        init_std=0.1,  # BART's 0.02 is for widths of a thousand
        bos_token_id=BEGIN,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # whose maps can be seen
    return model


def train_it(
    model: Any, recipe: train.TrainRecipe, text: list[bytes], options: argparse.Namespace, steps: int, **how: Any
) -> list[float]:
    """Train in place, and return the loss of each step. `seed`; `teacher`, where all terms of TBT count."""
    teacher, generator = how.get("teacher"), torch.Generator().manual_seed(how["seed"])
    train.prepare(model, recipe)
    device = next(model.parameters()).device
    optimiser, losses = train.make_optimiser(model, recipe), []
    model.train()
    for step in range(steps):
        train.set_clock(model, step, steps)
        train.set_rates(optimiser, recipe, step, steps)
        picked = torch.randint(0, len(text), (options.batch,), generator=generator).tolist()
        batch = corrupted([text[place] for place in picked], options.share, generator)
        given, mask = batch.inputs(device), batch.seen.to(device)
        if teacher is None:
            loss = model(**given).loss
        else:
            with torch.no_grad():
                wanted = teacher(**given, **SEEN)
            loss = train.distillation_loss(model(**given, **SEEN), wanted, mask, mask)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    train.set_clock(model, steps, steps)
    return losses


@torch.no_grad()
def measured(model: Any, text: list[bytes], options: argparse.Namespace) -> dict[str, float]:
    """Of held-out sentences, corrupted in the same way for all: loss, share of masked and of all bytes found."""
    model.eval()
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    loss = right = found = count = masked = 0.0
    for first in range(0, len(text), options.batch):
        batch = corrupted(text[first : first + options.batch], options.share, generator)
        output = model(**batch.inputs(device))
        bytes_of, hit = batch.seen.bool(), output.logits.argmax(-1).cpu() == batch.whole
        loss += float(output.loss) * int(bytes_of.sum())
        right += int((hit & bytes_of).sum())
        found += int((hit & batch.masked).sum())
        count, masked = count + int(bytes_of.sum()), masked + int(batch.masked.sum())
    return {"loss": loss / count, "masked": found / masked, "all": right / count}


def one_seed(
    seed: int, text: list[bytes], held_out: list[bytes], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The full model, then every arm from its weights."""
    torch.manual_seed(seed)
    teacher = network(options.width, options.layers, options.longest).to(options.device)
    full = train.train_recipe("full", [f"schedule.learning_rate={options.full_rate}", "schedule.weight_decay=0.0"])
    train_it(teacher, full, text, options, options.full_steps, seed=seed)
    found = {"full": measured(teacher, held_out, options)}
    told("full", seed, found["full"])
    for name in options.arms:
        arm, student = ARMS[name], copy.deepcopy(teacher)
        recipe = train.train_recipe("tbt", [*arm.changes, f"schedule.learning_rate={options.rate}"])
        how = {"seed": seed + 1000, "teacher": teacher if arm.distilled else None}
        train_it(student, recipe, text, options, options.steps, **how)
        found[name] = measured(student, held_out, options)
        told(name, seed, found[name])
    return found


def told(arm: str, seed: int, found: dict[str, float]) -> None:
    print(f"seed {seed}, {arm}: {', '.join(f'{key} {value:.4f}' for key, value in found.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ASSETS / "calibration.txt", help="to train on")
    parser.add_argument("--held-out", type=Path, default=ASSETS / "evaluation.txt", help="to measure on")
    parser.add_argument("--full-steps", type=int, default=1500, help="in full precision")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    parser.add_argument("--longest", type=int, default=96, help="bytes of a sentence")
    parser.add_argument("--share", type=float, default=0.2, help="of words that are masked")
    parser.add_argument("--full-rate", type=float, default=3e-3)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--held-out-sentences", type=int, default=256)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = sentences(options.text, options.longest)
    held_out = sentences(options.held_out, options.longest)[: options.held_out_sentences]
    print(f"{len(text)} sentences to train on, {len(held_out)} held out; a byte by chance {math.log(256):.2f} nats")
    runs = [one_seed(seed, text, held_out, options) for seed in range(options.seeds)]
    print(f"\n{'arm':22} {'nats a byte':>18} {'masked bytes':>18} {'all bytes':>18}")
    for arm in runs[0]:
        cells = [spread([run[arm][key] for run in runs], ".4f") for key in ("loss", "masked", "all")]
        print(f"{arm:22} {' '.join(f'{cell:>18}' for cell in cells)}")
    keep(options.json, options, runs)


if __name__ == "__main__":
    main()
