"""Scale tuning of a network without an output layer: it matches hidden states and their mean, not predictions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import load
from featherweight.methods.learn.objectives import ModelObjective
from featherweight.methods.recipe import load_recipe
from featherweight.tasks.compress.compression import compress

TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(400))
TUNING = "corrections=[{kind: scale-tuning, steps: 12, batch_size: 8, learning_rate: 1.0e-2}]"
SMALL = ("calibration.sequences=32", "calibration.length=24", "grid.group_size=32", TUNING)


class Shifted:
    """`ModelAccess` of a network that gives what it is given, and a tensor `shift` beside."""

    windows = (torch.arange(8), torch.arange(8) + 3)
    held_out = (torch.arange(8) + 5,)
    predicts = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shift = torch.zeros(4)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.stack([ids, ids + 1, -ids, ids * 2], -1).float() + self.shift

    def original(self) -> Any:
        return _Set(self, torch.zeros(4))

    def overridden(self, weights: Any, tensors: Any) -> Any:
        return _Set(self, tensors["shift"])


class _Set:
    def __init__(self, owner: Shifted, value: Tensor) -> None:
        self.owner, self.value, self.before = owner, value, owner.shift

    def __enter__(self) -> None:
        self.owner.shift = self.value

    def __exit__(self, *_: object) -> None:
        self.owner.shift = self.before


def test_the_loss_is_that_of_states_and_of_their_means() -> None:
    model = Shifted()
    objective = ModelObjective(model, batch_size=2)  # type: ignore[arg-type]
    shift = torch.tensor([0.1, 0.0, -0.2, 0.3]).requires_grad_()
    ids = torch.stack(model.windows)
    states = model.hidden(ids)
    expected = 2 * 8 * shift.square().sum() / states.square().sum()
    expected = expected + 2 * shift.square().sum() / states.mean(1).square().sum()
    (gradient,) = torch.autograd.grad(expected, shift)
    assert objective.backward({}, {"shift": shift}, 0) == pytest.approx(expected.item(), rel=1e-5)
    assert shift.grad is not None
    assert torch.allclose(shift.grad, gradient, rtol=1e-4)
    assert objective.held_out_loss({}, {"shift": torch.zeros(4)}) == pytest.approx(0, abs=1e-9)


def without_head(source: Path, folder: Path) -> Path:
    """The encoder alone of a masked language model's folder, with its tokenizer."""
    import transformers

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    transformers.AutoModel.from_pretrained(source, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_encoder_is_tuned_through_the_whole_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The held-out loss falls, and the result loads."""
    source, text = without_head(tiny("bert", tokenizer=True), tmp_path / "encoder"), tmp_path / "text.txt"
    text.write_text(TEXT)
    seen: list[dict[str, Any]] = []
    compress(source, load_recipe("rtn-2", SMALL), tmp_path / "out", calibration=text, threads=1, observer=seen.append)
    last = [event for event in seen if "held_out_after" in event][-1]
    assert last["held_out_after"] < last["held_out_before"]
    model, _ = load(tmp_path / "out", dtype="float32")
    assert torch.isfinite(model(torch.arange(20)[None]).last_hidden_state).all()
