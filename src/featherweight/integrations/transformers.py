"""The one place that touches transformers' quantizer API; works with transformers 4.5x and 5.x.

What differs between the two:
- 4.x casts every floating-point tensor it loads to the model's dtype, unless `config._pre_quantization_dtype` is None;
  it is set to None for the time of loading and the casts are made here, to the dtype of each parameter.
- 5.x renames and fuses tensors while loading ("weight conversions"); converters must leave compressed experts alone.
- 4.x reports missing tensors to the quantizer; 5.x does not, but names the files before it loads them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from featherweight.errors import CheckpointError
from featherweight.model.layers.experts import PARTS
from featherweight.model.layers.modules import CodedModule
from featherweight.model.layers.replace import give_biases, replace_layers
from featherweight.model.network.accounting import BESIDE
from featherweight.storage.checkpoint.format import (
    FORMAT_VERSION,
    HASHES_KEY,
    METHOD,
    VERSION_KEY,
    module_specs,
    quantization_config,
)
from featherweight.storage.checkpoint.integrity import check_paths
from featherweight.system.threads import thread_count

LOADS_BY_CONVERSION = int(transformers.__version__.split(".")[0]) >= 5
SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def register() -> None:
    """Make transformers know `quant_method: featherweight`. Calling it again changes nothing."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FeatherConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = FeatherQuantizer


class FeatherConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json, kept as it is."""

    def __init__(self, **stored: Any) -> None:
        self.quant_method = METHOD
        self.stored = {"quant_method": METHOD, **stored}
        self.specs = module_specs(self.stored)
        if not isinstance(self.stored.get("codes"), list):
            raise CheckpointError("the field 'codes' of quantization_config is no list: restore config.json")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**copy.deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def rename(self, names: dict[str, str]) -> None:
        """Keep only the modules in `names`, under the names to which it maps them."""
        for entry in self.stored["codes"]:
            entry["modules"] = {names[name]: shape for name, shape in entry["modules"].items() if name in names}
        self.stored["codes"] = [entry for entry in self.stored["codes"] if entry["modules"]]
        self.specs = module_specs(self.stored)

    @property
    def biases(self) -> list[str]:
        """Plain linear modules that the compression gave a bias."""
        return list(self.stored.get("biases", []))

    def keep_biases(self, names: list[str]) -> None:
        """List these modules only, under the names given."""
        self.stored.pop("biases", None)
        if names:
            self.stored["biases"] = names

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.stored)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class FeatherQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the compressed layers before the weights are loaded, and checks that all of them arrive as stored."""

    requires_calibration = False
    requires_parameters_quantization = True  # 4.x: lets `create_quantized_param` load parameters

    def __init__(self, quantization_config: FeatherConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError(
                "featherweight does not compress while loading: run `feather compress MODEL --out DIR` and load DIR"
            )
        self._expert_paths: list[str] = []
        self._load_dtype: torch.dtype | None = None
        self._built_dtypes: dict[str, torch.dtype] = {}

    # Before loading -------------------------------------------------------------------------------------------------

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Nothing: the base class swaps experts modules here for some methods, and needs accelerate to do it."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        rename, parts = conversions(model)
        placed = replace_layers(model, self.quantization_config.specs, rename, parts)
        self._expert_paths = placed.expert_paths
        if not LOADS_BY_CONVERSION:  # 4.x initialises weights of modules without asking the weights themselves
            for _, module in coded_modules(model):
                module._is_hf_initialized = True
        self.quantization_config.keep_biases(give_biases(model, self.quantization_config.biases, rename))
        if kwargs.get("checkpoint_files"):  # 5.x; 4.x does not say
            check_files(kwargs["checkpoint_files"], model, rename)
        check_paths(weight_files(model, kwargs.get("checkpoint_files")), threads=thread_count())
        self.quantization_config.rename(placed.saved_names)
        self._built_dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """5.x: converters that fuse per-expert matrices must not see those of replaced experts."""
        for conversion in weight_conversions:
            if hasattr(conversion, "operations"):
                conversion.compiled_sources = Except(conversion.compiled_sources, self._expert_paths)
        return weight_conversions

    # While loading, 4.x ---------------------------------------------------------------------------------------------

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        if self._load_dtype is None:
            self._load_dtype = model.config._pre_quantization_dtype
        model.config._pre_quantization_dtype = None
        return expected_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], *_: Any) -> list[str]:
        stored = set(stored_names(model))
        tied = [re.compile(pattern) for pattern in getattr(model, "_tied_weights_keys", None) or ()]
        missing_keys = [key for key in missing_keys if not any(pattern.search(key) for pattern in tied)]
        lost = [key for key in missing_keys if key in stored or of_base(model, key)]
        if lost:
            raise missing_tensors(lost)
        return missing_keys

    def check_quantized_param(self, model: nn.Module, param_value: Any, param_name: str, *_: Any, **__: Any) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not LOADS_BY_CONVERSION  # 4.57 asks this instead of `check_quantized_param`

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        """4.x: put a loaded tensor in its place, in the dtype its parameter was made with."""
        path, name = param_name.rpartition(".")[::2]
        module = model.get_submodule(path)
        if not isinstance(module, CodedModule) or name not in module.layout:
            old = module._parameters.get(name, module._buffers.get(name))
            if old is not None and param_value.is_floating_point() and old.is_floating_point():
                param_value = param_value.to(old.dtype)
        module.load_state_dict({name: param_value.to(target_device)}, strict=False, assign=True)

    # After loading --------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.config.quantization_config = self.quantization_config  # 4.x keeps a copy from before the renaming
        if self._load_dtype is not None:
            model.config._pre_quantization_dtype = self._load_dtype
        if not LOADS_BY_CONVERSION and "disk" in getattr(model, "hf_device_map", {}).values():
            raise CheckpointError(
                "transformers 4.x cannot offload a compressed model to disk without rounding its scales: "
                "install transformers 5, or give a device_map without 'disk'"
            )
        self._cast_renamed(model)
        for module in model.modules():
            if isinstance(module, CodedModule):
                module.settle()

    def _cast_renamed(self, model: Any) -> None:
        """Cast plain tensors to the dtype the model was built with.

        5.x up to 5.20 leaves those in the file's dtype whose names it changes while loading, as it takes every such
        tensor of a compressed model for a stored code; a float32 router then meets bfloat16 activations.
        """
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        coded = {f"{name}." for name, _ in coded_modules(model)}
        for name, parameter in model.named_parameters():
            dtype = self._built_dtypes.get(name, parameter.dtype)
            stored = f"{name.rpartition('.')[0]}." in coded
            if parameter.dtype != dtype and not stored and not any(part in name for part in kept):
                parameter.data = parameter.data.to(dtype)

    # Saving ---------------------------------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any, **__: Any) -> tuple[None, dict[str, str]]:
        """Metadata of the safetensors files: format version and a SHA-256 of the bytes of each tensor."""
        metadata = {VERSION_KEY: str(FORMAT_VERSION)}
        tensors = saved_tensors(model)
        if not any(tensor.is_meta for tensor in tensors.values()):  # offloaded tensors are not at hand
            hashes = {name: tensor_hash(tensor) for name, tensor in sorted(tensors.items())}
            metadata[HASHES_KEY] = json.dumps(hashes, separators=(",", ":"))
        return None, metadata


class Except:
    """A compiled pattern that does not match the keys of some modules.

    A key may lack the base model's prefix that the path has, or have one that the path lacks.
    """

    def __init__(self, pattern: Any, paths: Iterable[str]) -> None:
        self.pattern = pattern
        self.paths = frozenset(paths)
        self.endings = frozenset(ending for path in self.paths for ending in dotted_endings(path))

    @property
    def groupindex(self) -> Any:
        return self.pattern.groupindex

    def search(self, key: str) -> Any:
        parts = key.split(".")
        for end in range(1, len(parts)):
            head = ".".join(parts[:end])
            if head in self.endings or any(ending in self.paths for ending in dotted_endings(head)):
                return None
        return self.pattern.search(key)


def dotted_endings(path: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def conversions(model: Any) -> tuple[Callable[[str], str], Sequence[tuple[str, tuple[str, ...]]]]:
    """How this class renames modules of a checkpoint, and which per-expert matrices make up its 3-D parameters."""
    if not LOADS_BY_CONVERSION:
        patterns = dict(getattr(model, "_checkpoint_conversion_mapping", None) or {})
        return lambda name: functools.reduce(lambda n, p: re.sub(p[0], p[1], n), patterns.items(), name), PARTS
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if not hasattr(entry, "operations")]

    def rename(name: str) -> str:
        key = f"{name}.weight"
        for renaming in renamings:
            key, _ = renaming.rename_source_key(key)
        return key.removesuffix(".weight")

    merges = [entry for entry in mapping if any(type(op).__name__ == "MergeModulelist" for op in entry_ops(entry))]
    parts = [
        (entry.target_patterns[0].rpartition(".")[2], tuple(s.split(".")[-2] for s in entry.source_patterns))
        for entry in merges
        if all(source.endswith(".weight") and source.count(".") >= 2 for source in entry.source_patterns)
    ]
    return rename, [*parts, *PARTS]


def entry_ops(entry: Any) -> list[Any]:
    """The operations of a weight conversion; none for a renaming."""
    return list(getattr(entry, "operations", ()))


def check_files(files: Iterable[str], model: nn.Module, rename: Callable[[str], str] = str) -> None:
    """Compare the headers of safetensors files with the compressed layers, and look for the plain tensors of the base
    model; CheckpointError naming what differs. A head that is not stored is the caller's to train, as ever."""
    found: dict[str, tuple[list[int], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(key)
                found[key] = (list(view.get_shape()), view.get_dtype())
    layers = coded_modules(model)
    # save_original_format=False writes the model's own names instead of the checkpoint's
    names = {f"{layer.name}.{key}": f"{path}.{key}" for path, layer in layers for key in layer.state_dict()}
    lost = [name for name, own in names.items() if name not in found and own not in found]
    if lost:
        raise missing_tensors(lost)
    for _, layer in layers:
        for key, (shape, dtype) in layer.layout.items():
            name = f"{layer.name}.{key}"
            there = found.get(name) or found[names[name]]
            if there != (list(shape), SAFETENSORS_DTYPES.get(dtype)):
                raise CheckpointError(
                    f"tensor {name!r} is {there[1]} {there[0]}, expected {dtype} {list(shape)}: "
                    "the file does not match its quantization_config, compress the model again"
                )

    lost = lacking(model, found, rename)
    if lost:
        raise missing_tensors(lost)


def of_base(model: Any, name: str) -> bool:
    """Whether a tensor belongs to the base model, which every class of a checkpoint needs, and is not made up."""
    base = f"{model.base_model_prefix}."
    inside = name.startswith(base) or not any(path == base[:-1] for path, _ in model.named_children())
    made_up = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), BESIDE.pattern]
    return inside and not any(re.search(pattern, name) for pattern in made_up)


def lacking(model: Any, found: Iterable[str], rename: Callable[[str], str]) -> list[str]:
    """5.x: plain parameters of the base model that no stored tensor can be. Those that are fused from several while
    loading (experts) are left to the loader, which needs all of them."""
    base = f"{model.base_model_prefix}."
    there: set[str] = set()
    for name in found:
        module, _, leaf = name.rpartition(".")
        for path in (name, f"{rename(module)}.{leaf}"):
            there |= {path, base + path, path.removeprefix(base)}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    there |= {source for target, source in tied.items() if target in there}
    there |= {target for target, source in tied.items() if source in there}
    coded = {path for path, _ in coded_modules(model)}
    plain = (name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in coded)
    return [name for name in plain if name not in there and not fused_later(model, name) and of_base(model, name)]


def fused_later(model: Any, name: str) -> bool:
    """Whether a parameter is made of several stored tensors, or cut out of one."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    entries = [entry for entry in get_model_conversion_mapping(model) if hasattr(entry, "operations")]
    targets = [re.sub(r"[^\w.]", "", target) for entry in entries for target in entry.target_patterns]
    return any(target and target in name for target in targets)


def weight_files(model: Any, named: Iterable[str] | None) -> list[str]:
    """The safetensors files a model is loaded from: those named, or (4.x) those in the folder of its config."""
    if named:
        return [str(file) for file in named if str(file).endswith(".safetensors")]
    folder = str(getattr(model.config, "_name_or_path", "") or "")
    if LOADS_BY_CONVERSION or not folder or not Path(folder).is_dir():  # 5.x: from a state dict
        return []
    return [str(path) for path in sorted(Path(folder).glob("*.safetensors"))]


def coded_modules(model: nn.Module) -> list[tuple[str, CodedModule]]:
    """Compressed modules with tensors of their own, by path; an output layer that is tied to a code has none."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, CodedModule) and m.layout]


def stored_names(model: nn.Module) -> list[str]:
    """Names of all tensors that belong to compressed layers."""
    return [f"{path}.{key}" for path, module in coded_modules(model) for key in module.state_dict()]


def missing_tensors(names: list[str]) -> CheckpointError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return CheckpointError(
        f"the weight files lack {', '.join(map(repr, names[:3]))}{more}: "
        "the folder is incomplete, download or compress the model again"
    )


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors under the names that `save_pretrained` gives them."""
    tensors: dict[str, Tensor] = model.state_dict()
    for pattern in model._keys_to_ignore_on_save or ():
        tensors.pop(pattern, None)
    if LOADS_BY_CONVERSION:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        tensors = remove_tied_weights_from_state_dict(tensors, model)
        tensors = revert_weight_conversion(model, tensors)
        return tensors
    from transformers.modeling_utils import _get_tied_weight_keys

    tied = [re.compile(pattern) for pattern in _get_tied_weight_keys(model)]
    sharing: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.data_ptr(), []).append(name)
    for names in sharing.values():
        for name in [n for n in sorted(names) if any(p.search(n) for p in tied)][: len(names) - 1]:
            del tensors[name]
    return tensors


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes, row-major."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


register()


def mark_compressed(model: Any, specs: dict[str, dict[str, Any]], recipe: dict[str, Any]) -> None:
    """Let a model whose layers were compressed in memory know it, so that `save_pretrained` writes a folder that loads.

    specs : module name -> code spec with `shape`
    """
    known = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    before = known.specs if isinstance(known, FeatherConfig) else {}
    named = {saved: specs[name] for name, saved in saved_modules(model, specs).items()}
    config = FeatherConfig(**quantization_config({**before, **named}, recipe))
    model.config.quantization_config = config
    model.hf_quantizer = FeatherQuantizer(config)
    model.quantization_method = config.quant_method


def saved_modules(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of modules -> those under which `save_pretrained` writes them: 5.x keeps the names of old checkpoints."""
    saved = {name: name for name in names}
    held = {name: module for name, module in coded_modules(model) if name in saved}
    if not LOADS_BY_CONVERSION or not held:
        return saved
    from transformers.core_model_loading import revert_weight_conversion

    keys = {name: next(iter(module.layout)) for name, module in held.items()}
    markers = {f"{name}.{key}": torch.empty(0, device="meta") for name, key in keys.items()}
    owners = {id(marker): name for marker, name in zip(markers.values(), keys, strict=True)}  # renamed, but not copied
    for key, marker in revert_weight_conversion(model, markers).items():
        if id(marker) in owners:
            name = owners[id(marker)]
            saved[name] = key.removesuffix(f".{keys[name]}")
    return saved
