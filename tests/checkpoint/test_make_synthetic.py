"""The script that writes checkpoints of real sizes for measuring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic.py"


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    done = run("--shape", "tiny", "--out", folder, "--shard-gb", 0.001)
    assert done.returncode == 0, done.stderr
    return folder


def test_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        anatomy = read_anatomy(checkpoint)
        assert len(checkpoint.files) > 2
        assert (anatomy.family, anatomy.blocks, len(anatomy.layers)) == ("llama", 2, 14)
        assert anatomy.head is not None
        for layer in anatomy.layers:
            weight = checkpoint.tensor(layer.tensor).float()
            assert weight.std() == pytest.approx(0.02, rel=0.03)
            assert weight.mean().abs() < 0.001
        first, second = (checkpoint.tensor(layer.tensor) for layer in anatomy.layers[4:6])
        assert not first.equal(second)
        assert (checkpoint.tensor("model.norm.weight") == 1).all()


def test_seeds(folder: Path, tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--shape", "tiny", "--blocks", 1, "--out", tmp_path / out, "--seed", seed).returncode == 0
    a, b, c = ((tmp_path / out / name).read_bytes() for out in "abc")
    assert a == b
    assert a != c
    again = run("--shape", "tiny", "--out", tmp_path / "a")
    assert again.returncode != 0
    assert "holds a checkpoint already" in again.stderr


def test_transformers_loads_it(folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Grüße, ternary world!", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Grüße, ternary world!"
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
