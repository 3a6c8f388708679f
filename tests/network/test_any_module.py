"""Calibration of modules that are no language models, given a forward function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.runner import Calibration


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *, bias: Tensor) -> Tensor:
        attention = (self.query(x) @ self.key(x).mT / 4 + bias).softmax(-1)
        x = x + attention @ x
        return x + self.down(self.up(x).relu())


class Vision(nn.Module):
    """Patches, blocks one after the other, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Mixer(8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor, bias: Tensor) -> Tensor:
        x = self.patch(images)
        for block in self.blocks:
            x = block(x, bias=bias)
        return self.head(x)


class World(nn.Module):
    """A recurrent model: one list of alike layers, but called several times, so that it is no chain of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.cells = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.reward = nn.Linear(4, 1)
        self.value = nn.Linear(4, 1)

    def forward(self, observation: Tensor) -> dict[str, Tensor]:
        state = self.encoder(observation)
        for _ in range(3):
            for cell in self.cells:
                state = cell(state)
        return {"out": torch.cat([self.reward(state), self.value(state)], -1)}


def vision_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 5, 6), torch.randn(5, 5)) for _ in range(4)]


def run(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(*batch)


def inputs_of(module: nn.Module, forward: Any, batches: list[Any]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, k=k: seen.setdefault(k, []).append(a[0].reshape(-1, a[0].shape[-1])))
        for k, m in module.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            forward(module, batch)
    for hook in hooks:
        hook.remove()
    return {k: torch.cat(v) for k, v in seen.items()}


def test_blocks_are_found() -> None:
    module, batches = Vision(), vision_batches()
    wanted = inputs_of(module, run, batches)
    with Calibration.of_module(module, run, batches, n.SMALL, ("gram", "cross")) as calibration:
        found, names = {}, []
        for session in calibration.blocks():
            names.append(session.names)
            assert session.groups[0] == [f"blocks.{session.index}.query", f"blocks.{session.index}.key"]
            found.update(session.gather(session.names, ("gram", "cross")))
    assert len(names) == 3
    for name, statistics in found.items():
        assert n.close(statistics["gram"], n.gram(wanted[name])), name
        assert float(statistics["cross"].abs().max()) == 0


def test_changed_blocks_move_the_stream() -> None:
    module, batches = Vision(), vision_batches()
    before = inputs_of(module, run, batches)
    with Calibration.of_module(module, run, batches, n.SMALL, ("gram", "cross")) as calibration:
        found = {}
        for session in calibration.blocks():
            for stage in session.stages:
                found.update(session.gather(stage, ("gram", "cross")))
                for name in stage:
                    session.set_weight(name, session.weight(name) * 0.5)
    after = inputs_of(module, run, batches)  # the module itself was changed
    for name, statistics in found.items():
        rows, other = after[name].double(), before[name].double()
        assert n.close(statistics["gram"], n.gram(rows), 1e-4), name
        assert n.close(statistics["cross"], ((other - rows).T @ rows / len(rows)).float(), 1e-4), name


@pytest.mark.parametrize("blocks", [None, ""])
def test_a_module_that_is_no_chain_is_one_block(blocks: str | None) -> None:
    module, batches = World(), [torch.randn(5, 3) for _ in range(4)]
    wanted = inputs_of(module, lambda m, b: m(b), batches)
    with Calibration.of_module(module, lambda m, b: m(b), batches, n.SMALL, ("gram", "cross"), blocks=blocks) as run_:
        (session,) = run_.blocks()
        assert session.names[0] == "encoder"
        assert ["reward", "value"] in session.groups
        session.set_weight("encoder", session.weight("encoder") * 2)
        found = session.gather(session.names, ("gram", "cross", "tokens"))
        moved = inputs_of(module, lambda m, b: m(b), batches)
        for name, statistics in found.items():
            assert n.close(statistics["gram"], n.gram(moved[name])), name
            assert int(statistics["tokens"]) == len(moved[name])
            rows, other = moved[name].double(), wanted[name].double()
            assert n.close(statistics["cross"], ((other - rows).T @ rows / len(rows)).float(), 1e-4), name
        assert session.run(session.inputs[0], 0).shape == (5, 2)


def test_blocks_that_cannot_be_followed_are_refused_when_named() -> None:
    with pytest.raises(CalibrationError, match="block by block"):
        Calibration.of_module(World(), lambda m, b: m(b), [torch.randn(5, 3)], n.SMALL, blocks="cells")
    with pytest.raises(CalibrationError, match="no module"):
        Calibration.of_module(World(), lambda m, b: m(b), [torch.randn(5, 3)], n.SMALL, blocks="layers")


def test_torch_transformer_layers_are_seen() -> None:
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    with Calibration.of_module(module, lambda m, b: m(b), batches, n.SMALL) as calibration:
        for session in calibration.blocks():
            name = f"layers.{session.index}.linear2"
            found = session.gather([name], ("gram",))[name]
            assert int(found["tokens"]) == 30
            assert "gram" in found


def test_held_out_batches_and_fisher() -> None:
    settings = n.SMALL.model_copy(update={"held_out": 0.25})
    module, batches = Vision(), vision_batches()
    with Calibration.of_module(module, run, batches, settings, ("held_out_gram", "fisher")) as calibration:
        session = next(calibration.blocks())
        found = session.gather(session.names, ("held_out_gram",))
        wanted = inputs_of(module, run, batches[3:])
        for name, statistics in found.items():
            assert n.close(statistics["held_out_gram"], n.gram(wanted[name])), name
            assert calibration.fisher(name).shape == session.weight(name).shape
            assert float(calibration.fisher(name).amax()) > 0


def test_nothing_to_calibrate() -> None:
    with pytest.raises(CalibrationError, match="no linear layers"):
        Calibration.of_module(nn.LayerNorm(4), lambda m, b: m(b), [torch.randn(2, 4)], n.SMALL)
    with pytest.raises(CalibrationError, match="at least one batch"):
        Calibration.of_module(nn.Linear(4, 4), lambda m, b: m(b), [], n.SMALL)


def test_the_module_is_left_as_it_was_found() -> None:
    """Forwards of instances (accelerate's hooks, monkeypatches), training mode and gradients."""
    module, calls = Vision(), []
    frozen = module.head.weight.requires_grad_(False)
    module.blocks[2].eval()

    def own(block: nn.Module) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(block)
            return type(block).forward(block, *args, **kwargs)

        return forward

    for block in (module.blocks[0], module.blocks[1]):
        block.forward = own(block)
    before = {name: dict(m.__dict__) for name, m in module.named_modules()}
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    modes = {name: m.training for name, m in module.named_modules()}
    with Calibration.of_module(module, run, vision_batches()) as calibration:
        for session in calibration.blocks():
            session.gather(session.names, ("gram",))
    assert calls
    assert {name: dict(m.__dict__).get("forward") for name, m in module.named_modules()} == {
        name: found.get("forward") for name, found in before.items()
    }
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert {name: m.training for name, m in module.named_modules()} == modes
    assert not frozen.requires_grad


def test_a_module_that_cannot_be_calibrated_is_left_as_it_was_found() -> None:
    module = Vision()
    with pytest.raises(CalibrationError):
        Calibration.of_module(module, run, vision_batches(), blocks="nowhere")
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
