"""Puts compressed layers into a model that has not been loaded yet.

The names in `quantization_config` are those of the checkpoint. The loaded class may have another base (`AutoModel` for
a checkpoint of `AutoModelForCausalLM`, or the other way round), other heads, or renamed modules; what cannot be placed
is an error that names the module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featherweight.errors import CheckpointError
from featherweight.model.layers.coded import Convolution, coded_class
from featherweight.model.layers.experts import PARTS, ExpertName, expert_name, install_experts
from featherweight.model.layers.modules import CodedModule, FeatherConv1D, FeatherLinear
from featherweight.model.layers.tied import tie
from featherweight.storage.codes import Code

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """`expert_paths` are the modules whose 3-D parameters were replaced; `saved_names` maps the names of all compressed
    modules in the checkpoint to those under which this model saves them (a base model has no prefix)."""

    expert_paths: list[str]
    saved_names: dict[str, str]


def replace_layers(
    model: Any,
    specs: dict[str, dict[str, Any]],
    rename: Callable[[str], str] = str,
    parts: Sequence[tuple[str, tuple[str, ...]]] = PARTS,
) -> Placed:
    """Replace every module that `specs` names.

    Parameters
    ----------
    model : a `PreTrainedModel`, usually on the meta device.
    specs : module name in the checkpoint -> code spec with `shape`.
    rename : checkpoint name -> name in this model class.
    parts : see `install_experts`.

    Raises
    ------
    CheckpointError
        a module is missing, has no matrix, is tied, or has another shape; a code is unknown.
    """
    modules = dict(model.named_modules())
    experts: dict[str, list[tuple[str, ExpertName, dict[str, Any]]]] = {}
    saved_names: dict[str, str] = {}
    for name, spec in specs.items():
        for path, saved_name in _candidates(model, name, rename):
            saved_names[name] = saved_name
            if path in modules and path:
                _replace(model, path, name, spec)
                break
            place = expert_name(path, modules.get)
            if place is not None:
                experts.setdefault(place.path, []).append((name, place, spec))
                break
        else:
            if not _of_another_head(model, name, specs):
                raise CheckpointError(
                    f"quantization_config compresses the module {name!r}, which {type(model).__name__} does not have: "
                    "load the folder with the class named in its config.json (architectures)"
                )
            del saved_names[name]
            logger.warning("%s has no module %r: its compressed weights are not used", type(model).__name__, name)
    for path, entries in experts.items():
        install_experts(modules[path], entries, parts)
    if output_layer(model) is not None:
        tie(model)
    return Placed(list(experts), saved_names)


def give_biases(model: Any, names: Iterable[str], rename: Callable[[str], str] = str) -> list[str]:
    """Biases, to be loaded, for plain linear modules that the compression gave one; their names as this model saves
    them. Modules of another head are left out, as in `replace_layers`.

    Raises
    ------
    CheckpointError
        a module is missing or no linear layer.
    """
    modules = dict(model.named_modules())
    given = []
    for name in names:
        path, saved = next(((p, s) for p, s in _candidates(model, name, rename) if p in modules and p), ("", ""))
        if not path and type(model).__name__ not in (getattr(model.config, "architectures", None) or []):
            logger.warning("%s has no module %r: its bias is not used", type(model).__name__, name)
            continue
        module = modules.get(path)
        if not isinstance(module, nn.Linear) or isinstance(module, CodedModule):
            raise CheckpointError(
                f"quantization_config gives a bias to {name!r}, which is no linear layer of {type(model).__name__}: "
                "load the folder with the class named in its config.json (architectures)"
            )
        weight = module.weight
        module.register_parameter(
            "bias", nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
        )
        given.append(saved)
    return given


def _candidates(model: Any, name: str, rename: Callable[[str], str]) -> Iterable[tuple[str, str]]:
    """Paths where a module of the checkpoint may be, each with the name under which the model will save it."""
    prefix = f"{model.base_model_prefix}."
    for path in dict.fromkeys((rename(name), name)):
        yield path, name
        yield prefix + path, prefix + name
        yield path.removeprefix(prefix), name.removeprefix(prefix)


def _of_another_head(model: Any, name: str, specs: Iterable[str]) -> bool:
    """Whether a module that the model lacks belongs to the head of the class that was saved, not to the base model."""
    prefix = f"{model.base_model_prefix}."
    saved_as = getattr(model.config, "architectures", None) or []
    outside = not name.startswith(prefix) and any(other.startswith(prefix) for other in specs)
    return outside and type(model).__name__ not in saved_as


def _replace(model: Any, path: str, name: str, spec: dict[str, Any]) -> None:
    old = model.get_submodule(path)
    shape = matrix_shape(old)
    if shape is None:
        raise CheckpointError(
            f"quantization_config compresses the module {name!r}, which is a {type(old).__name__} in "
            f"{type(model).__name__}, without a weight matrix: leave it out of the recipe and compress the model again"
        )
    if list(spec["shape"]) != shape:
        raise CheckpointError(
            f"the module {name!r} has shape {list(spec['shape'])} in quantization_config and {shape} in "
            f"{type(model).__name__}: config.json and the weights do not belong together"
        )
    if old is output_layer(model) and getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        raise CheckpointError(
            f"quantization_config compresses {name!r}, but it is tied to the input embedding, whose code would be its "
            "own: set tie_word_embeddings to false in config.json, or compress the model again"
        )
    _refuse_rounded_inputs(old, name, spec)
    _exchange(model, path, name, spec)


def _refuse_rounded_inputs(module: nn.Module, name: str, spec: dict[str, Any]) -> None:
    if isinstance(module, Convolution) and spec.get("kind") == "quantized-input":
        raise CheckpointError(
            f"the code of the convolution {name!r} asks for rounded inputs, which convolutions do not round: compress "
            "the model without quantize-inputs"
        )


def output_layer(model: Any) -> Any:
    """The module that makes logits of hidden states; None where there is none, as in models of images."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _exchange(model: nn.Module, path: str, name: str, spec: dict[str, Any]) -> CodedModule:
    """Put a compressed module, with uninitialised tensors, in a module's place."""
    old: Any = model.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    if not multiplies(old):  # an embedding, a router, a convolution: keeps its own forward, which reads `weight`
        weight = old._parameters["weight"]
        held = coded_class(type(old))
        old.__class__ = held
        del old._parameters["weight"]
        old.hold(spec, name, weight.dtype, weight.device)
        return old  # type: ignore[no-any-return]
    kind = FeatherLinear if isinstance(old, nn.Linear) else FeatherConv1D
    bias = old.bias is not None or spec.get("bias") is True  # the compression may have given it one
    spec = {key: value for key, value in spec.items() if key != "bias"}
    made = kind(spec, bias, name=name, compute_dtype=old.weight.dtype, device=old.weight.device)
    model.get_submodule(parent)._modules[leaf] = made
    return made


def put_codes(module: nn.Module, codes: Mapping[str, Code]) -> None:
    """Let modules in memory compute with codes from now on, in place of their weights.

    Parameters
    ----------
    module : any module, changed in place; what `codes` does not name stays
    codes : path of a linear layer, an embedding or a convolution in it -> code of its matrix [out, in]; that of a
        convolution is [out, in / groups * product of kernel]

    Raises
    ------
    CheckpointError : a path leads to no module with a matrix, or a code has another shape; nothing was changed then
    """
    modules = dict(module.named_modules())
    for path, code in codes.items():
        shape = matrix_shape(modules[path]) if path and path in modules else None
        if shape is None:
            raise CheckpointError(
                f"{type(module).__name__} has no module {path!r} with a weight matrix to put a code in: name its "
                "linear layers, embeddings and convolutions by their paths"
            )
        if list(code.spec["shape"]) != shape:
            raise CheckpointError(
                f"the code for {path!r} is that of a matrix {list(code.spec['shape'])}, and the module's is {shape}: "
                "it was made for another one"
            )
        _refuse_rounded_inputs(modules[path], path, code.spec)
    for path, code in codes.items():
        bias = getattr(modules[path], "bias", None)
        device = modules[path].weight.device
        held = _exchange(module, path, path, code.spec)
        for key, stored in code.tensors().items():
            held._parameters[key] = nn.Parameter(stored.to(device, copy=True), requires_grad=False)
        if bias is not None:
            held.bias = bias


def packed_layer(old: nn.Module, code: Code, name: str) -> FeatherLinear:
    """The compressed layer that takes the place of a linear one in memory: bias, dtype and device are those of `old`.

    code : of the matrix [out_features, in_features]
    name : of the module, for messages
    """
    weight, bias = old._parameters["weight"], old._parameters.get("bias")
    assert weight is not None
    kind = FeatherConv1D if type(old).__name__ == "Conv1D" else FeatherLinear
    spec = {**code.spec, "shape": list(code.shape)}
    made = kind(spec, name=name, compute_dtype=weight.dtype, device="meta")
    for key, tensor in code.tensors().items():
        stored = tensor.detach().to(weight.device, copy=True)
        made._parameters[key] = nn.Parameter(stored, requires_grad=False)
    made._parameters["bias"] = bias
    return made.train(old.training)


def put_in_place(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Exchange modules of a model, wherever each of them stands."""
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is not None and child in layers:
                parent._modules[leaf] = layers[child]


def multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer, compressed or not, also GPT-2's `Conv1D`, which stores the transpose."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_shape(module: nn.Module) -> list[int] | None:
    """Shape [out_features, in_features] of a module's weight matrix, None if it has none.

    A convolution's is [out, in / groups * product of kernel].
    """
    weight = module._parameters.get("weight")
    if weight is not None and isinstance(module, Convolution):
        return [len(weight), weight[0].numel()]
    if weight is None or weight.dim() != 2:
        return None
    return list(weight.shape)[:: -1 if type(module).__name__ == "Conv1D" else 1]
