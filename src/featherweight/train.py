"""`featherweight.train`: low-bit training for any loop, and one of our own.

`prepare` turns the linear layers of a model into low-bit ones in place, `export` writes what they have become as a
folder of codes; between the two any loop trains, transformers' Trainer for one. `set_clock` tells side paths where the
training is (`clock_callback` does so for Trainer), `parameter_groups` says what decays, `guard` keeps what CGA freezes,
`Flips` counts codes that change, `distillation_loss` compares a low-bit model with the full one. `run` is the loop of
`feather train`.
"""

from __future__ import annotations

from typing import Any

from featherweight.methods.train.distillation import distillation_loss
from featherweight.methods.train.flips import Flipped, Flips
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import (
    guard,
    low_bit_layers,
    make_optimiser,
    parameter_groups,
    penalty,
    prepare,
    set_clock,
    set_rates,
)
from featherweight.methods.train.recipe import TrainRecipe, train_presets, train_recipe
from featherweight.tasks.train.export import Exported, export
from featherweight.tasks.train.result import Training
from featherweight.tasks.train.settings import TrainSettings
from featherweight.tasks.train.training import run

__all__ = [
    "Exported",
    "Flipped",
    "Flips",
    "LowBitLinear",
    "TrainRecipe",
    "TrainSettings",
    "Training",
    "clock_callback",
    "distillation_loss",
    "export",
    "guard",
    "low_bit_layers",
    "make_optimiser",
    "parameter_groups",
    "penalty",
    "prepare",
    "run",
    "set_clock",
    "set_rates",
    "train_presets",
    "train_recipe",
]


def clock_callback() -> Any:
    """A callback for transformers' Trainer: it sets the clock before each step, and guards frozen weights."""
    from transformers import TrainerCallback

    class Clocks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if kwargs.get("optimizer") is not None:
                guard(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]), kwargs["model"])
            set_clock(kwargs["model"], state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            set_clock(kwargs["model"], state.global_step, state.max_steps)

    return Clocks()
