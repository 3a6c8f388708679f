"""Vision transformers and encoder-decoders: which of their layers are trained so, a step, and the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import images, sentences, small_bart, small_vit
from torch import nn

import featherweight
from featherweight import train
from featherweight.errors import FeatherError, RecipeError
from featherweight.model.layers.modules import CodedModule

NETWORKS = {"vit": (small_vit, images), "bart": (small_bart, sentences)}


def one_step(model: Any, recipe: Any, batch: dict[str, Any]) -> float:
    """A step of the recipe's optimiser at its schedule; the loss before it."""
    chosen = train.train_recipe(recipe)
    optimiser = train.make_optimiser(model, chosen)
    train.set_clock(model, 1, 4)
    train.set_rates(optimiser, chosen, 1, 4)
    loss = model(**batch).loss
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def test_all_linear_layers_of_a_vision_transformer_but_its_head() -> None:
    vit = train.prepare(small_vit(), "tbt-weights")
    found = train.low_bit_layers(vit)
    assert len(found) == 2 * 6
    assert not any("classifier" in name for name in found)
    assert type(vit.classifier) is nn.Linear
    convolutions = [module for module in vit.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1  # the patches' embedding


def test_all_linear_layers_of_an_encoder_decoder_but_its_output() -> None:
    bart = train.prepare(small_bart(), "tbt-weights")
    found = train.low_bit_layers(bart)
    assert len(found) == 2 * 6 + 2 * 10
    assert sum(".encoder_attn." in name for name in found) == 2 * 4
    assert type(bart.lm_head) is nn.Linear
    assert type(bart.get_input_embeddings()).__base__ is nn.Embedding


@pytest.mark.parametrize(("kind", "recipe"), [("vit", "ofq-weights"), ("bart", "tbt-weights")])
def test_a_step_and_the_folder_that_multiplies_as_it_was_trained(kind: str, recipe: str, tmp_path: Path) -> None:
    make, data = NETWORKS[kind]
    model, batch = train.prepare(make(), recipe), data()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    one_step(model, recipe, batch)
    for name in train.low_bit_layers(model):
        assert not torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"]), name
    train.set_clock(model, 2, 2)
    exported = train.export(model, tmp_path / "out", recipe=recipe)
    assert len(exported.layers) == len(train.low_bit_layers(model))
    loaded, _ = featherweight.load(tmp_path / "out", dtype="float32")
    assert type(loaded) is type(model)
    coded = [module for module in loaded.modules() if isinstance(module, CodedModule)]
    assert len(coded) == len(exported.layers)
    with torch.no_grad():
        wanted, found = model.eval()(**batch), loaded.eval()(**batch)
    assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=2e-5 * float(wanted.logits.abs().max()))


def test_a_loaded_vision_transformer_is_saved_once_more(tmp_path: Path) -> None:
    """transformers 5 writes names of old checkpoints; the folder says which modules are coded by these names."""
    model = train.prepare(small_vit(), "trilm")
    train.export(model, tmp_path / "one")
    loaded, _ = featherweight.load(tmp_path / "one", dtype="float32")
    loaded.save_pretrained(tmp_path / "two")
    again, _ = featherweight.load(tmp_path / "two", dtype="float32")
    batch = images()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, loaded.eval()(**batch).logits)


def test_what_no_folder_can_hold_is_said_in_a_sentence(tmp_path: Path) -> None:
    model = train.prepare(small_bart(), "tbt-weights", ["activation={kind: elastic}"])
    model(**sentences())
    with pytest.raises(FeatherError, match=r"k_proj: .*elastic.* no folder can hold"):
        train.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="elastic"):
        train.export(small_bart(), tmp_path / "out", recipe={"forward": {"kind": "twn"}, "activation": "elastic"})
