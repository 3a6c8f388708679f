"""The whole model at once: Fisher information, overrides, and changes that later blocks keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import networks as n


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fisher_is_the_mean_of_squared_gradients(family: str) -> None:
    model = n.whole(family).requires_grad_(True)
    squares: dict[str, torch.Tensor] = {}
    windows = n.ids(3)
    for row in windows:
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0]
        nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad.square() / len(windows)
    with n.opened(family, needs=("fisher", "gram"), windows=windows) as calibration:
        checked = 0
        for session in calibration.blocks():
            for name in session.names:
                found = calibration.fisher(name)
                assert found.shape == session.layers[name].shape
                assert found.dtype == torch.float32
                slot = calibration.host.slots[name]
                wanted = slot.view(squares[slot.parameter])
                assert n.close(found, wanted, 1e-3), name
                checked += 1
        assert checked == len([layer for layer in calibration.host.layers.values() if layer.block is not None])


def test_fisher_of_an_encoder() -> None:
    with n.opened("bert", needs=("fisher",)) as calibration, calibration.whole_model() as whole:
        name = next(iter(whole.layers))
        one, again = whole.fisher([name])[name], whole.fisher([name])[name]
        assert torch.equal(one, again)
        assert float(one.amax()) > 0
        assert not torch.equal(one, whole.fisher([name], seed=1)[name])


def test_blocks_are_dropped_after_fisher() -> None:
    with n.opened("llama", needs=("fisher",)) as calibration:
        next(calibration.blocks())
        assert all(p.is_meta for p in calibration.host.blocks[1].parameters())


def test_logits_and_overrides() -> None:
    reference = n.whole("llama")
    with torch.no_grad():
        logits = reference(input_ids=n.ids()).logits
    with n.opened("llama") as calibration, calibration.whole_model() as whole:
        assert n.close(whole.run(n.ids()), logits, 1e-5)
        assert n.close(whole.head(whole.hidden(n.ids())), logits, 1e-5)
        assert len(whole.windows) == 6
        name = "model.layers.1.mlp.up_proj"
        weight = (whole.weight(name) * 2).requires_grad_()
        norm = torch.full((64,), 0.5, requires_grad=True)
        with whole.overridden({name: weight}, {"model.norm.weight": norm}):
            out = whole.head(whole.hidden(n.ids()))
            assert not torch.allclose(out, logits, atol=1e-3)
            out.square().mean().backward()
            with whole.original():
                assert n.close(whole.run(n.ids()), logits, 1e-5)
            with whole.overridden({name: torch.zeros_like(weight)}):
                assert not torch.allclose(whole.run(n.ids()), out, atol=1e-4)
            assert torch.allclose(whole.run(n.ids()), out)
        assert float(weight.grad.abs().max()) > 0
        assert float(norm.grad.abs().max()) > 0
        assert n.close(whole.run(n.ids()), logits, 1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_set_stays_for_the_blocks(family: str) -> None:
    with n.opened(family) as calibration:
        with calibration.whole_model() as whole:
            names = [name for name, layer in whole.layers.items() if layer.block == 1][-1:]
            names += ["model.layers.0.self_attn.q_proj"]
            wanted = {name: whole.weight(name) * 3 for name in names}
            for name, weight in wanted.items():
                whole.set_weight(name, weight)
            embedding = whole.tensor("model.embed_tokens.weight") * 0.5
            whole.set_tensor("model.embed_tokens.weight", embedding)
            assert len(whole.changed) == 3
        for session in calibration.blocks():
            if session.index == 0:
                assert torch.equal(torch.cat(session.inputs), embedding[n.ids()])
            for name in set(names) & set(session.names):
                assert torch.equal(session.weight(name), wanted[name])


def test_tied_head_gets_its_own_memory() -> None:
    path = n.folder("llama", tie_word_embeddings=True)
    with n.opened("llama", path=path) as calibration, calibration.whole_model() as whole:
        before = whole.tensor("model.embed_tokens.weight")
        whole.set_tensor("lm_head.weight", before * 2)
        assert torch.equal(whole.tensor("model.embed_tokens.weight"), before)
        assert torch.equal(whole.tensor("lm_head.weight"), before * 2)
        assert set(whole.changed) == {"lm_head.weight"}
        whole.set_tensor("model.embed_tokens.weight", before * 3)
        assert torch.equal(whole.tensor("lm_head.weight"), before * 2)
