"""A model's linear layers as low-bit layers, in place; and what a training of them needs around its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import FeatherError, RecipeError
from featherweight.methods.learn.optimisers import optimiser_named
from featherweight.methods.train.attention import KEYS, QUERIES, attentions, change_attentions, check_attentions
from featherweight.methods.train.base import Clock
from featherweight.methods.train.layer import LowBit, LowBitLinear
from featherweight.methods.train.recipe import TrainRecipe, train_recipe
from featherweight.model.layers.modules import CodedModule
from featherweight.model.layers.replace import output_layer

FACTOR = "rate_factor"
"""Of a group of parameters: times the schedule's learning rate is its own."""
DECAYS = "decays"
"""Of a group of parameters: whether the schedule's weight decay is for it."""


def prepare(
    model: nn.Module, recipe: str | Path | Mapping[str, Any] | TrainRecipe, changes: Sequence[str] = ()
) -> nn.Module:
    """Make the linear layers of a model train with rounded weights, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any module with `nn.Linear` layers, on any device. Token embedding, output layer, classifiers and what else a
        model of transformers has beside its base model, norms and what is no `nn.Linear` stay as they are. Latents of
        fewer bits than float32 become float32; inputs may stay what they are.
    recipe : str, Path, mapping or TrainRecipe
        A preset of trainings (`feather train --help` names them), a YAML file, or what one holds.
    changes : sequence of str
        Like "forward.scope=row", applied to the recipe.

    Returns
    -------
    torch.nn.Module
        The model itself. `forward` computes with what would be stored; `featherweight.train.export` stores it.

    Raises
    ------
    RecipeError
        The recipe is wrong, or cannot code a layer's matrix; nothing was changed then.
    FeatherError
        There are no linear layers to train, or they are compressed already.
    """
    chosen = train_recipe(recipe, changes)
    layers = linear_layers(model)
    taken = {name: layer for name, layer in layers.items() if chosen.layers.takes(name)}
    if not taken:
        raise FeatherError(_nothing(model, layers))
    found, products = {}, set()
    if chosen.attention.inputs or chosen.attention.product:
        found = attentions(model)
        check_attentions(model, found, chosen.attention.product)
        if chosen.attention.product:
            made_of = {name: {f"{name}.{child}" for child in (*QUERIES, *KEYS)} & layers.keys() for name in found}
            products = {name for name, parts in made_of.items() if len(parts) == 2 and parts <= taken.keys()}
            latents = {part for name in products for part in made_of[name]}
            taken = {name: layer for name, layer in taken.items() if name not in latents}
    if chosen.forward.kind == "full":
        taken = {}
    for name, layer in taken.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise FeatherError(f"the weight of {name} is not finite: load the model again")
        chosen.forward.check_shape((layer.out_features, layer.in_features), name)
    for name, layer in taken.items():
        layer.__class__ = LowBitLinear
        assert isinstance(layer, LowBitLinear)
        layer.begin(chosen.choices, name)
    change_attentions(found, chosen.choices, chosen.attention.inputs, products)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that can be trained so, by name: those that only multiply, whose weight no other module has, and
    that are not in the head of a model of transformers (what it has beside its base model)."""
    head = output_layer(model)
    base: Any = model.base_model if hasattr(model, "base_model_prefix") else model
    inside = {id(module) for module in base.modules()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and owners[id(module.weight)] == 1 and id(module) in inside
    }


def _nothing(model: nn.Module, layers: Mapping[str, nn.Linear]) -> str:
    kind = type(model).__name__
    if layers:
        roles = sorted({name.rpartition(".")[2] for name in layers})
        return f"layers.include and layers.skip leave no layer of {kind} to train; layers here: {', '.join(roles)}"
    if any(isinstance(module, LowBit) for module in model.modules()):
        return f"the layers of {kind} are low-bit layers already"
    if any(isinstance(module, CodedModule) for module in model.modules()):
        return f"the layers of {kind} are compressed: train the original model, or heal the compressed one"
    return f"{kind} has no linear layers (nn.Linear) with weights of their own: there is nothing to train with few bits"


def low_bit_layers(model: nn.Module) -> dict[str, LowBitLinear]:
    """The low-bit layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


def low_bit_modules(model: nn.Module) -> dict[str, LowBit]:
    """The low-bit layers of a model by name, and products of queries and keys."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBit)}


def set_clock(model: nn.Module, step: int, steps: int) -> None:
    """Tell all low-bit layers of a model that `step` steps of `steps` are done.

    Side paths and rules that change over a training follow it; it is saved with the model's state.
    """
    for layer in low_bit_modules(model).values():
        layer.set_clock(Clock(step, steps))


def penalty(model: nn.Module) -> Tensor | None:
    """What side paths add to the loss: a scalar, or None."""
    terms = [term for layer in low_bit_modules(model).values() if (term := layer.penalty()) is not None]
    return torch.stack([term.float() for term in terms]).sum() if terms else None


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters for an optimiser: matrices, which decay, all other tensors, which do not, and those with a
    learning rate of their own. Each has its `rate_factor`, and whether it `decays`."""
    factors: dict[int, float] = {}
    own: set[int] = set()
    for layer in low_bit_modules(model).values():
        rates = layer.choices.side.rates()
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in ("weight", "bias"):
                own.add(id(parameter))
                factors[id(parameter)] = rates.get(name, 1.0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        key = factors.get(id(parameter), 1.0), parameter.dim() >= 2 and id(parameter) not in own
        groups.setdefault(key, []).append(parameter)
    return [{"params": found, FACTOR: key[0], DECAYS: key[1]} for key, found in groups.items()]


def make_optimiser(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters of a model; frozen weights are guarded (`guard`)."""
    groups = parameter_groups(model)
    rate = recipe.schedule.at(0, 1).learning_rate
    made = optimiser_named(recipe.optimiser.kind, **recipe.optimiser.settings())
    optimiser = made(groups, rate)  # type: ignore[arg-type]
    guard(optimiser, model)
    return optimiser


def set_rates(optimiser: torch.optim.Optimizer, recipe: TrainRecipe, step: int, steps: int) -> float:
    """Give an optimiser of `make_optimiser` what the schedule says for a step; returns the learning rate."""
    rates = recipe.schedule.at(step, steps)
    for group in optimiser.param_groups:
        group["lr"] = rates.learning_rate * group.get(FACTOR, 1.0)
        if "weight_decay" in group:
            group["weight_decay"] = rates.weight_decay if group.get(DECAYS, True) else 0.0
    return rates.learning_rate


def guard(optimiser: torch.optim.Optimizer, model: nn.Module) -> None:
    """Keep the bits of latents that a backward rule freezes (CGA) in every step of an optimiser.

    Query and key matrices behind a product (QKR) have no codes of their own: only their gradients are frozen.
    """
    kept: list[tuple[LowBitLinear, Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        kept.clear()
        for layer, frozen in _frozen(model):
            kept.append((layer, frozen, layer.weight.detach().clone()))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for layer, frozen, weight in kept:
            layer.weight.copy_(torch.where(frozen, weight, layer.weight))
        kept.clear()

    optimiser.register_step_pre_hook(before)
    optimiser.register_step_post_hook(after)


def _frozen(model: nn.Module) -> Iterator[tuple[LowBitLinear, Tensor]]:
    for layer in low_bit_layers(model).values():
        frozen = layer.choices.backward.frozen(layer, layer.choices.forward, layer.learned)
        if frozen is not None:
            yield layer, frozen


def check_finite(model: nn.Module, loss: float, step: int) -> None:
    """FeatherError naming step and layer where a loss, or a gradient, is not finite."""
    wrong = [
        name.rpartition(".")[0] or name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if math.isfinite(loss) and not wrong:
        return
    where = f"; the first layer with such a gradient is {wrong[0]}" if wrong else ""
    raise FeatherError(
        f"the loss is {loss:g} in step {step}{where}: lower schedule.learning_rate; the last good state is kept, and "
        "with a new --out the training begins anew"
    )


def check_exportable(recipe: TrainRecipe) -> None:
    """RecipeError where no folder can hold what a recipe trains."""
    why = recipe.attention.unstorable or recipe.activation.unstorable
    if why:
        raise RecipeError(why)
