"""The bundled, really trained model: it is what its card says, and compression keeps the orderings that are claimed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from remembering import remembering
from transformers import AutoModelForCausalLM

from featherweight import load
from featherweight.cli.demo import reference_model
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.codes import code_from, code_layout
from featherweight.tasks.compress.compression import compress
from featherweight.tasks.evaluate.evaluation import bundled_text, evaluate
from featherweight.tasks.evaluate.result import Evaluation

pytestmark = pytest.mark.slow
RECIPES = ("rtn-4", "rtn-3", "ptqtp", "ptqtp-tied", "ptqtp-3", "ptqtp-1")
TOKENS = 8192


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reference")
    return {name: compress(reference_model(), name, folder / name).out for name in RECIPES}


@pytest.fixture(scope="module")
def measured(outputs: dict[str, Path]) -> dict[str, Evaluation]:
    original = remembering(reference_model())
    return {name: evaluate(out, original, context=1024, limit=TOKENS) for name, out in outputs.items()}


def test_it_is_what_its_card_says() -> None:
    folder = reference_model()
    training = json.loads((folder / "training.json").read_text())
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.parameters == training["parameters"]
        assert 5e6 <= checkpoint.parameters <= 15e6
        assert all(checkpoint.config[name] % 128 == 0 for name in ("hidden_size", "intermediate_size"))
        assert {checkpoint.entry(name).dtype for name in checkpoint.names} == {"BF16"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 24e6
    assert training["epochs"] >= 1
    found = evaluate(folder, limit=8192, dtype="bfloat16")
    assert (
        found.perplexity < 1.15 * training["validation_perplexity"]
    )  # the text is the beginning of the validation text


def test_the_shipped_texts_are_short_and_disjoint() -> None:
    calibration, evaluation = bundled_text("calibration.txt"), bundled_text("evaluation.txt")
    assert len(calibration.encode()) + len(evaluation.encode()) <= 1_000_000
    lines = {line for line in calibration.splitlines() if len(line) > 60}
    assert len(lines) > 1000
    assert not lines & set(evaluation.splitlines())


def test_orderings_hold_beyond_doubt(measured: dict[str, Evaluation]) -> None:
    """By log-ratio to the original, paired over windows: neighbours differ by more than both standard errors."""
    order = ("ptqtp-3", "rtn-4", "ptqtp", "rtn-3", "ptqtp-1")
    for better, worse in zip(order, order[1:], strict=False):
        low, high = measured[better], measured[worse]
        assert low.log_ratio is not None
        assert high.log_ratio is not None
        assert low.log_ratio_standard_error is not None
        assert high.log_ratio_standard_error is not None
        assert high.log_ratio - low.log_ratio > low.log_ratio_standard_error + high.log_ratio_standard_error, (
            better,
            worse,
        )
        assert low.divergence is not None
        assert high.divergence is not None
        assert low.divergence.mean < high.divergence.mean
        assert low.divergence.top1_agreement > high.divergence.top1_agreement
    tied, free = measured["ptqtp-tied"], measured["ptqtp"]  # half the scales cost next to nothing
    assert tied.log_ratio is not None
    assert free.log_ratio is not None
    assert tied.log_ratio < 1.25 * free.log_ratio


def test_bits_are_counted_to_the_byte(outputs: dict[str, Path], measured: dict[str, Evaluation]) -> None:
    size = measured["ptqtp"].size
    assert size is not None
    weights = 8 * (256 * 256 * 2 + 128 * 256 * 2 + 3 * 256 * 768)
    assert size.linear_weights == weights
    packed = 8 * sum(2 * -(-n * d // 5) + 4 * n * (d // 128) for n, d in SHAPES)
    assert size.linear_bits == 8 * packed / weights
    assert size.bytes == (outputs["ptqtp"] / "model.safetensors").stat().st_size


SHAPES = [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (768, 256), (256, 768)]


@pytest.mark.parametrize("recipe", ["ptqtp", "ptqtp-tied", "rtn-3"])
def test_logits_are_those_of_the_decoded_dense_model_bit_for_bit(outputs: dict[str, Path], recipe: str) -> None:
    loaded, tokenizer = load(outputs[recipe], dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(reference_model(), **{"torch_dtype": torch.float32})
    with Checkpoint.open(outputs[recipe]) as checkpoint:
        specs = module_specs(checkpoint.quantization_config or {})
        assert len(specs) == 56
        for name, spec in specs.items():
            code = code_from(spec, {t: checkpoint.tensor(f"{name}.{t}") for t in code_layout(spec)})
            dense.get_submodule(name).weight.data.copy_(code.decode())
    tokens = torch.tensor([tokenizer(bundled_text()[:2000]).input_ids])
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, dense(tokens).logits)
