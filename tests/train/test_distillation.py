"""TBT's distillation: nothing between equal models, each term in closed form, padding, and what is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import images, sentences, small_bart, small_vit
from transformers.modeling_outputs import Seq2SeqLMOutput

from featherweight import train
from featherweight.errors import FeatherError

SEEN = {"output_hidden_states": True, "output_attentions": True}


def seen_by(model: Any, batch: dict[str, Any]) -> Any:
    model.set_attn_implementation("eager")
    return model(**batch, **SEEN)


def test_an_equal_student_lacks_nothing() -> None:
    teacher = small_bart().eval()
    batch = sentences()
    mask = batch["attention_mask"]
    wanted = seen_by(teacher, batch)
    found = seen_by(copy.deepcopy(teacher), batch)
    assert len(found.encoder_hidden_states) == len(found.decoder_hidden_states) == 3
    assert float(train.distillation_loss(found, wanted, mask, mask, task=0.0).detach()) == pytest.approx(0, abs=1e-7)
    assert torch.equal(train.distillation_loss(found, wanted, task=1.0, logits=0, hidden=0, attention=0), found.loss)


def output(**tensors: Any) -> Any:
    return Seq2SeqLMOutput(**tensors)


def test_terms_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    only: dict[str, float] = {"task": 0.0, "logits": 0.0, "hidden": 0.0, "attention": 0.0}
    found = train.distillation_loss(output(logits=ours), output(logits=theirs), mask, **{**only, "logits": 2.0})
    p, q = theirs.softmax(-1), ours.softmax(-1)
    divergences = (p * (p / q).log()).sum(-1)
    assert float(found) == pytest.approx(2 * float(divergences[mask == 1].mean()), rel=1e-5)
    student = output(decoder_hidden_states=(ours, 2 * ours), encoder_hidden_states=(ours,))
    teacher = output(decoder_hidden_states=(theirs, theirs), encoder_hidden_states=(theirs,))
    rows = [(ours - theirs).square().mean(-1), (2 * ours - theirs).square().mean(-1)]
    found = train.distillation_loss(student, teacher, mask, **{**only, "hidden": 1.0})
    wanted = sum(float(row[mask == 1].mean()) for row in rows) + float(rows[0].mean())
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    maps = [torch.rand(2, 4, 3, 3, generator=generator) for _ in range(2)]
    found = train.distillation_loss(
        output(cross_attentions=(maps[0],)), output(cross_attentions=(maps[1],)), mask, **{**only, "attention": 1.0}
    )
    kept = torch.cat([(maps[0] - maps[1])[0].flatten(), (maps[0] - maps[1])[1, :, 0].flatten()])
    assert float(found) == pytest.approx(float(kept.square().mean()), rel=1e-5)


def test_what_lacks_is_asked_for() -> None:
    batch = images()
    vit = small_vit()
    plain = vit(**batch)
    for words, weights in (
        ("output_hidden_states=True", {}),
        ("output_attentions=True", {"hidden": 0.0}),
        ("weight 0", {"task": 0.0, "logits": 0.0, "hidden": 0.0, "attention": 0.0}),
    ):
        with pytest.raises(FeatherError, match=words):
            train.distillation_loss(plain, plain, **weights)
    without = vit(pixel_values=batch["pixel_values"])
    with pytest.raises(FeatherError, match="with labels, or set task=0"):
        train.distillation_loss(without, plain)
    deeper = small_vit(layers=3)(**batch, output_hidden_states=True)
    with pytest.raises(FeatherError, match="differ in hidden_states"):
        train.distillation_loss(vit(**batch, output_hidden_states=True), deeper)


def test_a_student_of_few_bits_learns_from_its_teacher() -> None:
    """TBT on an encoder-decoder, all terms, a few steps: the loss falls, and all that is learned has a gradient."""
    teacher, batch = small_bart().eval(), sentences()
    mask = batch["attention_mask"]
    student = train.prepare(copy.deepcopy(teacher).train(), "tbt", ["schedule.learning_rate=0.003"])
    recipe = train.train_recipe("tbt", ["schedule.learning_rate=0.003"])
    with torch.no_grad():
        wanted = seen_by(teacher, batch)
    student(**batch)  # scales begin
    optimiser, losses = train.make_optimiser(student, recipe), []
    for step in range(12):
        train.set_rates(optimiser, recipe, step, 12)
        loss = train.distillation_loss(student(**batch, **SEEN), wanted, mask, mask)
        optimiser.zero_grad()
        loss.backward()
        if not step:
            still = [n for n, p in student.named_parameters() if p.grad is None or not bool(p.grad.any())]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert [name for name in still if not name.endswith("k_proj.bias")] == []
    assert losses[-1] < 0.95 * losses[0]
