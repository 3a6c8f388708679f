"""Sees what goes into linear layers while a network runs, without changing it.

A layer that is a module gets a forward pre-hook. Experts stacked in one 3-D parameter are no modules: a
TorchFunctionMode notices products with a slice of the parameter, recognised by its place in the parameter's memory.

Which tokens an expert saw is found by comparing its input rows with those of the mixture's input, bit by bit. So it
does not matter how an implementation gathers them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.model.network.placement import Slot
from featherweight.model.network.unfold import Convolution, unfolded
from featherweight.system.transformers_calls import Leaving

# name of a product -> positions of the input and of the matrix among its arguments
PRODUCTS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}
EXPERT_MODULE = re.compile(r"(?P<parent>.+)\.[^.]+\.\d+(\..+)?\.\w+")


@dataclass(frozen=True)
class Seen:
    """What one product saw: `rows` [n, in] and the number of each row's token in the batch, None if unknown."""

    rows: Tensor
    tokens: Tensor | None


@dataclass(frozen=True)
class Probe:
    """Where the input of a layer can be seen."""

    slot: Slot
    expert: int | None = None

    @property
    def module(self) -> str:
        return self.slot.parameter.rpartition(".")[0]

    @property
    def mixture(self) -> str:
        """The module whose input are all tokens that experts share."""
        if self.slot.expert is not None:
            return self.module.rpartition(".")[0]
        match = EXPERT_MODULE.fullmatch(self.slot.parameter)
        return match["parent"] if match else ""


class EnoughSeen(Leaving):
    """All wanted layers have been seen: the rest of the forward pass is not needed."""


class InputRecorder:
    """Inputs of `probes` during forward passes; `helpers` are watched only to learn which tokens experts see."""

    def __init__(
        self, model: nn.Module, probes: Mapping[str, Probe], helpers: Sequence[Probe] = (), stop: bool = True
    ) -> None:
        self.model, self.probes = model, dict(probes)
        self.all = [(name, probe) for name, probe in probes.items()] + [("", probe) for probe in helpers]
        self.stop = stop and not any(probe.expert is not None for probe in probes.values())
        self.seen: dict[str, list[Seen]] = {}
        self._mixtures: dict[str, _MixtureTokens] = {}

    def run(self, call: Callable[[], Any]) -> dict[str, list[Seen]]:
        """Call and give what was seen, by probe, in order of execution."""
        self.seen, self._mixtures = {}, {}
        with self._watching(), contextlib.suppress(EnoughSeen):
            call()
        return self.seen

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(no_fast_path())
            for path in dict.fromkeys(p.mixture for _, p in self.all if p.expert is not None and p.mixture):
                hook = self.model.get_submodule(path).register_forward_pre_hook(self._mixture_hook(path))
                stack.callback(hook.remove)
            stacks: dict[int, _Stack] = {}
            for name, probe in self.all:
                if probe.slot.expert is not None:
                    parameter = self.model.get_parameter(probe.slot.parameter)
                    entry = stacks.setdefault(parameter.untyped_storage().data_ptr(), _Stack(parameter.data, {}))
                    entry.names.setdefault(probe.slot.expert, []).append((name, probe))
                else:
                    stack.callback(self._watch(self.model.get_submodule(probe.module), name, probe).remove)
            if stacks:
                stack.enter_context(_Products(stacks, self._record))
            yield

    def _mixture_hook(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self._mixtures[path] = _MixtureTokens(args[0].reshape(-1, args[0].shape[-1]))

        return hook

    def _watch(self, module: nn.Module, name: str, probe: Probe) -> Any:
        """Let `_record` know of each call of a layer; the hook that does so."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = input_of(module, args, kwargs)
            if found is not None:
                self._record(name, probe, found)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _seen(self, probe: Probe, inputs: Tensor) -> Seen:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        mixture = None if probe.expert is None else self._mixtures.get(probe.mixture)
        if probe.expert is None or mixture is None:
            return Seen(rows, None)
        return mixture.identify(probe.expert, rows)

    def _record(self, name: str, probe: Probe, inputs: Tensor, output: Tensor | None = None) -> None:
        """A layer was given `inputs` [..., in]. output : what it makes of them, if that is known by now"""
        seen = self._seen(probe, inputs)
        if name:
            self.seen.setdefault(name, []).append(seen)
            if self.stop and len(self.seen) == len(self.probes):
                raise EnoughSeen


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a layer multiplies [..., in]: the first tensor that it is called with, unfolded for a convolution.

    None where there is none, or where groups of a convolution have inputs of their own.
    """
    found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if found is None or not isinstance(module, Convolution):
        return found
    return unfolded(module, found) if module.groups == 1 else None


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Within, torch's transformer layers call their linear layers, instead of one fused kernel that no hook sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _MixtureTokens:
    """All tokens that enter a mixture of experts, to find those that one expert got."""

    def __init__(self, tokens: Tensor) -> None:
        self.count, self.width = tokens.shape
        self.tokens = tokens.detach()
        self._keys: Tensor | None = None
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {}

    def identify(self, expert: int, rows: Tensor) -> Seen:
        """Numbers of the tokens in `rows`; those of the expert's second product are those of its first.

        An expert that is given all tokens, those of others as zeros, has seen the rows that are not zero.
        """
        if len(rows) == 0:
            return Seen(rows, torch.zeros(0, dtype=torch.long, device=rows.device))
        found = self._match(rows) if rows.shape[1] == self.width and expert not in self._known else None
        if found is not None:
            self._known[expert] = found, None
        elif expert not in self._known and len(rows) == self.count:
            self._known[expert] = torch.arange(self.count, device=rows.device), rows.ne(0).any(1)
        numbers, used = self._known.get(expert, (None, None))
        if numbers is None or len(numbers) != len(rows):
            return Seen(rows, None)
        return Seen(rows, numbers) if used is None else Seen(rows[used], numbers[used])

    def _match(self, rows: Tensor) -> Tensor | None:
        if self._keys is None:
            self._keys = row_keys(self.tokens)
        keys = row_keys(rows)
        own, order = torch.sort(self._keys, stable=True)
        wanted, place = torch.sort(keys, stable=True)
        at = torch.searchsorted(own, wanted)
        # the k-th of equal rows is the k-th of equal tokens
        at = at + torch.arange(len(wanted), device=at.device) - torch.searchsorted(wanted, wanted)
        if bool((at >= len(own)).any()) or not torch.equal(own[at.clamp(max=len(own) - 1)], wanted):
            return None
        numbers = torch.empty_like(order[at])
        numbers[place] = order[at]
        return numbers


def row_keys(rows: Tensor) -> Tensor:
    """A 64-bit key of every row's bits; int64 [n]."""
    bits = rows.contiguous().view(torch.int32 if rows.element_size() == 4 else torch.int16).long()
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator, device="cpu") | 1
    return (bits * factors.to(bits.device)).sum(1)


@dataclass
class _Stack:
    parameter: Tensor
    names: dict[int, list[tuple[str, Probe]]]


class _Products(TorchFunctionMode):
    """Reports products with slices of 3-D parameters [experts, rows, columns]."""

    def __init__(self, stacks: dict[int, _Stack], record: Callable[[str, Probe, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.stacks, self.record = stacks, record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = PRODUCTS.get(getattr(func, "__name__", ""))
        if places is not None and len(args) > places[1]:
            inputs, matrix = args[places[0]], args[places[1]]
            if isinstance(inputs, Tensor) and isinstance(matrix, Tensor):
                self._report(inputs, matrix, result)
        return result

    def _report(self, inputs: Tensor, matrix: Tensor, result: Tensor) -> None:
        stack = self.stacks.get(matrix.untyped_storage().data_ptr())
        if stack is None:
            return
        if matrix.dim() == 3 and len(matrix) == len(stack.parameter) and inputs.dim() == 3:
            for expert in range(len(matrix)):
                for name, probe in stack.names.get(expert, ()):
                    self.record(name, probe, inputs[expert], result[expert])
        elif matrix.dim() == 2:
            expert = (matrix.storage_offset() - stack.parameter.storage_offset()) // stack.parameter.stride(0)
            for name, probe in stack.names.get(expert, ()):
                self.record(name, probe, inputs, result)
