"""The loop and the folder: the trained forward pass is the stored one, a stopped training goes on to the same bits, and
what cannot work is one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import featherweight
from featherweight import train
from featherweight.errors import CheckpointError, FeatherError, OutputError, RecipeError
from featherweight.model.decoder.model import NativeModel
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.tasks.analyse.verify import verify
from featherweight.tasks.train.text import order
from featherweight.tasks.train.training import run
from models import make_tiny

QUICK = train.TrainSettings(
    steps=4, batch=2, accumulate=2, length=24, held_out_windows=3, eval_every=2, log_every=1, save_every=1
)
SMALLER_GROUPS = {"sherry-train": ["forward.group_size=64"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", torch.float32, tokenizer=True)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("preset", [name for name in train.train_presets() if name not in ("full", "ofq", "tbt")])
def test_the_folder_computes_what_was_trained(preset: str, tiny: Path, tmp_path: Path) -> None:
    """float64 within 1e-12 where inputs are not rounded and nothing is a sum, else as exact as float32 sums are."""
    model, tokenizer = featherweight.load(tiny, dtype=torch.float32)
    train.prepare(model, preset, SMALLER_GROUPS.get(preset, []))
    train.set_clock(model, 10, 10)
    for layer in train.low_bit_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name == "side_left":
                parameter.data.normal_(0, 0.05)
    made = train.export(model.double(), tmp_path / "out", tokenizer=tokenizer, recipe=preset)
    ids, exact = torch.arange(40).view(2, 20), preset in ("trilm", "tequila", "sherry-train", "ofq-weights")
    loaded, again = featherweight.load(tmp_path / "out", dtype=torch.float64)
    assert again("some words").input_ids == tokenizer("some words").input_ids
    trained, stored = logits_of(model, ids), logits_of(loaded, ids)
    most = float(trained.abs().max())
    assert torch.allclose(stored, trained, rtol=0, atol=(1e-12 if exact else 2e-5) * most)
    loaded, _ = featherweight.load(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits_of(loaded, ids), logits_of(model.float(), ids), rtol=0, atol=2e-5 * most)
    native = NativeModel.open(tmp_path / "out", kv_cache="float16", precision="float").feed(ids[0].tolist()).double()
    assert torch.allclose(native, stored[0, -1], rtol=0, atol=0.01 * most)
    assert verify(tmp_path / "out").whole
    assert made.bits_per_weight < 3


def test_exporting_leaves_the_model_as_it_was(tiny: Path, tmp_path: Path) -> None:
    model, _ = featherweight.load(tiny, dtype=torch.float32)
    train.prepare(model, "tequila")
    ids = torch.arange(20).view(1, 20)
    before = logits_of(model, ids)
    train.export(model, tmp_path / "one")
    assert torch.equal(logits_of(model, ids), before)
    assert not hasattr(model.config, "quantization_config")
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(OutputError, match="is an output already"):
        train.export(model, tmp_path / "one")
    train.export(model, tmp_path / "one", overwrite=True)
    (tmp_path / "one" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt, which featherweight did not write"):
        train.export(model, tmp_path / "one", overwrite=True)
    assert (tmp_path / "one" / "mine.txt").read_text() == "mine"


class Killed(Exception):
    """Stands for the end of the process."""


def killing(step: int) -> Callable[[dict[str, Any]], None]:
    def observer(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == step:
            raise Killed

    return observer


@pytest.mark.parametrize("preset", ["bitnet-b158", "sherry-train", "ofq-weights", "hgf"])
def test_a_killed_training_goes_on_to_the_same_bits(preset: str, tiny: Path, tmp_path: Path) -> None:
    changes = SMALLER_GROUPS.get(preset, [])
    whole = run(tmp_path / "whole", preset, config=tiny, settings=QUICK, changes=changes)
    for step in (1, 3, 4):
        with pytest.raises(Killed):
            run(tmp_path / "parts", preset, config=tiny, settings=QUICK, changes=changes, observer=killing(step))
    parts = run(tmp_path / "parts", preset, config=tiny, settings=QUICK, changes=changes)
    assert parts.resumed == 3
    for name in ("model.safetensors", "config.json", "featherweight.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [line.get("held_out") for line in whole.history] == [line.get("held_out") for line in parts.history]
    assert not (tmp_path / "parts.feather-run").exists()
    assert run(tmp_path / "parts", preset, config=tiny, settings=QUICK, changes=changes).held_out == whole.held_out


def test_the_log_and_the_result_say_what_happened(tiny: Path, tmp_path: Path) -> None:
    done = run(tmp_path / "out", "trilm", tiny, settings=QUICK)
    lines = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] in ("train", "evaluation")] == [
        *("train", "train", "evaluation") * 2
    ]
    first = next(line for line in lines if line["event"] == "train")
    assert {"step", "loss", "learning_rate", "tokens_per_second", "flipped", "dead", "seconds_left"} <= first.keys()
    assert 0.2 < first["dead"] < 0.45
    assert done.tokens == 4 * 4 * 24
    assert done.steps == 4
    assert done.to_json()["history"] == done.history
    assert json.loads((tmp_path / "out" / "featherweight-train.json").read_text())["held_out"] == done.held_out


def test_training_lowers_the_loss(tiny: Path, tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"steps": 30, "save_every": None, "log_every": 30, "eval_every": 15})
    done = run(tmp_path / "out", "trilm", config=tiny, settings=settings, changes=["schedule.learning_rate=0.01"])
    losses = [line["held_out"] for line in done.history if "held_out" in line]
    assert losses[-1] < 5.0 < 5.5  # ln 256 is 5.545
    assert losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_stops_it(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.tasks.train.training import _Work

    healthy = _Work.loss
    calls = []

    def sick(self: _Work, ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return healthy(self, ids) * (float("nan") if len(calls) > 4 else 1.0)

    monkeypatch.setattr(_Work, "loss", sick)
    settings = QUICK.model_copy(update={"eval_every": 100})
    with pytest.raises(FeatherError, match=r"loss is nan in step 2; the first layer .* model\.embed_tokens"):
        run(tmp_path / "out", "trilm", config=tiny, settings=settings)
    kept = list((tmp_path / "out.feather-run" / "artifacts").glob("*.safetensors"))
    assert kept
    for path in kept:
        with SafetensorsFile.open(path) as file:
            assert all(
                bool(file.tensor(n).isfinite().all()) for n in file.entries if file.tensor(n).is_floating_point()
            )
    monkeypatch.undo()
    assert run(tmp_path / "out", "trilm", config=tiny, settings=settings).resumed == 2


def test_other_settings_do_not_go_on(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "out", "trilm", config=tiny, settings=QUICK, observer=killing(2))
    for changed, words in (({"steps": 5}, "settings: steps was 4, now 5"), ({"seed": 1}, "seed")):
        with pytest.raises(OutputError, match=words):
            run(tmp_path / "out", "trilm", config=tiny, settings=QUICK.model_copy(update=changed))
    with pytest.raises(OutputError, match=r"recipe: .*forward.* kind was 'absmean', now 'twn'"):
        run(tmp_path / "out", "trilm", config=tiny, settings=QUICK, changes=["forward={kind: twn}"])
    other = QUICK.model_copy(update={"log_every": 2, "eval_every": 4})
    assert run(tmp_path / "out", "trilm", config=tiny, settings=other).resumed == 1


def test_what_cannot_work_is_said_at_once(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "odd.json").write_text("{}")
    featherweight.compress(tiny, "rtn-4", tmp_path / "small")
    with pytest.raises(FeatherError, match="neither is given"):
        run(out, "trilm")
    with pytest.raises(FeatherError, match="both are given"):
        run(out, "trilm", tiny, config=tiny)
    with pytest.raises(FeatherError, match=r"training text .*short\.txt has \d+ tokens.*lower --length"):
        run(out, "trilm", tiny, text=tmp_path / "short.txt", settings=QUICK)
    with pytest.raises(FeatherError, match="no tokenizer, .*--tokenizer"):
        run(out, "trilm", config=tmp_path / "bare", settings=QUICK)
    with pytest.raises(CheckpointError, match="no model_type"):
        run(out, "trilm", config=tmp_path / "odd.json", settings=QUICK)
    with pytest.raises(CheckpointError, match="there is no configuration"):
        run(out, "trilm", config=tmp_path / "nothing", settings=QUICK)
    with pytest.raises(FeatherError, match="is compressed: train the original"):
        run(out, "trilm", tmp_path / "small", settings=QUICK)
    with pytest.raises(RecipeError, match="no folder can hold"):
        run(out, "trilm", tiny, settings=QUICK, changes=["activation={kind: elastic}"])
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        run(out, "trilm", tiny, settings=QUICK, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert run(tmp_path / "out2", "trilm", config=tmp_path / "bare", tokenizer=tiny, settings=QUICK).steps == 4


def test_every_time_over_the_text_has_its_order() -> None:
    first, second = order(3, 0, 50).tolist(), order(3, 1, 50).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert order(3, 0, 50).tolist() == first
    assert order(4, 0, 50).tolist() != first


def test_transformers_trainer_trains_it(tiny: Path, tmp_path: Path) -> None:
    """One call before, one after; the clock follows the trainer's steps, and its checkpoint has it."""
    import transformers

    model, _ = featherweight.load(tiny, dtype=torch.float32)
    train.prepare(model, "sherry-train", ["forward.group_size=64"])
    rows = [{"input_ids": torch.arange(20), "labels": torch.arange(20)} for _ in range(8)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = transformers.Trainer(model, settings, train_dataset=rows, callbacks=[train.clock_callback()])
    trainer.train()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.clock == (4, 4)
    assert not torch.equal(layer.weight, before)
    train.export(model, tmp_path / "out")
    loaded, _ = featherweight.load(tmp_path / "out")
    ids = torch.arange(20).view(1, 20)
    assert torch.allclose(logits_of(loaded, ids), logits_of(model.eval(), ids), atol=1e-5)


PROCESS = """
import sys
from featherweight import train
from featherweight.tasks.train.training import run
settings = train.TrainSettings(
    steps=4, batch=2, accumulate=2, length=24, held_out_windows=3, eval_every=2, log_every=1, save_every=1
)
run(sys.argv[1], "trilm", sys.argv[2], settings=settings, threads=1)
"""


def test_two_processes_make_the_steps_of_one(tiny: Path, tmp_path: Path) -> None:
    """Each has half of every step's batches; gradients are summed, so only the order of that sum may differ."""
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", PROCESS, str(tmp_path / "two"), str(tiny)]
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) for env in ranks]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    alone = run(tmp_path / "one", "trilm", tiny, settings=QUICK, threads=1)
    found = json.loads((tmp_path / "two" / "featherweight-train.json").read_text("utf-8"))
    assert found["held_out"] == pytest.approx(alone.held_out, rel=1e-5)
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in (found["history"], alone.history)]
    assert len(losses[1]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    files = (folder / "model.safetensors" for folder in (tmp_path / "two", alone.out))
    with SafetensorsFile.open(next(files)) as two, SafetensorsFile.open(next(files)) as single:
        for name in single.entries:
            a, b = two.tensor(name).float(), single.tensor(name).float()
            assert float((a != b).float().mean()) < 1e-3 or torch.allclose(a, b, atol=1e-4), name
