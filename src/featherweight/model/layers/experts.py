"""Compressed experts in model classes that keep all experts of a layer in one 3-D parameter.

Such a class (transformers 5.x mixtral, qwen-moe; gpt-oss and llama4 always) indexes `self.gate_up_proj[expert]`. The
parameter is replaced with an `ExpertStack`, which decodes one expert when it is indexed, so the class's own forward
goes on working; where codes ask for rounded inputs (`quantized-input`), what it multiplies a matrix with is rounded.
The codes live in children named as in the checkpoint: `experts.3.gate_proj` where the file has one matrix per expert,
or `experts.gate_up_proj[3]` where it has slices of the 3-D tensor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import CheckpointError
from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.modules import FeatherLinear, PlainMatrix

SLICE = re.compile(r"(?P<experts>.+)\.(?P<parameter>\w+)\[(?P<expert>\d+)\]")
PER_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)")

PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}

# the per-expert matrices whose concatenation along the outputs is a 3-D parameter, if the model class says nothing
PARTS = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
)


class ExpertName(NamedTuple):
    """Where a compressed expert matrix belongs: in the experts module at `path`, number `expert`.

    `leaf` is the matrix's own name where the checkpoint stores one per expert, else None; `parameter` the 3-D parameter
    that is made of it (None until known).
    """

    path: str
    expert: int
    leaf: str | None
    parameter: str | None


def fused_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module: experts [experts, rows, columns]."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}


def expert_name(path: str, find: Callable[[str], nn.Module | None]) -> ExpertName | None:
    """Read a module path as that of an expert matrix; None if the model has no fused experts there."""
    if match := SLICE.fullmatch(path):
        module = find(match["experts"])
        if module is not None and match["parameter"] in fused_parameters(module):
            return ExpertName(match["experts"], int(match["expert"]), None, match["parameter"])
    elif match := PER_EXPERT.fullmatch(path):
        module = find(match["experts"])
        if module is not None and fused_parameters(module):
            return ExpertName(match["experts"], int(match["expert"]), match["leaf"], None)
    return None


class InputRounding(NamedTuple):
    """How the inputs of an expert's matrix are rounded (`quantized-input`); `name` of a layer, for messages."""

    bits: int
    group_size: int
    name: str

    def product(
        self, func: Any, factor: RoundingMatrix | ExpertStack, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """A product func(x, factor, ...) with x rounded, in float32 as in `FeatherLinear`.

        Raises
        ------
        CheckpointError
            the function is another one, whose input cannot be told.
        """
        if func not in PRODUCTS or len(args) < 2 or not isinstance(args[0], Tensor) or args[1] is not factor:
            raise CheckpointError(
                f"the model class reads the expert matrix {self.name!r} otherwise than as second factor of a product, "
                "so its input cannot be rounded as the code asks for: compress the experts without quantize-inputs"
            )
        rounded = quantized_inputs(args[0], self.bits, self.group_size)
        matrix = factor.stacked() if isinstance(factor, ExpertStack) else factor.matrix
        found: Tensor = func(rounded, matrix.float(), *args[2:], **kwargs)
        return found.to(args[0].dtype)


class RoundingMatrix:
    """Stands for an expert's matrix [rows, columns] (or several, 3-D) whose input is rounded before a product."""

    def __init__(self, matrix: Tensor, rounding: InputRounding) -> None:
        self.matrix, self.rounding = matrix, rounding
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = next(_all_in((args, kwargs or {}), RoundingMatrix))
        return own.rounding.product(func, own, args, kwargs or {})


class ExpertStack:
    """Stands for a 3-D parameter [experts, rows, columns] whose slices are decoded when they are used.

    Indexing with an expert's number gives its matrix. Any torch function that receives the stack itself gets all
    experts decoded, which is correct but costs the memory of the uncompressed layer for the time of the call. With
    `rounding`, what it is multiplied with is rounded first, and functions that are no products are refused.
    """

    _is_hf_initialized = True  # transformers must not initialise it

    def __init__(
        self,
        matrices: Sequence[Sequence[nn.Module]],
        shape: Sequence[int],
        transposed: bool,
        rounding: InputRounding | None = None,
    ) -> None:
        self.matrices = matrices
        self.rounding = rounding
        self.shape = torch.Size(shape)
        self.transposed = transposed

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, expert: Any) -> Tensor | RoundingMatrix:
        """Matrix [rows, columns] of one expert, in the compute dtype; a slice or index tensor gives a 3-D tensor."""
        matrix = self.decoded(expert)
        return matrix if self.rounding is None else RoundingMatrix(matrix, self.rounding)

    def decoded(self, expert: Any) -> Tensor:
        """As indexing, always a tensor."""
        if isinstance(expert, slice) or (isinstance(expert, Tensor) and expert.dim() > 0):
            chosen = torch.arange(len(self))[expert.cpu() if isinstance(expert, Tensor) else expert]
            return torch.stack([self.decoded(i) for i in chosen.reshape(-1)]).reshape(*chosen.shape, *self.shape[1:])
        parts = [part() for part in self.matrices[int(expert)]]
        matrix: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return matrix.T.contiguous() if self.transposed else matrix  # as the parameter lies, so that products agree

    def stacked(self) -> Tensor:
        """All experts, [experts, rows, columns]."""
        return torch.stack([self.decoded(expert) for expert in range(len(self))])

    @property
    def dtype(self) -> torch.dtype:
        part = self.matrices[0][0]
        return part.compute_dtype if isinstance(part, FeatherLinear) else part.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(self.matrices[0][0].parameters()).device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for stack in _all_in((args, kwargs or {}), ExpertStack):
            if stack.rounding is not None:
                return stack.rounding.product(func, stack, args, kwargs or {})
        return func(*_materialised(args), **_materialised(kwargs or {}))


def _all_in(value: Any, kind: type[Any]) -> Iterator[Any]:
    """All of a type in nested arguments of a function."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _all_in(part, kind)


def _materialised(value: Any) -> Any:
    if isinstance(value, ExpertStack):
        return value.stacked()
    if isinstance(value, tuple | list):
        return type(value)(_materialised(v) for v in value)
    return {k: _materialised(v) for k, v in value.items()} if isinstance(value, dict) else value


def install_experts(
    experts: nn.Module,
    entries: Iterable[tuple[str, ExpertName, dict[str, Any]]],
    parts: Sequence[tuple[str, tuple[str, ...]]] = PARTS,
) -> None:
    """Replace the 3-D parameters of `experts` that the entries compress.

    Parameters
    ----------
    experts : module with 3-D parameters.
    entries : (name in quantization_config, place, code spec) of every compressed matrix of this module.
    parts : (3-D parameter, per-expert matrices it is the concatenation of); the first that fits is taken.

    Raises
    ------
    CheckpointError
        an expert that does not exist, a wrong shape, a tensor compressed only in part.
    """
    fused = fused_parameters(experts)
    layouts: dict[str, tuple[str, ...] | None] = {}  # per-expert matrices of a parameter, None where it is sliced
    given: dict[str, dict[tuple[int, str], tuple[str, dict[str, Any]]]] = {}
    for name, place, spec in entries:
        if place.leaf is None:
            parameter, leaves = str(place.parameter), None
        else:
            parameter, leaves = _owner(name, place.leaf, fused, parts)
        if place.expert >= len(fused[parameter]):
            raise CheckpointError(
                f"quantization_config compresses {name!r}, but {place.path!r} has {len(fused[parameter])} experts: "
                "config.json and the weights do not belong together"
            )
        layouts[parameter] = leaves
        given.setdefault(parameter, {})[place.expert, place.leaf or parameter] = name, spec
    for parameter, leaves in layouts.items():
        _replace_parameter(experts, parameter, leaves, given[parameter])
    if hasattr(experts, "config"):  # one expert at a time; the batched implementations would decode all of them
        config: Any = copy.copy(experts.config)
        config._experts_implementation = "eager"
        experts.config = config


def _owner(
    name: str, leaf: str, fused: dict[str, nn.Parameter], parts: Sequence[tuple[str, tuple[str, ...]]]
) -> tuple[str, tuple[str, ...]]:
    for parameter, leaves in parts:
        if leaf in leaves and parameter in fused:
            return parameter, leaves
    raise CheckpointError(
        f"quantization_config compresses {name!r}, but the model's experts have only {', '.join(fused)}: "
        "load it with the model class it was made for"
    )


def _replace_parameter(
    experts: nn.Module,
    parameter: str,
    leaves: tuple[str, ...] | None,
    given: dict[tuple[int, str], tuple[str, dict[str, Any]]],
) -> None:
    old = fused_parameters(experts)[parameter]
    shape, transposed = _matrix_shape(experts, old, len(leaves or (parameter,)), given)
    matrices: list[list[nn.Module]] = []
    for index in range(len(old)):
        matrices.append([])
        for leaf in leaves or (parameter,):
            entry = given.get((index, leaf))
            if entry is None and leaves is None:
                raise CheckpointError(
                    f"'{parameter}[{index}]' is missing in quantization_config while other experts of the same "
                    "tensor are compressed: compress all experts of a 3-D tensor or none"
                )
            layer = _layer(entry, shape, old)
            if leaves is None:
                experts.add_module(f"{parameter}[{index}]", layer)
            else:
                if str(index) not in experts._modules:
                    experts.add_module(str(index), nn.Module())
                experts.get_submodule(str(index)).add_module(leaf, layer)
            matrices[index].append(layer)
    del experts._parameters[parameter]
    setattr(experts, parameter, ExpertStack(matrices, old.shape, transposed, _rounding_of(matrices)))


def _rounding_of(matrices: list[list[nn.Module]]) -> InputRounding | None:
    """The rounding of inputs that all matrices of a 3-D parameter ask for, None for none; CheckpointError if they do
    not agree: a product of all of them has one input."""
    found: dict[tuple[int, int] | None, str] = {}
    for layer in (layer for row in matrices for layer in row):
        settings = layer.input_rounding if isinstance(layer, FeatherLinear) else None
        found.setdefault(settings, getattr(layer, "name", "one that is not compressed"))
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise CheckpointError(
            f"the inputs of the experts {one!r} and {other!r} are to be rounded differently, but the model class "
            "multiplies all with one input: give quantize-inputs the same bits for them"
        )
    ((settings, name),) = found.items()
    return None if settings is None else InputRounding(*settings, name)


def _layer(entry: tuple[str, dict[str, Any]] | None, shape: list[int], old: nn.Parameter) -> nn.Module:
    if entry is None:
        return PlainMatrix(shape[1], shape[0], bias=False, device=old.device, dtype=old.dtype)
    name, spec = entry
    if list(spec["shape"]) != shape:
        raise CheckpointError(
            f"{name!r} has shape {list(spec['shape'])} in quantization_config, the model wants {shape}: "
            "config.json and the weights do not belong together"
        )
    return FeatherLinear(spec, name=name, compute_dtype=old.dtype, device=old.device)


def _matrix_shape(
    experts: nn.Module, old: nn.Parameter, parts: int, given: dict[tuple[int, str], tuple[str, dict[str, Any]]]
) -> tuple[list[int], bool]:
    """[out, in] of one expert's matrix, as in its code, and whether the 3-D parameter holds slices [in, out]."""
    _, rows, columns = old.shape
    straight, turned = [rows // parts, columns], [columns // parts, rows]
    found = [list(spec["shape"]) for _, spec in given.values()]
    if straight != turned and straight in found:
        return straight, False
    if straight != turned and turned in found:
        return turned, True
    transposed = getattr(experts, "is_transposed", type(experts).__name__ in ("GptOssExperts", "Llama4TextExperts"))
    return (turned, True) if transposed else (straight, False)
