"""QKR: logits against those of the plain attention, what is rounded, who is refused; operands of attentions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import PATCHES, images, sentences, small_bart, small_vit
from transformers import LlamaConfig, LlamaForCausalLM

from featherweight import train
from featherweight.errors import FeatherError, RecipeError
from featherweight.methods.train.attention import low_bit_attentions
from featherweight.methods.train.layer import LowBitLinear
from featherweight.methods.train.prepare import low_bit_modules
from featherweight.methods.train.query_key import Latent, QueryKeyProduct

FULL_PRODUCT = {"forward": {"kind": "full"}, "attention": {"product": True}}
STATSQ = {"forward": {"kind": "statsq", "scale_dtype": "float32"}, "attention": {"product": True}}


def without_biases(model: Any) -> Any:
    """Of queries and keys, which the product drops."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.data.zero_()
    return model


@pytest.mark.parametrize(("make", "data"), [(small_vit, images), (small_bart, sentences)])
def test_without_rounding_it_is_the_plain_attention(make: Any, data: Any) -> None:
    """Logits and gradients, in float64; masks of padding and of later tokens as well, in self- and cross-attention."""
    plain = without_biases(make()).double()
    model = train.prepare(copy.deepcopy(plain), FULL_PRODUCT)
    batch = {key: v.double() if v.is_floating_point() else v for key, v in data().items()}
    wanted, found = plain(**batch), model(**batch)
    assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=1e-12)
    wanted.loss.backward()
    found.loss.backward()
    gradients = dict(plain.named_parameters())
    latents = [name for name, module in model.named_modules() if isinstance(module, Latent)]
    assert len(latents) == (4 if make is small_vit else 12)
    for name in latents:
        assert torch.allclose(model.get_submodule(name).weight.grad, gradients[f"{name}.weight"].grad, atol=1e-12)


def test_with_a_cache_too() -> None:
    plain = without_biases(small_bart()).eval()
    model = train.prepare(copy.deepcopy(plain), FULL_PRODUCT)
    ids = sentences()["input_ids"][:2]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


def test_what_is_rounded_is_the_product_row_by_row() -> None:
    model = train.prepare(small_vit(), STATSQ)
    product = next(m for m in model.modules() if isinstance(m, QueryKeyProduct))
    query, key = (layer.weight.detach() for layer in product.latents)
    heads = [query[8 * h : 8 * h + 8].T @ key[8 * h : 8 * h + 8] for h in range(4)]
    assert torch.allclose(product.weight, torch.cat(heads), rtol=0, atol=1e-6)
    rounded = product.rounded()
    assert rounded.value.shape == (4 * 32, 32)
    assert torch.allclose(rounded.scales, 2 * product.weight.abs().mean(1, keepdim=True), rtol=1e-6)
    assert all(len(row.unique()) <= 4 for row in rounded.value)
    x = torch.randn(2, 5, 32)
    logits = product(x, x)
    for head in range(4):
        assert torch.allclose(logits[:, head], x @ rounded.value[32 * head : 32 * head + 32] @ x.mT, atol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.endswith(("q_proj.weight", "k_proj.weight")) for name in names) == 4
    assert not any(name.endswith(("q_proj.bias", "k_proj.bias")) for name in names)
    assert len(train.low_bit_layers(model)) == 2 * 4
    assert len(low_bit_modules(model)) == 2 * 5


def test_frozen_products_give_their_latents_no_gradient() -> None:
    """With CGA only entries of A near an edge pass a gradient; a band that nothing is in passes none."""
    for band, moved in ((0.5, True), (1e-9, False)):
        model = train.prepare(small_vit(), {**STATSQ, "backward": {"kind": "cga", "band": band, "begin": 0.5}})
        train.set_clock(model, 9, 10)
        model(**images()).loss.backward()
        product = next(m for m in model.modules() if isinstance(m, QueryKeyProduct))
        assert bool(product.latents[0].weight.grad.any()) == moved


def test_operands_are_rounded_and_the_state_goes_on() -> None:
    recipe = {**STATSQ, "activation": {"kind": "lsq"}, "attention": {"inputs": True, "product": True}}
    vit, batch = small_vit(), images()
    for layer in vit.vit.layers:
        layer.attention.q_proj.weight.data *= 200  # even probabilities, as random weights have them, round to nothing
    model = train.prepare(vit, recipe)
    loss = model(**batch).loss
    loss.backward()
    held = low_bit_attentions(model)["vit.layers.0.attention"]
    assert set(held.operands) == {"value", "probabilities"}
    chances = held.operands["probabilities"]
    assert chances.own("input_scales").shape == (PATCHES,)
    assert held.operands["value"].own("input_scales").shape == (32,)
    assert held.query_key is not None
    assert held.query_key.inputs.own("input_scales").shape == (PATCHES,)
    still = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert still == []
    other = train.prepare(small_vit(seed=5), recipe)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_operands_of_an_encoder_decoder() -> None:
    activation = {"kind": "elastic", "asymmetric": ["fc2", "probabilities"]}
    recipe = {"forward": {"kind": "absmean"}, "activation": activation, "attention": {"inputs": True}}
    model = train.prepare(small_bart(), recipe)
    found = model(**sentences(), output_attentions=True)
    assert len(low_bit_attentions(model)) == 2 + 2 * 2
    for chances in (*found.encoder_attentions, *found.decoder_attentions, *found.cross_attentions):
        assert len(chances.detach().unique()) <= 3
        assert bool((chances >= 0).all())
    found.loss.backward()
    scales = [p for name, p in model.named_parameters() if name.endswith("input_scale")]
    assert len(scales) == 32 + 6 * 4
    assert all(scale.grad is not None for scale in scales)


def test_only_attentions_whose_two_layers_are_taken() -> None:
    vit = train.prepare(small_vit(), STATSQ, ["layers.skip=['*.0.attention.q_proj']"])
    assert isinstance(vit.vit.layers[0].attention.k_proj, LowBitLinear)
    assert type(vit.vit.layers[0].attention.q_proj) is torch.nn.Linear
    assert isinstance(vit.vit.layers[1].attention.q_proj, Latent)
    with pytest.raises(FeatherError, match="no attention whose function can be chosen"):
        train.prepare(vit, STATSQ)
    train.prepare(vit, "trilm")  # the layer that was skipped
    assert isinstance(vit.vit.layers[0].attention.q_proj, LowBitLinear)
    assert bool(torch.isfinite(vit(**images()).loss))


def test_who_cannot_have_it_is_told_why(tmp_path: Path) -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(FeatherError, match=r"self_attn of Llama.* rotary positions .* attention.product=false"):
        train.prepare(llama, STATSQ)
    assert not any(isinstance(module, LowBitLinear) for module in llama.modules())
    with pytest.raises(FeatherError, match="Linear has no attention"):
        train.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4))[0], STATSQ)
    with pytest.raises(RecipeError, match=r"attention.inputs .* choose an activation"):
        train.train_recipe({"forward": {"kind": "statsq"}, "attention": {"inputs": True}})
    with pytest.raises(RecipeError, match="attention.product has no side path"):
        train.train_recipe({**STATSQ, "side": {"kind": "hgf"}})
    with pytest.raises(RecipeError, match="prodct"):
        train.train_recipe({"forward": {"kind": "statsq"}, "attention": {"prodct": True}})
    with pytest.raises(FeatherError, match="no folder"):
        train.export(train.prepare(small_vit(), STATSQ), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"attention.product .* no folder can hold"):
        train.export(small_vit(), tmp_path / "out", recipe=STATSQ)
