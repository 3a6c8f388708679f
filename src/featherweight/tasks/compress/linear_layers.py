"""Layers and token embedding of a model in memory: what is known of them, and how others take their place."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.errors import CheckpointError, FeatherError, NonFiniteError, RecipeError
from featherweight.methods.budget.base import LayerCandidates
from featherweight.methods.quantize.base import SolveOptions
from featherweight.methods.recipe import Recipe
from featherweight.model.layers.modules import CodedModule
from featherweight.model.layers.replace import output_layer, packed_layer, put_codes, put_in_place
from featherweight.model.layers.tied import tie
from featherweight.model.network.module import describe, is_convolution, is_linear
from featherweight.model.network.unfold import Convolution
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.weights import FLOATING_DTYPES
from featherweight.storage.codes import Code
from featherweight.tasks.compress.plan import Job, Plan
from featherweight.tasks.compress.refusals import check_layers


@dataclass
class LinearLayers:
    """The linear layers of a model, its convolutions among them if they are asked for, and what is known of each.

    anatomy : by the model's family where that is known, else by the modules alone
    modules : name -> module; the token embedding, too, where the family says which it is
    twins : name -> names of further modules with the very same weight
    notes : what stays as it is though it multiplies matrices, a sentence each
    """

    model: nn.Module
    anatomy: Anatomy
    modules: dict[str, nn.Module]
    twins: dict[str, list[str]]
    notes: list[str]

    @classmethod
    def of(cls, model: nn.Module, convolutions: bool = False) -> LinearLayers:
        """FeatherError where there are none."""
        every = {
            name: module
            for name, module in model.named_modules()
            if is_linear(module) or (convolutions and is_convolution(module))
        }
        plain = {name: module for name, module in every.items() if _only_multiplies(module)}
        ours = set(every.values())
        elsewhere = {
            id(parameter)
            for module in model.modules()
            if module not in ours
            for parameter in module._parameters.values()
        }
        modules: dict[str, nn.Module] = {}
        twins: dict[str, list[str]] = {}
        first_with: dict[int, str] = {}
        for name, module in plain.items():
            key = id(module.weight)
            if key in elsewhere:  # tied to an embedding
                continue
            if key in first_with:
                twins.setdefault(first_with[key], []).append(name)
            else:
                first_with[key] = name
                modules[name] = module
        if not modules:
            compressed = any(isinstance(module, CodedModule) for module in model.modules())
            why = "they are compressed already" if compressed else "there is nothing to compress"
            if any(is_convolution(module) for module in model.modules()):
                why += "; its convolutions are layers if convolutions=True is given"
            raise FeatherError(f"{type(model).__name__} has no linear layers with weights of their own: {why}")
        _check_weights(modules)
        notes = [f"{name} has a forward function of its own and stays as it is" for name in every if name not in plain]
        kernels = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Convolution)}
        stacks = [name for name, found in model.named_parameters() if found.dim() == 3 and name not in kernels]
        if stacks:
            notes.append(
                f"{len(stacks)} stacks of matrices ({stacks[0]}, ...) stay: featherweight.compress treats them"
            )
        anatomy = _anatomy(model, modules)
        if anatomy.embedding is not None:
            modules[anatomy.embedding.name] = model.get_submodule(anatomy.embedding.name)
        return cls(model, anatomy, modules, twins, notes)

    def plan(self, recipe: Recipe, options: SolveOptions) -> Plan:
        """RecipeError where the recipe does not fit the model."""
        if recipe.allocation.measures:
            raise RecipeError(
                f"recipe {recipe.name}: the allocation {recipe.allocation.kind} measures layers, as is done for models "
                "in folders only: use featherweight.compress, or take the allocation fixed"
            )
        candidates = recipe.candidates_for(self.anatomy)
        every = [*self.anatomy.layers, *self.anatomy.outside]
        sized = {x.name: LayerCandidates.of(x, candidates[x.name]) for x in every if x.name in candidates}
        treatments = recipe.allocation.assign(sized)
        jobs = tuple(Job(layer, treatments[layer.name]) for layer in every if layer.name in treatments)
        check_layers(recipe, self.anatomy, ((job.layer.name, (job.treatment,)) for job in jobs), text=False)
        sizes = [module.weight for module in self.modules.values()]
        weights = [weight for weight in sizes if isinstance(weight, Tensor)]
        total = sum(weight.numel() for weight in weights)
        nbytes = sum(weight.numel() * weight.element_size() for weight in weights)
        return Plan(
            anatomy=self.anatomy, recipe=recipe, jobs=jobs, copied=(), replaced=tuple(j.layer.tensor for j in jobs),
            dropped={}, copied_bytes=0, source_bytes=nbytes, parameters=total, linear_weights=total,
            linear_dense_bytes=nbytes, options=options,
        )  # fmt: skip

    @property
    def embedding(self) -> str | None:
        """Name of the token embedding, if it can be compressed."""
        return self.anatomy.embedding.name if self.anatomy.embedding else None

    def weight(self, name: str) -> Tensor:
        """[out_features, in_features] in main memory, in the model's dtype."""
        module = self.modules[name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().cpu()
        return weight.t().contiguous() if type(module).__name__ == "Conv1D" else weight.flatten(1)

    def device(self, name: str) -> torch.device:
        """Where a layer's weight lies."""
        weight = self.modules[name].weight
        assert isinstance(weight, Tensor)
        return weight.device

    def put(self, codes: Mapping[str, Code]) -> nn.Module:
        """Let the model compute with the codes of its layers; returns what is the model from now on."""
        linear: dict[nn.Module, nn.Module] = {}
        others: dict[str, Code] = {}
        for name, code in codes.items():
            for place in (name, *self.twins.get(name, ())):
                module = self.modules[name] if place == name else self.model.get_submodule(place)
                if is_linear(module):
                    linear[module] = packed_layer(module, code, name)
                else:
                    others[place] = code
        put_in_place(self.model, linear)
        put_codes(self.model, others)
        if self.embedding in others:
            tie(self.model)
        return linear.get(self.model, self.model)


def _only_multiplies(module: nn.Module) -> bool:
    """Whether a linear layer does nothing but multiply, so that ours can take its place; convolutions keep theirs."""
    own = "forward" in module.__dict__ or (
        isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    )
    return not own and not hasattr(module, "parametrizations")


def _check_weights(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise FeatherError(f"the weight of {name} is on the meta device, so it has no values: load the model first")
        if weight.dtype not in FLOATING_DTYPES:
            raise FeatherError(
                f"the weight of {name} is {weight.dtype}: the model seems to be quantised already, start from its "
                "original weights"
            )
        if not bool(torch.isfinite(weight).all()):
            place = [int(i) for i in (~torch.isfinite(weight)).nonzero()[0]]
            raise NonFiniteError(f"the weight of {name} is not finite at {place}: load the model again")


def _anatomy(model: nn.Module, modules: Mapping[str, nn.Module]) -> Anatomy:
    """What the model's family says of its layers where they are those of a model of transformers; else no more than the
    modules themselves say."""
    if hasattr(model, "config") and hasattr(model.config, "to_dict"):
        with contextlib.suppress(CheckpointError):
            found = read_anatomy(_InMemory(model))
            inside = tuple(layer for layer in found.layers if layer.name in modules and not layer.fused_slice)
            head = found.head if found.head and found.head.name in modules else None
            if inside:
                return replace(found, layers=inside, head=head, embedding=_embedding(model, found.embedding))
    output = output_layer(model)
    layers = tuple(describe(name, module) for name, module in modules.items() if module is not output)
    head = next((describe(name, module) for name, module in modules.items() if module is output), None)
    return Anatomy("structure", 1, "", "", layers, head, (), (), (), ())


def _embedding(model: nn.Module, layer: LinearLayer | None) -> LinearLayer | None:
    """The token embedding, if it is a module of its own with finite numbers in main memory or on a device."""
    module = dict(model.named_modules()).get(layer.name) if layer else None
    weight = None if module is None or is_linear(module) else module._parameters.get("weight")
    if layer is None or weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    _check_weights({layer.name: cast(nn.Module, module)})
    return layer


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


class _InMemory:
    """A model of transformers as the source of an anatomy."""

    def __init__(self, model: Any) -> None:
        self._tensors: dict[str, Tensor] = dict(model.named_parameters())  # a tied one once
        self.config: dict[str, Any] = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        self.folder = self.path = Path(type(model).__name__)
        self.names = tuple(self._tensors)

    def entry(self, name: str) -> _Tensor:
        kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
        tensor = self._tensors[name]
        return _Tensor(kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))

    def file_of(self, name: str) -> _InMemory:
        return self

    def differ(self, one: str, other: str) -> bool:
        return not torch.equal(self._tensors[one], self._tensors[other])
