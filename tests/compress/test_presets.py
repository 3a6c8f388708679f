"""Every preset makes a model that loads, computes what its codes decode to, and can be verified."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight import load
from featherweight.methods.recipe import Recipe, load_recipe, presets
from featherweight.model.layers.modules import CodedModule
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.compress.compression import compress

TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(400))
QUICK = {"steps": 3, "rounds": 2, "iterations": 2, "search_tokens": 256}  # settings that only cost time


def quick(recipe: Recipe) -> tuple[str, ...]:
    """Changes that make a recipe cheap: little text, few steps."""
    changes = ["calibration.sequences=8", "calibration.length=64", "calibration.held_out=0.25"]
    plain: dict[str, Any] = recipe.dump()
    if not recipe.calibrated:
        changes = []
    for axis in ("rounding", "grid"):
        changes += [f"{axis}.{name}={value}" for name, value in QUICK.items() if plain[axis].get(name, 0) > value]
    corrections = [
        {name: min(value, QUICK[name]) if name in QUICK else value for name, value in choice.items()}
        for choice in plain["corrections"]
    ]
    if corrections != plain["corrections"]:
        changes.append(f"corrections={corrections!r}".replace("None", "null"))
    return tuple(changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


IN_BFLOAT16 = ("gptq", "gptaq-4", "trit-2-blockwise", "trit-2", "rsq", "awq", "flexround-3", "discquant", "d2quant")
"""One of each kind: layers, two streams, blocks, the whole model tuned, rounded or rotated."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", IN_BFLOAT16)
def test_networks_in_bfloat16(preset: str, tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Asked for, whatever the processor is faster in; by itself `auto` takes it where only layers are looked at."""
    model = tiny("llama", tokenizer=True, hidden_size=128, head_dim=32, intermediate_size=256)
    recipe = load_recipe(preset)
    changes = (*quick(recipe), "calibration.dtype=bfloat16")
    made = compress(model, preset, tmp_path / "out", changes=changes, calibration=text, threads=1)
    assert all(0 < layer["relative_error"] < 1 for layer in made.layers)
    assert not [layer for layer in made.layers if "fallback" in layer and "finite" in str(layer["reason"])]
    assert verify(made.out).whole


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", tokenizer=True, dtype=torch.float32, hidden_size=128, head_dim=32, intermediate_size=256)


IDS = torch.arange(48)[None]


@pytest.fixture(scope="module")
def expected(model: Path) -> Tensor:
    """Logits of the model as it was."""
    original, _ = load(model, dtype="float32")
    with torch.no_grad():
        logits: Tensor = original(IDS).logits
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_preset(
    preset: str, model: Path, expected: Tensor, tiny: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(preset)
    made = compress(
        model,
        preset,
        tmp_path / "out",
        changes=quick(recipe),
        calibration=text if recipe.calibrated else None,
        base_model=tiny("llama", tokenizer=True, dtype=torch.float32, hidden_size=128, head_dim=32,
                        intermediate_size=256, seed=1) if "base" in recipe.needs else None,
        threads=1,
    )  # fmt: skip
    assert made.bits_per_weight < 17
    assert verify(tmp_path / "out").whole
    loaded, _ = load(tmp_path / "out", dtype="float32")
    modules = [module for module in loaded.modules() if isinstance(module, CodedModule)]
    assert len(modules) == len(made.layers)
    with torch.no_grad():
        missed = (loaded(IDS).logits - expected).norm() / expected.norm()
    assert 0 < missed < 1, f"the compressed model's logits are {missed:.2f} of their norm away"


def test_loading_is_the_first_thing_a_process_does(model: Path, text: Path, tmp_path: Path) -> None:
    """Modules of codes are then imported while transformers builds the model on the meta device: three kinds."""
    folders = [tmp_path / preset for preset in ("trit-2", "pvq-data-free", "sherry-rtn")]
    for out in folders:
        compress(model, out.name, out, changes=quick(load_recipe(out.name)), calibration=text, threads=1)
    script = (
        "import sys, featherweight, torch, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    assert torch.isfinite(model(torch.arange(16)[None]).logits).all(), folder\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
