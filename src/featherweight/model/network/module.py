"""Any module in memory as a network for calibration: its blocks and its linear layers, found by running it once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from featherweight.errors import CalibrationError
from featherweight.model.layers.modules import CodedModule
from featherweight.model.layers.replace import multiplies
from featherweight.model.network.observe import no_fast_path
from featherweight.model.network.placement import Slot
from featherweight.model.network.streams import hidden_of, same_values
from featherweight.model.network.unfold import Convolution
from featherweight.storage.checkpoint.anatomy import LinearLayer


class ModuleHost:
    """A `Host` over a module that stays in memory.

    whole : the module is one block, as no list of blocks was found through which hidden states go one after the other
    convolutions : these are layers too, seen as matrices [out, in / groups * product of kernel]

    Attributes
    ----------
    unmeasured : layers of whose inputs there are no statistics -> a sentence that says why
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        batch: Any,
        blocks: str | None = None,
        convolutions: bool = False,
    ) -> None:
        first = next(iter(module.parameters()), None)
        if first is None:
            raise CalibrationError(f"{type(module).__name__} has no parameters to calibrate")
        self.dtype, self.device = first.dtype, first.device
        folded = {name for name, m in module.named_modules() if is_convolution(m)}
        linears = {n: m for n, m in module.named_modules() if is_linear(m) or (convolutions and n in folded)}
        if not linears:
            hint = "; its convolutions are layers if convolutions=True is given" if folded else ""
            raise CalibrationError(f"{type(module).__name__} has no linear layers to calibrate{hint}")
        self._training = [m for m in module.modules() if m.training]
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self.model = module.eval().requires_grad_(False)
        try:
            self.paths, inputs = self._choose_blocks(forward, batch, blocks, linears)
        except BaseException:
            self.close()
            raise
        self.whole = self.paths == [""]
        self.blocks = [module.get_submodule(path) for path in self.paths]
        self.layers: dict[str, LinearLayer] = {}
        self.slots: dict[str, Slot] = {}
        for number, path in enumerate(self.paths):
            inside = [name for name in linears if not path or name.startswith(path + ".")]
            inside.sort(key=lambda name: inputs.get(name, (len(linears), 0))[0])
            for name in inside:
                found = linears[name]
                group = f"{path}:{inputs[name][1]}" if name in inputs else f"{path}:{name}"
                if is_convolution(found):
                    found.weight.data = found.weight.data.contiguous()  # channels may lie last: no matrix can be seen
                    group += _unfolding(found)
                layer = replace(describe(name, found), block=number, input_group=group)
                self.layers[name] = layer
                self.slots[name] = Slot(f"{name}.weight", transposed=layer.transposed, matrix=bool(layer.kernel))
        self.unmeasured = {
            name: f"{name} is a convolution in {layer.groups} groups with inputs of their own, of which no statistics "
            "are gathered: give it a code without data"
            for name, layer in self.layers.items()
            if layer.groups > 1
        }
        self._parameters = dict(module.named_parameters(remove_duplicate=False))
        self.replaced: dict[str, Tensor] = {}

    def close(self) -> None:
        """The caller's module trains again where it did; what was changed in its weights stays."""
        for module in self._training:
            module.training = True
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def tensor_slot(self, name: str) -> Slot:
        if name not in self._parameters:
            raise CalibrationError(f"{type(self.model).__name__} has no parameter {name!r}")
        return Slot(name)

    def untie(self, name: str) -> None:
        pass

    def as_stored(self, tensor_name: str, value: Tensor) -> Tensor:
        return value.detach()

    def revert(self, replaced: Mapping[str, Tensor]) -> None:
        raise CalibrationError(
            f"{type(self.model).__name__} is in memory only: what was changed in it cannot be undone"
        )

    def owners(self, path: str) -> list[tuple[nn.Module, str]]:
        shared = self._parameters[path]
        names = [name for name, parameter in self._parameters.items() if parameter is shared]
        places = [name.rpartition(".") for name in names]
        return [(self.model.get_submodule(module), leaf) for module, _, leaf in places]

    def load_block(self, number: int) -> nn.Module:
        return self.blocks[number]

    def drop_block(self, number: int) -> None:
        pass

    def _choose_blocks(
        self, forward: Callable[[nn.Module, Any], Any], batch: Any, wanted: str | None, linears: dict[str, nn.Module]
    ) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Paths of the blocks, and for every linear layer its place in the order of execution and its input."""
        path = _longest_list(self.model, linears) if wanted is None else wanted
        paths: list[str] = []
        if path:
            try:
                container = self.model.get_submodule(path)
            except AttributeError:
                raise CalibrationError(f"{type(self.model).__name__} has no module {path!r}") from None
            paths = [f"{path}.{name}" for name, _ in container.named_children()]
        trace = _Trace(self.model, paths, linears)
        trace.run(lambda: forward(self.model, batch))
        if paths and trace.broken:
            if wanted:
                raise CalibrationError(f"{path!r} cannot be calibrated block by block: {trace.broken}")
            paths = []
        return paths or [""], trace.inputs


def is_linear(module: nn.Module) -> bool:
    """A linear layer with a weight of its own, also GPT-2's `Conv1D`, which stores the transpose; no compressed one."""
    return multiplies(module) and not isinstance(module, CodedModule)


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """A convolution with a weight of its own: none that is compressed, nor transposed."""
    return isinstance(module, Convolution) and not isinstance(module, CodedModule)


def _unfolding(module: Convolution) -> str:
    """On what the unfolded inputs of a convolution depend besides what it reads."""
    parts = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
    return "".join(f":{part}" for part in parts)


def describe(name: str, module: nn.Module) -> LinearLayer:
    """A layer of which nothing is known but what the module itself says; no block, no shared input."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    transposed = type(module).__name__ == "Conv1D"
    rows, columns = weight.shape[::-1] if transposed else (len(weight), weight[0].numel())
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        shape=(rows, columns),
        transposed=transposed,
        expert=None,
        fused_slice=False,
        block=None,
        role=name.rpartition(".")[2],
        kind="other",
        input_group="",
        norm=None,
        bias=f"{name}.bias" if module.bias is not None else None,
        fused=(),
        kernel=tuple(weight.shape[2:]),
        groups=int(getattr(module, "groups", 1)),
    )


def _longest_list(module: nn.Module, linears: dict[str, nn.Module]) -> str:
    """Path of the longest list of modules of one class that have linear layers; of equal ones the outermost, first."""
    best, length = "", 1
    for path, found in module.named_modules():
        if not isinstance(found, nn.ModuleList | nn.Sequential) or not path:
            continue
        children = list(found)
        alike = len({type(child) for child in children}) == 1
        filled = all(any(name.startswith(f"{path}.{i}.") for name in linears) for i in range(len(children)))
        if alike and filled and len(children) > length:
            best, length = path, len(children)
    return best


class _Trace:
    """One run of a module: which linear layers read the same tensor, and whether blocks follow each other."""

    def __init__(self, module: nn.Module, blocks: list[str], linears: dict[str, nn.Module]) -> None:
        self.module, self.block_paths, self.linears = module, blocks, linears
        self.inputs: dict[str, tuple[int, int]] = {}
        self.broken = ""
        self._tensors: list[Tensor] = []
        self._called: list[int] = []
        self._hidden: Tensor | None = None

    def run(self, call: Callable[[], Any]) -> None:
        with contextlib.ExitStack() as stack, torch.no_grad(), no_fast_path():
            for name, linear in self.linears.items():
                stack.callback(linear.register_forward_pre_hook(self._linear_hook(name)).remove)
            for number, path in enumerate(self.block_paths):
                hook = self.module.get_submodule(path).register_forward_hook(self._block_hook(number), with_kwargs=True)
                stack.callback(hook.remove)
            call()
        self._tensors = []
        if self.block_paths and not self.broken and self._called != list(range(len(self.block_paths))):
            self.broken = "the blocks are not called once each, in order"

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor) or name in self.inputs:
                return
            # tensors are kept alive until the end, so that one address is one tensor
            number = next((i for i, other in enumerate(self._tensors) if _same(other, args[0])), len(self._tensors))
            if number == len(self._tensors):
                self._tensors.append(args[0])
            self.inputs[name] = len(self.inputs), number

        return hook

    def _block_hook(self, number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._called.append(number)
            hidden = args[0] if args else kwargs.get("hidden_states")
            try:
                out = hidden_of(output)
            except CalibrationError as error:
                self.broken = str(error)
                return
            if not isinstance(hidden, Tensor) or hidden.shape != out.shape:
                self.broken = "a block's output has another shape than its input"
            elif self._hidden is not None and not same_values(self._hidden, hidden):
                self.broken = "a block's input is not the output of the block before"
            self._hidden = out

        return hook


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )
