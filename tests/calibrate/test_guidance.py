"""Guided statistics: tokens weighted by the loss's gradients, found block by block, against one backward pass."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.guidance import HeldGuidance, capped, effective_number
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.calibrate.settings import CalibrationSettings

DENSE = ("llama", "qwen3", "gpt2", "phi3")


def settings(**changes: Any) -> CalibrationSettings:
    return n.SMALL.model_copy(update={"guidance": 1, "dtype": "float32", **changes})


def reference(model: Any, windows: Tensor, groups: int) -> dict[str, Tensor]:
    """Mean squared gradients [g, windows, T] at the output of every linear module, mean one; one autograd pass."""
    felt: dict[str, Tensor] = {}
    model.requires_grad_(True)

    def keep(name: str) -> Any:
        return lambda _, __, output: output.register_hook(lambda g: felt.__setitem__(name, g)) and None

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    logits = model(input_ids=windows).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, gradient in felt.items():
        squares = torch.stack([part.mean(-1) for part in gradient.double().square().tensor_split(groups, -1)])
        found[name] = squares / squares.flatten(1).mean(1).view(-1, 1, 1)
    return found


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("groups", [1, 3])
def test_weights_are_those_of_one_backward_pass(family: str, groups: int) -> None:
    windows = n.ids(7)
    wanted = reference(n.whole(family), windows, groups)
    with n.opened(family, settings(guidance=groups), windows=windows) as calibration:
        calibration.guide()
        for name in calibration.host.layers:
            if calibration.host.layers[name].block is None:
                continue
            found = calibration._guidance.weights(name, 0) if calibration._guidance else None
            assert found is not None, name
            assert found[0].shape == (groups, 7, 16)
            assert n.close(found[0].double(), wanted[name], 2e-3), name
            assert found[1] == pytest.approx(min(effective_number(one) for one in wanted[name]), rel=1e-2)


def test_blockwise_equals_whole_in_float64() -> None:
    model = n.whole("llama").double()
    wanted = reference(n.whole("llama").double(), n.ids(), 1)
    with Calibration.of_tokens(model, n.ids(), settings()) as calibration:
        calibration.guide()
        for name in calibration.host.layers:
            if calibration.host.layers[name].block is None:
                continue
            found = calibration._guidance.weights(name, 0) if calibration._guidance else None
            assert found is not None
            assert n.close(found[0].double(), wanted[name], 1e-6), name


def test_the_output_layer_has_the_closed_form() -> None:
    """Behind z = logits come only softmax and likelihood: s[t] = mean over j of (p_j - y_j)^2."""
    windows = n.ids()
    with torch.no_grad():
        chances = n.whole("llama")(input_ids=windows).logits.double().softmax(-1)
    missed = chances[:, :-1] - nn.functional.one_hot(windows[:, 1:], chances.shape[-1])
    wanted = nn.functional.pad(missed.square().mean(-1), (0, 1))  # the last token predicts nothing
    with n.opened("llama", settings(), windows=windows, head=True) as calibration:
        calibration.guide()
        found = calibration._guidance.weights("lm_head", 0) if calibration._guidance else None
    assert found is not None
    assert n.close(found[0][0].double(), wanted / wanted.mean(), 1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_feel_the_tokens_they_see(family: str) -> None:
    """Against plain loops over the experts of each block, whose products are watched."""
    windows = n.ids(5)
    model = n.whole(family).requires_grad_(True)
    felt: dict[tuple[int, int, int], Tensor] = {}  # block, expert, number of the product -> [tokens]
    for block, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts

        def loop(hidden: Tensor, index: Tensor, weights: Tensor, e: Any = experts, b: int = block) -> Tensor:
            out = torch.zeros_like(hidden)
            for expert in range(len(e.gate_up_proj)):
                token, choice = (index == expert).nonzero(as_tuple=True)
                gate, up = (hidden[token] @ e.gate_up_proj[expert].T).chunk(2, -1)
                down = (e.act_fn(gate) * up) @ e.down_proj[expert].T
                for place, product in enumerate((gate, up, down)):

                    def keep(g: Tensor, key: Any = (b, expert, place), token: Tensor = token) -> None:
                        felt[key] = torch.zeros(len(hidden)).index_add(0, token, g.square().mean(-1))

                    product.register_hook(keep)
                out.index_add_(0, token, down * weights[token, choice, None])
            return out

        experts.__dict__["forward"] = loop
    logits = model(input_ids=windows).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    place = {"w1": 0, "gate_proj": 0, "w3": 1, "up_proj": 1, "w2": 2, "down_proj": 2}
    with n.opened(family, settings(batch_tokens=80), windows=windows) as calibration:
        calibration.guide()
        checked = 0
        for name, layer in calibration.host.layers.items():
            if layer.expert is None or layer.block is None:
                continue
            found = calibration._guidance.weights(name, 0) if calibration._guidance else None
            wanted = felt[layer.block, layer.expert, place[layer.role]]
            assert (found is None) == (float(wanted.sum()) == 0), name
            if found is not None:
                assert n.close(found[0].flatten(), wanted / wanted.mean(), 2e-3), name
                checked += 1
        assert checked >= 12


def test_tokens_that_nothing_depends_on_weigh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of the second block are multiplied by zero for odd places: its layers' statistics are of even ones."""
    model = n.whole("llama")
    block = model.model.layers[1].mlp
    plain = block.forward
    even = (torch.arange(16) % 2 == 0).view(1, 16, 1).float()
    monkeypatch.setattr(block, "forward", types.MethodType(lambda self, x: plain(x) * even, block))
    name = "model.layers.1.mlp.down_proj"
    with Calibration.of_tokens(model, n.ids(), settings()) as calibration:
        seen: list[Tensor] = []
        for session in calibration.blocks():
            if session.index == 1:
                hook = model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args: seen.append(args[0].detach())
                )
                found = session.gather([name], ("gram",))[name]["gram"]
                hook.remove()
                weights = session.weighing.guided(name)
        assert weights is not None
        assert float(weights[0, :, 1::2].abs().max()) == 0
        assert float(weights[0, :, :-1:2].min()) > 0
    rows = torch.cat(seen)
    assert n.close(found, n.gram(rows[:, ::2].reshape(-1, rows.shape[-1]), weights[0, :, ::2]), 1e-4)
    assert not n.close(found, n.gram(rows.reshape(-1, rows.shape[-1])), 1e-2)


def test_weights_that_are_all_one_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(one: CalibrationSettings) -> dict[str, dict[str, Tensor]]:
        with n.opened("llama", one, ("gram", "mean_abs", "mean")) as calibration:
            return {
                name: found
                for session in calibration.blocks()
                for name, found in session.gather(session.names, ("gram", "mean_abs", "mean")).items()
            }

    plain = gathered(settings(guidance=0))
    monkeypatch.setattr(Calibration, "guidance", lambda self, layer: (torch.ones(1, 6, 16), 96.0))
    guided = gathered(settings())
    for name, found in plain.items():
        for statistic, value in found.items():
            assert torch.equal(guided[name][statistic], value), (name, statistic)


def test_one_group_is_token_weights_and_groups_have_moments_of_their_own() -> None:
    name = "model.layers.1.mlp.up_proj"
    rows = n.layer_inputs(n.whole("llama"), n.ids())[name]
    for groups in (1, 4):
        with n.opened("llama", settings(guidance=groups), ("gram", "held_out_gram")) as calibration:
            for session in calibration.blocks():
                if session.index != 1:
                    continue
                weights, found = session.weighing.guided(name), session.gather([name], ("gram", "held_out_gram"))[name]
        assert weights is not None
        seen = len(found_windows := weights[0]) - 1  # an eighth of six windows is held out: one
        own = weights[:, :seen].reshape(groups, -1)
        part = rows.view(len(found_windows), 16, -1)[:seen].reshape(-1, rows.shape[-1])
        assert n.close(found["gram"], n.gram(part, own.mean(0)), 1e-4)
        last = rows.view(len(found_windows), 16, -1)[seen:].reshape(-1, rows.shape[-1])
        assert n.close(found["held_out_gram"], n.gram(last, weights[:, seen:].mean(0)), 1e-4)
        assert n.close(found["held_out_plain"], n.gram(last), 1e-4)
        if groups == 1:
            assert "gram_of_rows" not in found
            continue
        assert found["gram_of_rows"].shape == (4, 64, 64)
        for one, moment in zip(own, found["gram_of_rows"], strict=True):
            assert n.close(moment, n.gram(part, one), 1e-4)


def test_layers_that_share_an_input_have_moments_of_their_own() -> None:
    with n.opened("llama", settings()) as calibration:
        session = next(calibration.blocks())
        group = next(group for group in session.groups if len(group) > 1)
        found = session.gather(group, ("gram",))
        assert not n.close(found[group[0]]["gram"], found[group[1]]["gram"], 1e-2)
        assert set(session.weighing.effective) == set(group)


def test_padding_weighs_nothing() -> None:
    mask = torch.ones(6, 16, dtype=torch.long)
    mask[2, 9:] = 0
    with n.opened("llama", settings(), attention_mask=mask) as calibration:
        calibration.guide()
        for name in calibration.host.layers:
            if calibration.host.layers[name].block is None:
                continue
            found = calibration._guidance.weights(name, 0) if calibration._guidance else None
            assert found is not None
            assert float(found[0][0, 2, 9:].abs().max()) == 0, name
            assert float(found[0].sum()) == pytest.approx(int(mask.sum()), rel=1e-4)


def test_a_pass_that_was_stopped_goes_on_to_the_same_weights() -> None:
    class Stop(Exception):
        pass

    class Breaking(HeldGuidance):
        left = 2

        def keep(self, key: str, tensors: Any, record: Any) -> None:
            if self.left == 0:
                raise Stop
            self.left -= 1
            super().keep(key, tensors, record)

    small = settings(batch_tokens=16)
    whole, cut = HeldGuidance(), Breaking()
    for store in (whole, cut):
        with n.opened("llama", small) as calibration:
            if store is cut:
                with pytest.raises(Stop):
                    calibration.guide(store=store)
            else:
                calibration.guide(store=store)
    assert 0 < len(cut.held) < len(whole.held)
    rest = HeldGuidance(dict(cut.held))
    told: list[dict[str, Any]] = []
    with n.opened("llama", small, notify=told.append) as calibration:
        calibration.guide(store=rest)
    steps = [event["step"] for event in told if event["event"] == "gradients"]
    assert len(steps) == len(whole.held) - len(cut.held)
    assert rest.held.keys() == whole.held.keys()
    for key, (tensors, record) in whole.held.items():
        assert rest.held[key][1] == record
        for name, value in tensors.items():
            assert torch.equal(rest.held[key][0][name], value)


def test_other_groups_are_not_taken_for_these() -> None:
    store = HeldGuidance()
    for groups in (1, 2):
        with n.opened("llama", settings(guidance=groups)) as calibration:
            calibration.guide(store=store)
            found = calibration.guidance("model.layers.0.mlp.up_proj")
        assert found is not None
        assert len(found[0]) == groups


@pytest.mark.parametrize("least", [1, 10, 40, 63, 64, 200])
def test_heavy_weights_are_cut(least: int) -> None:
    weights = torch.randn(64, dtype=torch.float64).mul(2).exp()
    cut = capped(weights, least)
    assert effective_number(cut) >= min(least, 64) * (1 - 1e-6)
    assert torch.equal(cut.argsort(), cut.argsort())
    kept = cut < cut.max()
    assert torch.equal(cut[kept], weights[kept])
    if effective_number(weights) < least < 64:
        assert effective_number(cut) == pytest.approx(least, rel=1e-6)


def test_a_gradient_that_is_not_finite_names_layer_and_window() -> None:
    model = n.whole("llama")
    windows = n.ids()
    windows[windows == 7] = 8
    windows[3, 4] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    with (
        Calibration.of_tokens(model, windows, settings()) as calibration,
        pytest.raises(CalibrationError, match=r"at the output of model\.layers\.1\.\S+ are not finite in window 3 "),
    ):
        calibration.guide()


def test_factors_of_the_fisher_information() -> None:
    """H_I = mean G'G / out and H_O = mean GG' / in over the windows that methods see, labels from the model itself."""
    windows, name = n.ids(), "model.layers.0.self_attn.k_proj"
    found = []
    for one in (settings(guidance=0), settings(guidance=0, batch_tokens=16), settings(guidance=0, seed=1)):
        with n.opened("llama", one, ("gram", "output_gram"), windows=windows) as calibration:
            calibration.guide()
            factors = calibration.fisher_factors(name)
            assert factors is not None
            found.append(factors)
    (inner, outer), again, other = found
    assert inner.shape == (64, 64)
    assert outer.shape == (32, 32)
    assert torch.equal(inner, inner.mT)
    assert float(torch.linalg.eigvalsh(inner.double()).min()) >= -1e-6 * float(inner.diagonal().max())
    # tr G'G = tr GG': of every window, so of their means.
    assert float(inner.trace() * 32) == pytest.approx(float(outer.trace() * 64), rel=1e-4)
    for one, two in zip((inner, outer), again, strict=True):
        assert n.close(one, two, 1e-4)
    assert not n.close(inner, other[0], 1e-2)
    assert torch.linalg.matrix_rank(outer, rtol=1e-4) > 5


@pytest.mark.parametrize("kind", ["encoder of no blocks", "images"])
def test_networks_that_cannot_be_run_backward_are_refused(kind: str) -> None:
    if kind == "images":
        with pytest.raises(CalibrationError, match="token ids of language models only"):
            Calibration.of_module(nn.Linear(4, 4), lambda m, b: m(b), [torch.randn(2, 4)], settings())
        return
    model = n.whole("llama")
    with (
        Calibration.of_tokens(model, n.ids(), settings(), blocks="") as calibration,
        pytest.raises(CalibrationError, match=r"no list of blocks .* set it to 0"),
    ):
        calibration.guide()
