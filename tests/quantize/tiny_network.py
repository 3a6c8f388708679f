"""A tiny network in memory, seen as choices of block and model scope see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.storage.checkpoint.anatomy import Anatomy, LinearLayer, read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from models import make_tiny


def tiny_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of transformers and its anatomy."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_tiny(family, folder, torch.float32, **overrides)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval().requires_grad_(False)
    with Checkpoint.open(folder) as checkpoint:
        return model, read_anatomy(checkpoint)


def tiny_session(folder: Path, windows: int = 8, held_out: int = 4, length: int = 24, **overrides: Any) -> ModelSession:
    model, anatomy = tiny_model(folder, **overrides)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (windows + held_out, length), generator=generator)
    return ModelSession(model, anatomy, list(ids[:windows]), list(ids[windows:]))


class TinyBlock:
    """`BlockAccess` over the first block of a model."""

    index = 0

    def __init__(self, model: Any, anatomy: Any, batches: int = 6, tokens: int = 16, spread: float = 1.0) -> None:
        self.model, self.module = model, model.model.layers[0]
        self.layers: dict[str, LinearLayer] = {x.name: x for x in anatomy.layers if x.block == 0}
        self.names = list(self.layers)
        by_input: dict[str, list[str]] = {}
        for layer in self.layers.values():
            by_input.setdefault(layer.input_group, []).append(layer.name)
        self.groups = list(by_input.values())
        self.changed: dict[str, Tensor] = {}
        self.parameters = dict(model.named_parameters())
        self.originals = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        dtype = next(iter(self.parameters.values())).dtype
        generator = torch.Generator().manual_seed(0)
        width = model.config.hidden_size
        factors = torch.exp(spread * torch.randn(width, generator=generator)).to(dtype)
        self.inputs = [torch.randn(2, tokens, width, generator=generator).to(dtype) * factors for _ in range(batches)]
        with torch.no_grad():
            self.targets = [self.run(hidden, i) for i, hidden in enumerate(self.inputs)]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def weight(self, name: str) -> Tensor:
        return self.parameters[self.layers[name].tensor].detach().clone()

    def set_weight(self, name: str, weight: Tensor) -> None:
        self.parameters[self.layers[name].tensor].data.copy_(weight)

    def tensor(self, tensor_name: str) -> Tensor:
        return self.parameters[tensor_name].detach().clone()

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        self.parameters[tensor_name].data.copy_(value)
        self.changed[tensor_name] = value

    def add_bias(self, name: str, bias: Tensor) -> None:
        linear = self.model.get_submodule(name)
        before = torch.zeros_like(bias) if linear.bias is None else linear.bias.detach()
        linear.bias = nn.Parameter((before + bias).to(linear.weight.dtype), requires_grad=False)
        self.changed[f"{name}.bias"] = linear.bias.detach().clone()

    @property
    def output_layer(self) -> str | None:
        return "lm_head" if len(self.model.model.layers) == 1 else None

    def output_weight(self) -> Tensor:
        weight: Tensor = self.model.lm_head.weight.detach().clone()
        return weight

    def output_inputs(self, hidden: Tensor, batch_index: int) -> Tensor:
        states: Tensor = self.model.model.norm(hidden)
        return states

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        now = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.originals[name])
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(now[name])

    def run(self, hidden: Tensor, batch_index: int) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary = self.model.model.rotary_emb(hidden, positions)
        output = self.module(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
        return output if isinstance(output, Tensor) else output[0]

    @contextlib.contextmanager
    def overridden(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        paths = {self.layers[n].tensor if n in self.layers else n: w for n, w in weights.items()}
        with contextlib.ExitStack() as stack:
            for path, value in paths.items():
                module, _, leaf = path.rpartition(".")
                owner = self.model.get_submodule(module)
                stack.callback(owner._parameters.__setitem__, leaf, owner._parameters[leaf])
                owner._parameters[leaf] = value.to(owner._parameters[leaf].dtype)
            yield

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """gram, mean, mean_abs and inputs of every layer."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.names}
        handles = []
        for name in self.names:
            module: nn.Module = self.model.get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(lambda m, args, n=name: seen[n].append(args[0].flatten(0, 1)))
            )
        with torch.no_grad():
            for i, hidden in enumerate(self.inputs):
                self.run(hidden, i)
        for handle in handles:
            handle.remove()
        return {name: gathered(torch.cat(rows).float()) for name, rows in seen.items()}


def gathered(inputs: Tensor) -> dict[str, Tensor]:
    """Statistics of inputs [tokens, in]."""
    count = len(inputs)
    return {
        "gram": inputs.T @ inputs / count,
        "mean": inputs.mean(0),
        "mean_abs": inputs.abs().mean(0),
        "inputs": inputs[:: max(1, count // 512)][:512],
        "tokens": torch.tensor([count]),
    }


class ModelSession:
    """`ModelAccess` over a module of transformers (a causal LM) whose parameters carry the checkpoint's names.

    Parameters
    ----------
    module : in evaluation mode; parameters are not trained and are changed by `set_weight` and `set_tensor` only
    anatomy : of the checkpoint the module was loaded from
    windows, held_out : token ids int64 [tokens], of equal length
    """

    def __init__(
        self, module: nn.Module, anatomy: Anatomy, windows: Sequence[Tensor], held_out: Sequence[Tensor]
    ) -> None:
        self.module = self.model = module.eval().requires_grad_(False)
        self.anatomy = anatomy
        self.windows, self.held_out = list(windows), list(held_out)
        self.changed: dict[str, Tensor] = {}
        self.config_changes: dict[str, Any] = {}
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        known = [*anatomy.layers, *([anatomy.head] if anatomy.head else [])]
        self.layers = {layer.name: layer for layer in known if layer.tensor in self._parameters}
        if not self.layers:
            raise ValueError("no linear layer of the checkpoint is a parameter of the loaded model under its own name")
        self._overrides: dict[str, Tensor] = {}
        self._sliceable: bool | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _layer(self, name: str) -> LinearLayer:
        layer = self.layers[name]
        if layer.fused_slice:
            raise ValueError(f"layer {name} is a slice of stacked experts, which cannot be tuned in the whole model")
        return layer

    def weight(self, name: str) -> Tensor:
        layer = self._layer(name)
        stored = self._parameters[layer.tensor].detach()
        return (stored.T if layer.transposed else stored).clone()

    def set_weight(self, name: str, weight: Tensor) -> None:
        layer = self._layer(name)
        self.set_tensor(layer.tensor, weight.T if layer.transposed else weight)

    def tensor(self, tensor_name: str) -> Tensor:
        return self._parameters[tensor_name].detach().clone()

    def set_tensor(self, tensor_name: str, value: Tensor) -> None:
        for head, embedding in self.anatomy.tied:
            if tensor_name == f"{head}.weight" and self._parameters[tensor_name] is self._parameters[embedding]:
                self.module.get_submodule(head).weight = nn.Parameter(value.clone(), requires_grad=False)
                self._parameters[tensor_name] = self.module.get_submodule(head).weight
        self._parameters[tensor_name].data.copy_(value)
        self.changed[tensor_name] = value.detach().clone()

    @contextmanager
    def overridden(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        before = self._overrides
        replaced = {self._layer(n).tensor: w.T if self._layer(n).transposed else w for n, w in weights.items()}
        self._overrides = {**before, **replaced, **(tensors or {})}
        try:
            yield
        finally:
            self._overrides = before

    @contextmanager
    def original(self) -> Iterator[None]:
        before, self._overrides = self._overrides, {}
        try:
            yield
        finally:
            self._overrides = before

    def hidden(self, ids: Tensor) -> Tensor:
        if self._sliceable is None:
            self._sliceable = self._head_is_last(ids[:1, :4])
        if not self._sliceable:
            return self._logits(ids)
        prefix = getattr(self.module, "base_model_prefix", "")
        inner = {n.removeprefix(f"{prefix}."): t for n, t in self._overrides.items() if n.startswith(f"{prefix}.")}
        base = getattr(self.module, prefix)
        states: Tensor = torch.func.functional_call(base, inner, (ids,), {"use_cache": False}).last_hidden_state
        return states

    def head(self, hidden: Tensor) -> Tensor:
        if not self._sliceable:
            return hidden.float()
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        name = next((n for n, module in self.module.named_modules() if module is head), "")
        inner = {n.removeprefix(f"{name}."): t for n, t in self._overrides.items() if n.startswith(f"{name}.")}
        logits: Tensor = torch.func.functional_call(head, inner, (hidden,))
        return logits

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.module, self._overrides, (ids,), {"use_cache": False}).logits
        return logits.float()

    def _head_is_last(self, ids: Tensor) -> bool:
        """Whether logits are the output layer of the base model's last hidden state and nothing else."""
        prefix = getattr(self.module, "base_model_prefix", "")
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        base = getattr(self.module, prefix, None) if prefix else None
        if head is None or base is None:
            return False
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            states = getattr(base(ids, use_cache=False), "last_hidden_state", None)
            whole = self.module(ids, use_cache=False).logits
            return states is not None and torch.allclose(head(states), whole, rtol=1e-4, atol=1e-5)
