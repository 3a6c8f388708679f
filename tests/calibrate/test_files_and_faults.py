"""Files of statistics, starved layers, values that are not finite, and models that cannot be calibrated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import networks as n
from featherweight.errors import CalibrationError
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.calibrate.statistics_file import StatisticsFile, load_statistics, save_statistics
from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint

NEEDS = ("gram", "mean_abs")


def gathered(path: Path, family: str = "llama", settings: CalibrationSettings = n.SMALL) -> Checkpoint:
    checkpoint = Checkpoint.open(n.folder(family))
    with n.opened(family, settings, NEEDS) as calibration:
        save_statistics(calibration, path, checkpoint, NEEDS, text_digest="abc")
    return checkpoint


def test_statistics_file(tmp_path: Path) -> None:
    path = tmp_path / "llama.statistics"
    checkpoint = gathered(path)
    with n.opened("llama", needs=NEEDS) as calibration:
        wanted = {}
        for session in calibration.blocks():
            wanted.update(session.gather(session.names, NEEDS))
    found = load_statistics(path, checkpoint)
    assert found.keys() == wanted.keys()
    for name, statistics in wanted.items():
        assert found[name].keys() == statistics.keys()
        assert all(torch.equal(found[name][key], value) for key, value in statistics.items())
    with StatisticsFile.open(path, checkpoint) as file:
        assert file.names == ("gram", "mean_abs", "tokens")
        assert file.text == "abc"
        assert file.settings["batch_tokens"] == 48
        assert file.statistics("no.such.layer") == {}
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "s"
    gathered(path)
    with pytest.raises(CalibrationError, match="another model"):
        StatisticsFile.open(path, Checkpoint.open(n.folder("gpt2")))
    with pytest.raises(CalibrationError, match="another model"):
        StatisticsFile.open(path, Checkpoint.open(n.folder("llama", seed=1)))


def test_no_file_of_statistics(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no file of statistics"):
        StatisticsFile.open(tmp_path / "absent")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CalibrationError, match="no file of statistics"):
        StatisticsFile.open(tmp_path / "plain.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CalibrationError, match="no file of statistics"):
        StatisticsFile.open(tmp_path / "text")
    about = {"version": 99, "layers": {}, "names": [], "left_out": {}, "settings": {}, "text": "", "model": ""}
    save_file({"x": torch.zeros(1)}, tmp_path / "new", metadata={"featherweight_statistics": json.dumps(about)})
    with pytest.raises(CalibrationError, match="version 99"):
        StatisticsFile.open(tmp_path / "new")


def test_starved_experts(tmp_path: Path) -> None:
    settings = n.SMALL.model_copy(update={"starved_floor": 1, "starved_tokens": 0.8})  # 51 of 64 inputs, 102 of 128
    with n.opened("mixtral", settings) as calibration:
        session = next(calibration.blocks())
        found = session.gather(session.names, ("gram",))
        starved = {
            name for name, layer in session.layers.items() if int(found[name]["tokens"]) < int(0.8 * layer.shape[1])
        }
        assert starved
        assert set(session.starved) == starved
        assert all(session.layers[name].expert is not None for name in starved)
        assert all(session.starved[name] == int(found[name]["tokens"]) for name in starved)
    path = tmp_path / "s"
    gathered(path, "mixtral", settings)
    with StatisticsFile.open(path) as file:
        assert starved <= set(file.left_out)
        assert all(file.statistics(name) == {} for name in starved)


def test_too_few_tokens_for_any_layer(tmp_path: Path) -> None:
    """An empty file would make every recipe that uses it data-free without a word."""
    settings = n.SMALL.model_copy(update={"starved_floor": 1000})
    with pytest.raises(CalibrationError, match=r"no layer .* saw \d+ tokens.*raise calibration.sequences"):
        gathered(tmp_path / "s", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_layers_without_statistics_are_named(tmp_path: Path) -> None:
    settings = n.SMALL.model_copy(update={"starved_floor": 1, "starved_tokens": 0.8})
    told: list[dict[str, Any]] = []
    with n.opened("mixtral", settings, NEEDS) as calibration:
        calibration.notify = told.append
        save_statistics(calibration, tmp_path / "s", Checkpoint.open(n.folder("mixtral")), NEEDS)
    (note,) = [event["text"] for event in told if event["event"] == "note"]
    assert "expert" in note
    assert "tokens" in note
    assert "more" in note
    moved = [event for event in told if event["event"] == "advanced"]
    assert [(event["block"], event["of"]) for event in moved] == [(i, len(moved)) for i in range(len(moved))]


def test_expert_that_sees_nothing() -> None:
    """Equal tokens all go to the same two of four experts."""
    with n.opened("mixtral", windows=torch.full((4, 16), 7)) as calibration:
        session = next(calibration.blocks())
        found = session.gather(session.names, ("gram",))
        lost = [name for name in session.starved if session.starved[name] == 0]
        assert len(lost) == 2 * 3
        assert all(set(found[name]) == {"tokens"} for name in lost)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """A NaN in the embedding of one token: the layer, the window and the token where it began are reported, and the
    statistics are those of the other tokens."""
    broken = tmp_path / "broken"
    shutil.copytree(n.folder("gpt2"), broken)
    tensors = load_file(broken / "model.safetensors")
    token = int(n.ids()[2, 5])
    tensors["transformer.wte.weight"][token, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    told: list[dict[str, object]] = []
    with n.opened("gpt2", path=broken, notify=told.append) as calibration:
        session = next(calibration.blocks())
        name = session.names[0]
        found = session.gather([name], ("gram",))[name]
    first = int((n.ids().reshape(-1) == token).nonzero()[0])
    where = session.non_finite[name]
    assert (where["sequence"], where["token"]) == (first // 16, first % 16)
    assert any(event["event"] == "non-finite" and event["layer"] == name for event in told)
    good = n.ids().reshape(-1) != token
    rows = n.layer_inputs(n.whole("gpt2"), n.ids())["transformer.h.0.attn.c_attn"]
    assert int(found["tokens"]) == int(good.sum())
    assert n.close(found["gram"], n.gram(rows[good]))


def test_models_that_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="encoder-decoder"):
        n.opened("t5")
    folder = tmp_path / "unknown"
    shutil.copytree(n.folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["X"], "model_type": "unheard_of"}))
    with pytest.raises(CalibrationError, match="unheard_of|cannot read"):
        n.opened("llama", path=folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CalibrationError, match="compressed already"):
        n.opened("llama", path=folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CalibrationError, match="do not belong together"):
        n.opened("llama", path=folder)


def test_windows_of_another_tokenizer() -> None:
    with pytest.raises(CalibrationError, match="another tokenizer"):
        n.opened("llama", windows=torch.full((2, 8), 300))
    with pytest.raises(CalibrationError, match="sequences, length"):
        n.opened("llama", windows=torch.zeros(8, dtype=torch.int64))


def test_no_window_left_to_hold_out() -> None:
    with pytest.raises(CalibrationError, match="held-out"):
        n.opened("llama", windows=n.ids(1), needs=("held_out_gram",))


def test_settings_are_checked() -> None:
    for wrong in ({"sequences": 0}, {"held_out": 1.0}, {"token_weights": "size"}, {"unknown": 1}):
        with pytest.raises(ValidationError):
            CalibrationSettings(**wrong)
    assert all(field.description for field in CalibrationSettings.model_fields.values())


def test_a_base_class_without_head(tmp_path: Path) -> None:
    """BertModel saves no head; its blocks are found and run all the same."""
    from models import make_tiny

    path = make_tiny("bert", tmp_path / "b", torch.float32, model_class="BertModel")
    checkpoint = Checkpoint.open(path)
    from featherweight.methods.calibrate.runner import Calibration

    with Calibration.open(checkpoint, read_anatomy(checkpoint), n.ids(), n.SMALL) as calibration:
        assert type(calibration.host.model).__name__ == "BertModel"
        assert sum(len(session.gather(session.names, ("gram",))) for session in calibration.blocks()) == 12
