"""Passes over a block that take from earlier passes what these have computed: the same bits, each product once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.methods.calibrate import runner
from featherweight.methods.recipe import load_recipe
from featherweight.model.network.replay import Replay
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.compress.plan import make_plan

SHORT = ("calibration.sequences=8", "calibration.length=32", "calibration.batch_tokens=64")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often products with matrices of each shape were computed."""
    found: Counter[tuple[int, int]] = Counter()
    plain = nn.functional.linear

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found[tuple(weight.shape)] += 1  # type: ignore[index]
        return plain(input, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2", "qwen3-moe", "opt"])
@pytest.mark.parametrize("recipe", ["gptq", "trit-2-blockwise", "awq", "gptaq", "zeroquant-v2"])
def test_the_same_bits(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, recipe: str) -> None:
    if recipe == "awq" and family in ("phi", "qwen3-moe"):
        pytest.skip("awq's search does not know such blocks")
    source = tiny(family, tokenizer=True)
    kept = files(compress(source, recipe, tmp_path / "kept", changes=SHORT, threads=1).out)
    monkeypatch.setattr(runner, "SPARE_SHARE", 1 << 60)
    assert files(compress(source, recipe, tmp_path / "none", changes=SHORT, threads=1).out) == kept


def test_each_product_once(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: Counter[tuple[int, int]]
) -> None:
    source = tiny("llama", tokenizer=True)  # q and o [64, 64], k and v [32, 64], gate and up [128, 64], down [64, 128]
    compress(source, "gptq", tmp_path / "kept", changes=SHORT, threads=1)
    with_replay = Counter(products)
    products.clear()
    monkeypatch.setattr(runner, "SPARE_SHARE", 1 << 60)
    compress(source, "gptq", tmp_path / "none", changes=SHORT, threads=1)
    batches = with_replay[64, 128]  # down_proj runs when the first block is left, and never else
    assert with_replay[128, 64] == 4 * batches  # gate and up of two blocks
    assert with_replay[32, 64] <= 4 * batches + 4  # k and v; the first batch of a block once more, to compare
    assert products[32, 64] >= 2.5 * with_replay[32, 64]


class Attention(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.q, self.o, self.factor = nn.Linear(4, 4), nn.Linear(4, 4), factor

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out = self.o(torch.tanh(self.q(x)))
        return (out * self.factor if self.factor != 1 else out), None


class Block(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.attention, self.last = Attention(factor), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.attention(x)[0])


STAGES = [["b.attention.q.weight"], ["b.attention.o.weight"], ["b.last.weight"]]


@pytest.mark.parametrize(("factor", "calls"), [(1.0, 1), (0.5, 3)])
def test_a_child_that_does_more_is_run(factor: float, calls: int) -> None:
    block, x = Block(factor), torch.randn(3, 4)
    replay = Replay(block, "b", STAGES, 1 << 20)
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    block.attention.q.register_forward_hook(counted)
    with torch.no_grad():
        wanted = block(x)
        count = 0
        for _ in range(3):
            with replay.running(("present:hidden", 0)):
                assert torch.equal(block(x), wanted)
    assert count == calls


def test_what_changes_is_computed_again() -> None:
    block, x = Block(1.0), torch.randn(3, 4)
    replay = Replay(block, "b", STAGES, 1 << 20)
    parameters = {f"b.{name}": value for name, value in block.named_parameters()}
    with torch.no_grad():
        for path in ("b.last.weight", "b.attention.o.weight", "b.attention.o.bias", "b.attention.q.weight"):
            for _ in range(3):
                with replay.running(("present:hidden", 0)):
                    block(x)
            parameters[path].mul_(2.0)
            replay.changed(path)
            wanted = block(x)
            with replay.running(("present:hidden", 0)):
                assert torch.equal(block(x), wanted), path


def test_it_keeps_to_its_budget() -> None:
    block, x = Block(1.0), torch.randn(3, 4)
    replay = Replay(block, "b", STAGES, x.numel() * 4 + 1)
    with torch.no_grad():
        for batch in range(5):
            for _ in range(3):
                with replay.running(("present:hidden", batch)):
                    block(x)
                assert replay.kept <= replay.budget
        assert replay.kept == x.numel() * 4
    replay.clear()
    assert replay.kept == 0


def test_a_stated_limit_leaves_what_is_left_of_it(tiny: Any) -> None:
    with Checkpoint.open(tiny("llama", tokenizer=True)) as checkpoint:
        recipe = load_recipe("gptq", SHORT)
        need = make_plan(checkpoint, recipe).memory_bytes()
        assert make_plan(checkpoint, recipe).spare_bytes(1 << 40) == 1 << 40
        limited = make_plan(checkpoint, recipe, max_memory=need + (64 << 20))
        assert 0 <= limited.spare_bytes(1 << 40) <= 72 << 20
