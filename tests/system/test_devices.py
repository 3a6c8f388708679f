"""Devices by name; and that what runs where the network is says of every tensor it makes where it is to be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from featherweight.errors import FeatherError
from featherweight.system.devices import device_named, devices_here

PACKAGE = Path(__file__).parent.parent.parent / "src" / "featherweight"
FILES = sorted(path for room in ("methods", "model/network") for path in (PACKAGE / room).rglob("*.py"))
MAKERS = {
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "tensor", "scalar_tensor"),
    *("rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "hann_window"),
}


def makers(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of torch's functions that make tensors of nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            yield node


def without_device(text: str) -> list[int]:
    """Lines of calls that leave it to torch where a tensor is made."""
    return [n.lineno for n in makers(ast.parse(text)) if not {"device", None} & {k.arg for k in n.keywords}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tensors_are_made_where_they_are_needed(path: Path) -> None:
    lines = without_device(path.read_text("utf-8"))
    assert not lines, f"{path.relative_to(PACKAGE)}, lines {lines}: say device=, that of a tensor at hand or 'cpu'"


def test_the_rule_finds_what_it_is_for() -> None:
    text = "torch.zeros(3)\nb = torch.ones(3, device=a.device)\nf(torch.arange(4, dtype=x))\na.new_zeros(3)\nzeros(3)\n"
    assert without_device(text) == [1, 3]
    assert sum(len(list(makers(ast.parse(path.read_text("utf-8"))))) for path in FILES) > 50


def test_devices_by_name() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named(torch.device("cpu")) == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert device_named("auto") == (accelerator or torch.device("cpu"))


@pytest.mark.parametrize(
    ("cuda", "mps", "taken", "here"),
    [
        (2, True, "cuda", ["cpu", "cuda:0", "cuda:1", "mps"]),
        (1, False, "cuda", ["cpu", "cuda:0"]),
        (0, True, "mps", ["cpu", "mps"]),
        (0, False, "cpu", ["cpu"]),
    ],
)
def test_what_auto_takes(cuda: int, mps: bool, taken: str, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_named("auto") == torch.device(taken)
    assert devices_here() == here
    with pytest.raises(FeatherError, match=f"take {' or '.join(here)}, or auto$"):
        device_named("no-such-device")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "cpu:x", "", "lazy"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(FeatherError, match=r"^the device '.*' cannot be used \(.+\): take cpu.*, or auto$"):
        device_named(name)
