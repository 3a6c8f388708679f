"""Odd values in config.json: each is a sentence, or the model that transformers makes of it."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from native_models import V5, make_model, relative, some_tokens, transformers

from featherweight.errors import CheckpointError
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.decoder.model import NativeModel
from featherweight.model.decoder.network import network_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "1", "false", "auto", "torch.bfloat16", "1e-05", [], {}, [4], {"a": 1}),
    *(0, 1, -1, 2.0, 0.5, -0.0, 1e30, 10**12, float("nan"), float("inf")),
)
ROPES: tuple[Any, ...] = (
    *(None, {}, "linear", [], 3, {"type": "nonsense", "factor": 2.0}, {"type": "linear"}, {"factor": 2.0}),
    *({"type": "linear", "factor": "2"}, {"type": "linear", "factor": None}, {"type": "linear", "factor": -2.0}),
    *({"type": "linear", "factor": True}, {"type": "linear", "factor": 2}, {"rope_type": None, "factor": 2.0}),
    *({"rope_type": "linear", "type": "dynamic", "factor": 2.0}, {"rope_type": ["linear"], "factor": 2.0}),
    *({"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"}, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}),
    *({"rope_type": "yarn", "factor": 4}, {"rope_type": "dynamic", "factor": 0}, {"rope_type": "longrope"}),
    *({"rope_type": "default", "rope_theta": None}, {"rope_type": "default", "rope_theta": "1e4"}),
    *({"rope_type": "llama3", "factor": 2.0}, {"rope_type": "default", "rope_theta": -5}, {"rope_type": "default"}),
)
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_theta", "rope_scaling"),
    *("rope_parameters", "partial_rotary_factor", "architectures", "model_type", "dtype", "torch_dtype"),
    *("attention_bias", "mlp_bias", "eos_token_id", "bos_token_id", "quantization_config", "text_config"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_model(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def odd_config(config: dict[str, Any], chance: random.Random) -> tuple[str, Any]:
    name = chance.choice([name for name in FIELDS if V5 or name != "rope_parameters"])  # of transformers 5
    value = chance.choice(ROPES if name in ("rope_scaling", "rope_parameters") else VALUES)
    config[name] = value
    return name, value


def check_sentence(config: dict[str, Any]) -> None:
    said = ""
    try:
        network_of(config)
    except CheckpointError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_read_or_refused_in_one_sentence(family: str, folders: dict[str, Path]) -> None:
    """`network_of` alone, with every value in every place."""
    plain = json.loads((folders[family] / "config.json").read_text())
    for name in FIELDS:
        for value in (*VALUES, *ROPES):
            check_sentence({**plain, name: value})
    for name in plain:
        check_sentence({key: value for key, value in plain.items() if key != name})


def test_both_engines_compute_the_same_or_hand_over(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where the native decoder reads an odd configuration, transformers either refuses it or gives the same logits."""
    chance, tokens = random.Random(3), some_tokens(24)
    compared = 0
    for number in range(int(os.environ.get("FEATHERWEIGHT_ODD_CONFIGS", "40"))):
        family = chance.choice(FAMILIES)
        folder = Path(shutil.copytree(folders[family], tmp_path / str(number)))
        config = json.loads((folder / "config.json").read_text())
        changed = odd_config(config, chance)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            found = NativeModel.open(folder, threads=1, precision="float").forward(tokens)
        except CheckpointError:
            continue
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
            with torch.no_grad():
                expected = theirs(torch.tensor([tokens])).logits[0]
        except Exception:  # it may be stricter
            continue
        assert relative(found, expected) < 2e-3, (family, changed)
        compared += 1
    assert compared > 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_position_embeddings", 512.0),
        ("hidden_size", "64"),
        ("tie_word_embeddings", None),
        ("tie_word_embeddings", "false"),
        ("rms_norm_eps", "1e-05"),
        ("rope_theta", None),
        ("rope_scaling", {"type": "linear", "factor": "2.0"}),
    ],
)
def test_what_is_not_as_expected_is_left_to_transformers(name: str, value: Any, folders: dict[str, Path]) -> None:
    config = json.loads((folders["llama"] / "config.json").read_text())
    config.pop("rope_parameters", None)
    with pytest.raises(UnsupportedModelError, match=name if name != "rope_scaling" else "factor"):
        network_of({**config, name: value})


def test_a_number_of_layers_that_no_model_has(folders: dict[str, Path]) -> None:
    config = json.loads((folders["llama"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no model has so many"):
        network_of({**config, "num_hidden_layers": 10**9})
