"""A model of transformers without its blocks' weights: they are loaded from the checkpoint when asked for and dropped.

Everything else (embeddings, norms, the head, rotary frequencies) is in memory for good. Works with transformers 4.51
to 5.x.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError, shown
from featherweight.model.layers.replace import give_biases
from featherweight.model.network.host import parameter_of
from featherweight.model.network.placement import Placement, Slot, conversions
from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer
from featherweight.storage.checkpoint.anatomy.anatomy import architectures
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.weights import FLOATING_DTYPES
from featherweight.system.transformers_calls import asking_transformers

_building = threading.Lock()


class Skeleton:
    """`model` on the meta device but for what is loaded.

    Attributes
    ----------
    model : the PreTrainedModel, in evaluation mode, no parameter requires a gradient
    blocks : its block modules in order
    block_paths : their paths
    layers : the anatomy's layers by name, the head among them; the embedding if it is among `outside`, as the layer
        that the head is where it is tied
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "sdpa",
        outside: Collection[str] = (),
    ) -> None:
        self.checkpoint, self.anatomy, self.dtype, self.device = checkpoint, anatomy, dtype, torch.device(device)
        self.model: Any = build_model(checkpoint, dtype, attention, own_head=anatomy.head is not None)
        give_biases(self.model, sorted(checkpoint.given_biases), conversions(self.model)[0])
        self.placement = Placement(self.model, checkpoint.names, lambda name: checkpoint.entry(name).shape)
        ends = [layer for layer in anatomy.outside if layer is anatomy.head or layer.name in outside]
        every = (*anatomy.layers, *ends)
        self.layers: dict[str, LinearLayer] = {layer.name: layer for layer in every}
        self.slots: dict[str, Slot] = {layer.name: self._slot(layer) for layer in every}
        self.block_paths = [self._block_path(number) for number in range(anatomy.blocks)]
        self.blocks = [self.model.get_submodule(path) for path in self.block_paths]
        self.replaced: dict[str, Tensor] = {}
        self._owners = _owners(self.model)
        self._by_block = self._sort_tensors()
        self._load_rest()

    def _slot(self, layer: LinearLayer) -> Slot:
        """Where a layer's weight is; that of a tied embedding where it multiplies, in the output layer."""
        if layer is self.anatomy.embedding and self.anatomy.tied_head is not None:
            return Slot(f"{self.anatomy.tied_head}.weight")
        return self.placement.layer(layer)

    def _block_path(self, number: int) -> str:
        layer = next((layer for layer in self.anatomy.layers if layer.block == number), None)
        if layer is None:
            raise CalibrationError(f"block {number} of {self.checkpoint.folder} has no linear layer to calibrate")
        parts = self.slots[layer.name].parameter.split(".")
        for end in range(1, len(parts)):
            if isinstance(self.model.get_submodule(".".join(parts[:end])), nn.ModuleList):
                return ".".join(parts[: end + 1])
        raise CalibrationError(
            f"{type(self.model).__name__} keeps its blocks in no list of modules: calibrate it with "
            "Calibration.of_module and a forward function"
        )

    def _sort_tensors(self) -> dict[int | None, list[str]]:
        """Names of the checkpoint's tensors by block, None for the rest."""
        sorted_names: dict[int | None, list[str]] = {None: []}
        for name, slot in self.placement.slots.items():
            block = next((i for i, p in enumerate(self.block_paths) if slot.parameter.startswith(p + ".")), None)
            sorted_names.setdefault(block, []).append(name)
        return sorted_names

    def _load_rest(self) -> None:
        self._load(self._by_block[None])
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and not any(name.startswith(path + ".") for path in self.block_paths):
                # a head or pooler that the checkpoint lacks; nothing the blocks see depends on it
                self._put(name, torch.zeros(parameter.shape, dtype=self.dtype, device=self.device))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def load_block(self, number: int) -> nn.Module:
        """Read the weights of a block; the module is ready to run."""
        self._load(self._by_block.get(number, []))
        block: nn.Module = self.blocks[number]
        missing = [name for name, p in block.named_parameters() if p.is_meta]
        if missing:
            raise CalibrationError(
                f"{self.checkpoint.folder} has no weights for {self.block_paths[number]}.{missing[0]}: "
                "the checkpoint is incomplete or belongs to another model class"
            )
        return block

    def drop_block(self, number: int) -> None:
        """Give the memory of a block's weights back."""
        for path, parameter in list(self.blocks[number].named_parameters()):
            if not parameter.is_meta:
                self._put(f"{self.block_paths[number]}.{path}", torch.empty_like(parameter, device="meta"))

    def close(self) -> None:
        """Nothing: the network is our own."""

    def tensor_slot(self, name: str) -> Slot:
        if name not in self.placement.slots and name.endswith(".bias"):
            self._give_bias(name.removesuffix(".bias"))
        return self.placement.tensor(name)

    def _give_bias(self, layer_name: str) -> None:
        """A bias of zeros for a linear layer that has none, for corrections that shift what it computes."""
        layer, slot = self.layers.get(layer_name), self.slots.get(layer_name)
        if layer_name in dict(self.anatomy.tied):  # the weight is the embedding's, the bias its own
            path, block = f"{layer_name}.bias", None
            rows = self.model.get_submodule(layer_name).out_features
        elif layer is None or slot is None or layer.bias or slot.expert is not None or slot.rows is not None:
            return
        else:
            path, block, rows = slot.parameter.removesuffix("weight") + "bias", layer.block, layer.shape[0]
        module = self.model.get_submodule(path.rpartition(".")[0])
        if getattr(module, "bias", self) is not None:
            return
        zeros = torch.zeros(rows, dtype=self.dtype, device=self.device)
        module.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
        self._owners[path] = [(module, "bias")]
        self.placement.slots[f"{layer_name}.bias"] = Slot(path)
        self.replaced[f"{layer_name}.bias"] = zeros.clone()
        self._by_block[block].append(f"{layer_name}.bias")

    def as_stored(self, tensor_name: str, value: Tensor) -> Tensor:
        names = self.checkpoint.names
        like = tensor_name if tensor_name in names else names[0]
        return value.detach().to(self.checkpoint.plain_dtype(like))

    def revert(self, replaced: Mapping[str, Tensor]) -> None:
        """See `Host`. Blocks that are loaded must be loaded again; what stands outside of them is set here."""
        moved = [name for name, value in self.replaced.items() if value is not replaced.get(name)]
        self.replaced = dict(replaced)
        outside = [name for name in moved if name in self._by_block[None]]
        self._load(outside)
        for head, embedding in self.anatomy.tied:  # a head that was untied is equal to the embedding again
            name = f"{head}.weight"
            if name in moved and name not in self._by_block[None]:
                former = parameter_of(self, self.placement.tensor(embedding).parameter)
                parameter_of(self, name).copy_(replaced.get(name, former))

    def owners(self, path: str) -> list[tuple[nn.Module, str]]:
        return self._owners[path]

    def untie(self, name: str) -> None:
        owners = self._owners.get(name, [])
        if name in self.placement.slots or len(owners) < 2:
            return
        path, _, leaf = name.rpartition(".")
        own = (self.model.get_submodule(path), leaf)
        for other in self._owners.values():
            if other is not owners and own in other:
                other.remove(own)
        owners.remove(own)
        self._owners[name] = [own]
        self.placement.slots[name] = Slot(name)
        self._put(name, self.model.get_parameter(name).detach().clone())

    def _load(self, names: Iterable[str]) -> None:
        for name in names:
            slot = self.placement.slots[name]
            stored = self.replaced[name] if name in self.replaced else self.checkpoint.tensor(name)
            if slot.parameter not in self._owners:
                self._load_buffer(slot.parameter, stored)
                continue
            if stored.dtype not in FLOATING_DTYPES:
                raise CalibrationError(
                    f"tensor {name} is stored as {stored.dtype}, so the model seems to be quantised already; "
                    "start from its original weights"
                )
            current: Tensor = self.model.get_parameter(slot.parameter).data
            if slot.expert is None:
                self._put(slot.parameter, stored.to(self.device, self.dtype, copy=True))
            else:
                if current.is_meta:
                    current = self._put(
                        slot.parameter, torch.zeros(current.shape, dtype=self.dtype, device=self.device)
                    )
                slot.view(current).copy_(stored)
            if name not in self.replaced:
                self.checkpoint.release(name)

    def _load_buffer(self, path: str, stored: Tensor) -> None:
        module, _, leaf = path.rpartition(".")
        old = self.model.get_buffer(path)
        self.model.get_submodule(module)._buffers[leaf] = stored.to(self.device, old.dtype, copy=True)

    def _put(self, path: str, value: Tensor) -> Tensor:
        """Replace a parameter wherever it is used (tied weights are one parameter in several places)."""
        parameter = nn.Parameter(value, requires_grad=False)
        for module, leaf in self._owners[path]:
            module._parameters[leaf] = parameter
        return parameter.data


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, attention: str, own_head: bool = False) -> Any:
    """The class named in config.json, parameters on the meta device, buffers computed.

    own_head : the output layer is not the embedding, whatever config.json says
    """
    import transformers

    if checkpoint.quantization_config:
        raise CalibrationError(
            f"{checkpoint.folder} is compressed already (config.json has a quantization_config, of the method "
            f"{shown(checkpoint.quantization_config.get('quant_method'))}): calibrate the original"
        )
    hint = f"correct config.json, or install a version that knows this model ({transformers.__version__} is installed)"
    with asking_transformers(f"read the configuration in {checkpoint.folder}", hint, CalibrationError):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # what is loaded is decoded
    if getattr(config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"{checkpoint.folder} is an encoder-decoder, whose blocks do not follow each other: "
            "use a data-free recipe, or Calibration.of_module with a forward function"
        )
    model_class = _model_class(transformers, checkpoint, config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if own_head and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    building = asking_transformers(f"build the network of {checkpoint.folder}", error=CalibrationError)
    with _building, _parameters_on_meta(), building:
        model = _from_config(model_class, config, dtype, attention)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # one expert at a time, whose inputs hooks can see
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _from_config(model_class: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """With eager attention where the class has no other."""
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)  # transformers 4 has the older name
    try:
        return model_class._from_config(config, attn_implementation=attention)
    except (ValueError, ImportError):
        if attention == "eager":
            raise
    return model_class._from_config(config, attn_implementation="eager")


def _model_class(transformers: Any, checkpoint: Checkpoint, config: Any) -> Any:
    for name in architectures(checkpoint.config):
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    if checkpoint.trust_remote_code:
        from featherweight.model.network.accounting import custom_class

        own = custom_class(checkpoint.config, checkpoint.folder)
        if own is not None:
            return own
    for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise CalibrationError(
        f"transformers {transformers.__version__} has no model class for {checkpoint.folder} "
        f"(architectures: {', '.join(architectures(checkpoint.config)) or 'none'}); install a version that knows it, "
        "or use Calibration.of_module with a forward function"
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters become meta tensors as soon as a module has them, and are not initialised; buffers are computed.

    Only those that this thread makes: classes and functions are changed for the whole process meanwhile.
    """
    builder = threading.get_ident()
    register = nn.Module.register_parameter
    initialisers = {
        name: value for name, value in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")
    }

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and threading.get_ident() == builder:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    def skipping(initialise: Any) -> Any:
        @functools.wraps(initialise)
        def skip(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            return tensor if threading.get_ident() == builder else initialise(tensor, *arguments, **named)

        return skip

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    for name, value in initialisers.items():
        if callable(value):
            setattr(nn.init, name, skipping(value))
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, value in initialisers.items():
            setattr(nn.init, name, value)


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Path of every parameter -> all (module, name) that hold the same one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    paths: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
                paths[f"{prefix}.{leaf}" if prefix else leaf] = id(parameter)
    return {path: places[key] for path, key in paths.items()}
