"""Folders of ours in vLLM, on CPUs: its layers multiply by our packed operators.

vLLM puts layers into one (query, key and value; gate and up). Each part keeps a `FeatherLinear` of its own here, so
parts may have different codes, or none; what a file holds for a part goes to that part, and the products are put side
by side. An embedding in codes is decoded when it is loaded. Processes that share a layer are refused.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from featherweight.errors import FeatherError
from featherweight.model.layers.modules import FeatherLinear
from featherweight.storage.checkpoint.format import METHOD, module_specs

SHARDS = {None: 0, "q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of a layer that it has put together; others are numbers."""

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in)$")

_numbers = itertools.count()
_parts: dict[int, tuple[nn.Module, ...]] = {}
"""The parts of each layer, by the number under which the operator below finds them."""


@torch.library.custom_op("featherweight::vllm_parts", mutates_args=())
def _multiply(x: Tensor, number: int, width: int) -> Tensor:
    """x [tokens, in] times the parts of a layer: [tokens, width]. One operator, so that nothing within is traced."""
    rows = x.unsqueeze(1)  # a token each, which the packed operators take
    return torch.cat([part(rows).squeeze(1) for part in _parts[number]], -1)


@_multiply.register_fake
def _(x: Tensor, number: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width)


def make_known() -> None:
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(FeatherConfig)


class FeatherConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a folder of ours, for vLLM."""

    def __init__(self, specs: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.specs = specs

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FeatherConfig:
        specs = module_specs(config)
        given = [*(config.get("biases") or ()), *(module for module, spec in specs.items() if spec.get("bias"))]
        if given:
            raise FeatherError(
                f"{given[0]} was given a bias when it was compressed, for which vLLM's layer has no place"
            )
        sliced = next((module for module in specs if "[" in module), None)
        if sliced is not None:
            raise FeatherError(f"{sliced} is one of several experts in a tensor, which the plug-in for vLLM cannot run")
        return cls(specs)

    def apply_vllm_mapper(self, mapper: Any) -> None:
        """vLLM names some models' layers otherwise than their files do."""
        self.specs = mapper.apply_dict(self.specs)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self._embedding()
            return FeatherEmbeddingMethod(self.specs[name], name) if name in self.specs else None
        if not isinstance(layer, LinearBase):
            return None
        names = self._parts_of(prefix)
        if not any(name in self.specs for name in names):
            return UnquantizedLinearMethod()
        return FeatherLinearMethod([(name, self.specs.get(name)) for name in names])

    def _embedding(self) -> str:
        """The token embedding among the coded modules, which some of vLLM's models make without a name."""
        found = [name for name in self.specs if EMBEDDING.search(name)]
        return found[0] if len(found) == 1 else ""

    def _parts_of(self, prefix: str) -> list[str]:
        """Names in the file of the layers that vLLM's layer is made of."""
        before, dot, last = prefix.rpartition(".")
        if prefix in self.specs:
            return [prefix]
        return [before + dot + part for part in self.packed_modules_mapping.get(last, [last])]


class FeatherLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One or several of our layers in a layer of vLLM's.

    parts : name and spec of each; None for one that is not compressed
    """

    def __init__(self, parts: list[tuple[str, dict[str, Any] | None]]) -> None:
        self.parts = parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        _one_process(self.parts[0][0])
        sizes = output_partition_sizes if len(self.parts) > 1 else [sum(output_partition_sizes)]
        made: list[nn.Module] = []
        for (name, spec), rows in zip(self.parts, sizes, strict=True):
            made.append(_part(name, spec, (rows, input_size), params_dtype))
        number, width = next(_numbers), sum(sizes)
        _parts[number] = tuple(made)
        object.__setattr__(layer, "feather_parts", (number, width, tuple(made)))  # no submodules of the layer's
        for key in dict.fromkeys(key for part in made for key in dict(part.named_parameters())):
            _register(layer, key, _Collector(made, key))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        parts = _held(layer)[2]
        for (name, _), part in zip(self.parts, parts, strict=True):
            lacking = [key for key, value in part.named_parameters() if not getattr(value, "feather_loaded", False)]
            if lacking:
                raise FeatherError(f"the folder has no tensor {name}.{lacking[0]}: download or compress it again")
            if isinstance(part, FeatherLinear):
                part.settle()
                part.packed()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        number, width, _ = _held(layer)
        flat = x.reshape(-1, x.shape[-1])
        product: Tensor = torch.ops.featherweight.vllm_parts(flat, number, width)
        product = product.view(*x.shape[:-1], width)
        return product if bias is None else product + bias


def _held(layer: nn.Module) -> tuple[int, int, tuple[nn.Module, ...]]:
    """Number, width and parts of a layer."""
    found: tuple[int, int, tuple[nn.Module, ...]] = layer.__dict__["feather_parts"]
    return found


class FeatherEmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding, or an output layer, in codes: decoded into a plain one."""

    def __init__(self, spec: dict[str, Any], name: str) -> None:
        super().__init__()
        self.spec, self.name = spec, name

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        _one_process(self.name)
        super().create_weights(layer, *sizes, **attributes)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        weight.data.zero_()
        part = _part(self.name, self.spec, (self.spec["shape"][0], weight.shape[1]), weight.dtype)
        object.__setattr__(layer, "feather_parts", (part,))
        for key in dict(part.named_parameters()):
            _register(layer, key, _Collector([part], key))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        found = layer.__dict__.pop("feather_parts", None)  # shared by embedding and output layer, and called for both
        if found is not None:
            part: FeatherLinear = found[0]
            part.settle()
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.data[: part.out_features] = part.decode().to(weight.dtype)
        super().process_weights_after_loading(layer)


class _Collector:
    """Takes what vLLM has read for a parameter to the part of the layer that it belongs to."""

    def __init__(self, parts: list[nn.Module], key: str) -> None:
        self.parts, self.key = parts, key

    def __call__(self, param: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        part = self.parts[SHARDS.get(shard, shard)]
        found: Any = part.get_parameter(self.key) if self.key in dict(part.named_parameters()) else None
        if found is None or found.shape != loaded.shape:
            raise FeatherError(f"{self.key} of {part} is {list(loaded.shape)} in the folder: compress the model again")
        if isinstance(part, FeatherLinear) and found.dtype != loaded.dtype:
            raise FeatherError(f"{self.key} of {part} is {loaded.dtype} in the folder: compress the model again")
        found.data.copy_(loaded)
        found.feather_loaded = True


class _Plain(nn.Module):
    """A layer that is not compressed beside others that are."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def _part(name: str, spec: dict[str, Any] | None, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    if spec is None:
        return _Plain(shape, dtype)
    if tuple(spec["shape"]) != shape:
        raise FeatherError(f"{name} is {spec['shape']} in config.json, and vLLM's layer {list(shape)}")
    return FeatherLinear(spec, name=name, compute_dtype=dtype, device="cpu")


def _register(layer: nn.Module, key: str, loader: _Collector) -> None:
    """A parameter without values, which stands for what is read."""
    if key in layer._parameters:
        raise FeatherError(f"vLLM's layer has a {key} of its own: this model is not run by the plug-in")
    parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.weight_loader = loader
    layer.register_parameter(key, parameter)


def _one_process(name: str) -> None:
    if get_tensor_model_parallel_world_size() > 1:
        raise FeatherError(f"{name} cannot be shared among processes: run vLLM with --tensor-parallel-size 1")
