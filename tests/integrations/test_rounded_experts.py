"""FlexQ's rounding of inputs (arXiv 2508.04405) reaches experts that the model class keeps in 3-D parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import featherweight.integrations.transformers  # noqa: F401  # teaches transformers the format
from featherweight.errors import CheckpointError
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.model.layers.activations import quantized_inputs
from featherweight.model.layers.experts import ExpertStack, RoundingMatrix, expert_name, install_experts
from featherweight.model.layers.modules import FeatherLinear
from featherweight.storage.codes.quantized_input import QuantizedInput
from featherweight.tasks.compress.compression import compress
from models import FAMILIES, make_tiny

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96},
    "qwen3-moe": {"moe_intermediate_size": 96},
    "gpt-oss": {"intermediate_size": 96},
    "llama4": {"intermediate_size": 96},
}


@pytest.mark.parametrize("family", SHAPES)
def test_products_of_experts_have_rounded_inputs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the class itself with decoded parameters, each product of which rounds its first factor."""
    if not hasattr(transformers, FAMILIES[family][0]):
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    make_tiny(family, tmp_path / "source", torch.float32, tokenizer=True, **SHAPES[family])
    compress(tmp_path / "source", "flexq", tmp_path / "out", threads=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.float32).eval()
    experts = next((m for m in model.modules() if isinstance(getattr(m, "down_proj", None), ExpertStack)), None)
    if experts is None:  # transformers 4: every expert has layers of its own, which round as others do
        layers = [m for name, m in model.named_modules() if ".experts." in name and isinstance(m, FeatherLinear)]
        assert {layer.input_rounding for layer in layers} == {(6, 128), (8, 128)}
        return
    stacks = {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    assert [stack.rounding[:2] for stack in stacks.values()] == [(6, 128), (8, 128)]
    arguments: list[Any] = []
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: arguments.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.arange(40).view(2, 20))
    handle.remove()
    args, kwargs = arguments[0]
    with torch.no_grad():
        found = experts(*args, **kwargs)
        plain = {name: stack.stacked() for name, stack in stacks.items()}
        for name, matrices in plain.items():
            delattr(experts, name)
            setattr(experts, name, matrices)
        unrounded = experts(*args, **kwargs)
        sizes = {tuple(plain[name].shape[-2:]): stack.rounding[:2] for name, stack in stacks.items()}
        with Rounding(sizes):
            expected = experts(*args, **kwargs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert float((found - unrounded).norm() / unrounded.norm()) > 1e-3


class Rounding(torch.overrides.TorchFunctionMode):
    """Within, products with a matrix of one of these shapes round their first factor."""

    def __init__(self, sizes: dict[tuple[int, ...], tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("linear", "matmul", "__matmul__", "bmm") and len(args) > 1:
            settings = self.sizes.get(tuple(args[1].shape[-2:]))
            if settings is not None:
                args = (quantized_inputs(args[0], *settings), *args[1:])
        return func(*args, **(kwargs or {}))


def rounding_stack(bits: tuple[int, int] = (6, 6)) -> torch.nn.Module:
    """An experts module of two experts [8, 32] whose codes round their inputs."""
    experts = torch.nn.Module()
    experts.register_parameter("down_proj", torch.nn.Parameter(torch.zeros(2, 8, 32)))
    codes = [QuantizedInput(UniformGrid(bits=4, group_size=16).quantize(torch.randn(8, 32)), b, 16) for b in bits]
    names = [f"e.down_proj[{i}]" for i in range(2)]
    entries = [(n, expert_name(n, {"e": experts}.get), c.spec) for n, c in zip(names, codes, strict=True)]
    install_experts(experts, entries)  # type: ignore[arg-type]
    for i, code in enumerate(codes):
        layer = experts._modules[f"down_proj[{i}]"]
        for name, tensor in code.tensors().items():
            layer._parameters[name].data = tensor  # type: ignore[union-attr]
    return experts


def test_one_expert_several_and_all() -> None:
    torch.manual_seed(0)
    stack: Any = rounding_stack().down_proj
    inputs = torch.randn(5, 32)
    rounded = quantized_inputs(inputs, 6, 16)
    weights: Tensor = stack.stacked()
    one = stack[1]
    assert isinstance(one, RoundingMatrix)
    assert one.shape == (8, 32)
    assert torch.equal(torch.nn.functional.linear(inputs, one), rounded @ weights[1].T)
    both = inputs.expand(2, 5, 32)
    turned = ExpertStack(stack.matrices, (2, 32, 8), True, stack.rounding)
    expected = quantized_inputs(both, 6, 16) @ weights.mT
    assert torch.allclose(torch.bmm(both, turned), expected)
    assert torch.allclose(both @ turned[torch.tensor([0, 1])], expected)
    half = torch.nn.functional.linear(inputs.bfloat16(), one)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "use",
    [
        torch.sum,
        lambda w: torch.stack([w]),
        lambda w: torch.einsum("ij,kj->ik", torch.randn(3, 32), w),
        lambda w: w + 1,
    ],
)
def test_other_uses_are_refused_by_name(use: Any) -> None:
    stack: Any = rounding_stack().down_proj
    for operand in (stack, stack[0]):
        with pytest.raises((CheckpointError, TypeError), match=r"e\.down_proj\[0\]|unsupported operand"):
            use(operand)


def test_experts_that_round_differently_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"e\.down_proj\[0\]' and 'e\.down_proj\[1\]'"):
        rounding_stack((6, 8))
