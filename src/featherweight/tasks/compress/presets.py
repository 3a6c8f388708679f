"""Presets side by side for one model: what each makes of it, what it takes, and what such a preset cost elsewhere.

What a preset costs in quality is known only where it was measured: `assets/quality.json` has the figures of
docs/results.md for a pretrained model and for the bundled one (scripts/make_quality.py writes it). Other models differ.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.errors import FeatherError
from featherweight.methods.recipe import load_recipe
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.system.memory import resident_bytes
from featherweight.system.places import ASSETS
from featherweight.tasks.compress.estimate import estimate_seconds, left_out
from featherweight.tasks.compress.plan import Plan, make_plan

SIDE_BY_SIDE = (
    *("rtn-8", "flexq-w6", "ptqtp-3", "rtn-4", "gptq", "four", "trit-2-blockwise", "trit-2", "ptqtp", "pvq"),
    *("trit-1-blockwise", "trit-1"),
)
"""A dozen presets that between them have what others have: from 8 bits to under 2, with and without data."""
CONTEXT = 4096
"""Tokens of keys and values that running a model is counted with; fewer where the model has a shorter context."""
SIZES = tuple(count * 10**9 for count in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512))
"""Memories that machines have, in bytes."""
QUALITY = ASSETS / "quality.json"


@dataclass(frozen=True)
class Quality:
    """What a preset cost on the model it was measured on.

    model : its name; pretrained : whether it is a real one, and not the small bundled one
    excess : perplexity / original - 1, in percent
    kl : divergence of the predictions from the original's, nats a token
    changes : to the preset where it was measured, like embedding=6bit; "" for the preset as it comes
    """

    model: str
    pretrained: bool
    excess: float
    kl: float
    changes: str = ""


@dataclass(frozen=True)
class Offer:
    """What a preset makes of a model.

    output_bytes : the whole file
    bits : per weight of the compressed layers of the blocks
    memory_bytes : peak while it is made; run_bytes : while the result writes text, with CONTEXT tokens at most
    seconds : of making it on this machine, None where not asked; learned : trainings that are not in it
    qualities : where it was measured, on the pretrained model first
    """

    preset: str
    calibrated: bool
    output_bytes: int
    bits: float
    memory_bytes: int
    run_bytes: int
    seconds: float | None
    learned: tuple[str, ...]
    qualities: tuple[Quality, ...]

    @property
    def fits(self) -> int | None:
        """The smallest memory of SIZES in which the result runs; None where it is larger than all."""
        return next((size for size in SIZES if self.run_bytes <= size), None)

    @property
    def quality(self) -> Quality | None:
        """On the pretrained model, else on the bundled one; None where it was never measured."""
        return self.qualities[0] if self.qualities else None

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what is not known is null."""
        kept = {name: value for name, value in vars(self).items() if name not in ("qualities", "learned")}
        found = [dict(vars(quality)) for quality in self.qualities]
        return {**kept, "fits_bytes": self.fits, "not_in_seconds": list(self.learned), "qualities": found}


@functools.cache
def measured() -> dict[str, Any]:
    """What assets/quality.json holds: `models`, each with its protocol, and `presets`, by model."""
    found: dict[str, Any] = json.loads(QUALITY.read_text(encoding="utf-8"))
    return found


def qualities_of(preset: str) -> tuple[Quality, ...]:
    """What a preset cost where it was measured, on the pretrained model first; empty where it never was."""
    rows = measured()["presets"].get(preset, {})
    return tuple(
        Quality(model["name"], model["pretrained"], **rows[key])
        for key, model in measured()["models"].items()
        if key in rows
    )


def offers(
    checkpoint: Checkpoint,
    threads: int | None = None,
    *,
    presets: Sequence[str] = SIDE_BY_SIDE,
    timed: bool = True,
    notify: Callable[[int, int], None] = lambda done, total: None,
) -> list[Offer]:
    """What presets make of a model, those that suit it.

    Parameters
    ----------
    threads : of the compression that is planned; None: as `featherweight.system.threads` decides
    timed : whether seconds are estimated, which takes seconds itself
    notify : gets (done, total) presets

    Raises
    ------
    FeatherError
        None of them suits the model; what is said of the first.
    """
    found, refused = [], []
    for place, name in enumerate(presets):
        notify(place, len(presets))
        try:
            plan = make_plan(checkpoint, load_recipe(name), threads, None)
        except FeatherError as error:
            refused.append(error)
            continue
        found.append(_offer(name, plan, run_memory(checkpoint.config, plan.output_bytes), timed))
    notify(len(presets), len(presets))
    if not found:
        raise refused[0]
    return found


def _offer(name: str, plan: Plan, run_bytes: int, timed: bool) -> Offer:
    return Offer(
        preset=name,
        calibrated=plan.recipe.calibrated,
        output_bytes=plan.output_bytes,
        bits=plan.inside_bits,
        memory_bytes=plan.memory_bytes(),
        run_bytes=run_bytes,
        seconds=estimate_seconds(plan) if timed else None,
        learned=tuple(left_out(plan)),
        qualities=qualities_of(name),
    )


def run_memory(config: Mapping[str, Any], weights: int, context: int = CONTEXT) -> int:
    """Bytes of a process that writes text with a model: weights, keys and values in 16 bits, and what Python takes."""
    return weights + _cache_bytes(config, context) + resident_bytes()


def _cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """Of keys and values of so many tokens; 0 where the configuration does not say what they are."""

    def number(*names: str) -> int:
        return next((value for name in names if isinstance(value := config.get(name), int)), 0)

    heads = number("num_attention_heads", "n_head")
    width = number("head_dim") or number("hidden_size", "n_embd") // max(1, heads)
    tokens = min(context, number("max_position_embeddings", "n_positions") or context)
    return 2 * 2 * number("num_hidden_layers", "n_layer") * (number("num_key_value_heads") or heads) * width * tokens


@dataclass(frozen=True)
class Wish:
    """What a preset is chosen by; None: no matter.

    run_bytes : memory in which the result has to run
    size_bytes : most bytes of the file
    excess : most percent of perplexity that it may cost
    memory_bytes : memory in which it has to be made
    data_free : without text, which takes minutes at most
    """

    run_bytes: int | None = None
    size_bytes: int | None = None
    excess: float | None = None
    memory_bytes: int | None = None
    data_free: bool = False

    def granted(self, offer: Offer) -> bool:
        """Whether an offer has all that is wished for; its quality is the first that was measured."""
        bad = None if offer.quality is None else offer.quality.excess
        return (
            (self.run_bytes is None or offer.run_bytes <= self.run_bytes)
            and (self.size_bytes is None or offer.output_bytes <= self.size_bytes)
            and (self.excess is None or (bad is not None and bad <= self.excess))
            and (self.memory_bytes is None or offer.memory_bytes <= self.memory_bytes)
            and not (self.data_free and offer.calibrated)
        )


def recommended(found: Sequence[Offer], wish: Wish) -> Offer | None:
    """The offer that costs least quality of those that have all that is wished for; None where there is none.

    Where quality alone was said, the smallest of them; a limit of it is one on the pretrained model, if any offer keeps
    to it there. Figures of two models are never compared: two offers are on the
    pretrained one if both were measured there, else on the bundled one. Of offers between which nothing is known, and
    of equals, the larger file is taken to be the better one.
    """
    fit = sorted((o for o in found if o.qualities and wish.granted(o)), key=lambda offer: -offer.output_bytes)
    if wish.excess is not None:
        fit = [offer for offer in fit if offer.qualities[0].pretrained] or fit
        if wish.run_bytes is None and wish.size_bytes is None:
            return fit[-1] if fit else None
    wins = [sum(_costs_less(one, other) for other in fit) for one in fit]
    return fit[wins.index(max(wins))] if fit else None


def _costs_less(one: Offer, other: Offer) -> bool:
    """Whether an offer is known to cost less quality than another."""
    theirs = {quality.model: quality.excess for quality in other.qualities}
    common = ((quality.excess, theirs[quality.model]) for quality in one.qualities if quality.model in theirs)
    mine, its = next(common, (0.0, 0.0))
    return mine < its
