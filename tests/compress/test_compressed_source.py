"""A compressed folder as a source: read as the plain model that it stands for, said to be compressed, never hidden."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import featherweight
from featherweight.errors import CheckpointError
from featherweight.methods.recipe import load_recipe
from featherweight.model.network.source import open_source
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.decoded import DecodedCheckpoint
from featherweight.storage.checkpoint.format import module_specs
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.tasks.analyse.inspect import inspect_folder
from featherweight.tasks.compress.compression import Compression, compress
from featherweight.tasks.compress.gather import gather_statistics
from featherweight.tasks.compress.plan import make_plan

SMALL = ["calibration.sequences=4", "calibration.length=32"]
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", ("embedding=6bit",)),
    "gpt2 transposed": ("gpt2", ("embedding=6bit",)),
    "gpt-oss stacked and transposed": ("gpt-oss", ()),
    "llama4 stacked": ("llama4", ()),
    "qwen3-moe": ("qwen3-moe", ()),
    "bert": ("bert", ()),
    "t5": ("t5", ()),
}


def said(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["event"] == "note")


def specs_of(folder: Path) -> dict[str, dict[str, Any]]:
    return module_specs(json.loads((folder / "config.json").read_text())["quantization_config"])


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, _ = featherweight.load(folder)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    family, changes = FAMILIES[request.param]
    compress(tiny(family), "rtn-8", tmp_path / "once", changes=changes, threads=1)
    return tiny(family), tmp_path / "once"


def test_names_shapes_and_values_are_the_originals(pair: tuple[Path, Path]) -> None:
    original, once = pair
    with Checkpoint.open(original) as plain, open_source(once) as source:
        assert isinstance(source, DecodedCheckpoint)
        assert set(source.names) == set(plain.names)
        assert source.parameters == plain.parameters
        assert source.total_bytes < plain.total_bytes
        assert source.quantization_config is None
        assert source.identity() != plain.identity()
        for name in source.names:
            assert source.entry(name).shape == plain.entry(name).shape, name
            whole, wanted = source.tensor(name), plain.tensor(name).float()
            error = 0.05 if "embed" in name or "wte" in name else 0.01
            assert distance(wanted, whole.float()) < error if float(wanted.norm()) else torch.equal(whole, wanted)
            rows = len(whole)
            for first, last in ((0, 1), (1, rows), (rows, rows), (rows // 2, rows)) if whole.dim() > 1 else ():
                assert torch.equal(source.rows(name, first, last), whole[first:last]), name
            raw = b"".join(bytes(window) for window in source.raw_windows(name, 1000))
            assert raw == whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert len(raw) == source.entry(name).nbytes
            assert not source.differ(name, name)
            source.release(name)


def test_every_compressed_tensor_is_its_code_bit_for_bit(pair: tuple[Path, Path]) -> None:
    _, once = pair
    with Checkpoint.open(once) as coded, open_source(once) as source:
        assert isinstance(source, DecodedCheckpoint)
        seen = 0
        for name in source.compressed:
            for number, module in enumerate(source.codes_of(name)):
                wanted, found = load_code(coded, module).decode(), source.tensor(name)
                found = found[number] if module.endswith(f"[{number}]") else found
                assert torch.equal(found, wanted) or torch.equal(found.t(), wanted)
                seen += 1
        assert seen == len(specs_of(once))


def test_compressing_it_again_works_and_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, once = pair
    events: list[Any] = []
    result = compress(once, "rtn-4", tmp_path / "twice", threads=1, observer=events.append)
    bits = json.loads((once / "featherweight.json").read_text())["bits_per_weight"]
    assert (
        f"{once} is compressed already (recipe rtn-8, {bits:.2f} bits a weight): what is lost adds to what it has lost "
        "before"
    ) in said(events)
    manifest = json.loads((tmp_path / "twice" / "featherweight.json").read_text())
    assert manifest["source"]["recipe"] == "rtn-8"
    errors = {x["name"]: x["relative_error"] for x in json.loads((once / "featherweight.json").read_text())["layers"]}
    assert manifest["source"]["relative_errors"] == errors
    card = (tmp_path / "twice" / "README.md").read_text()
    assert "compressed before (recipe rtn-8," in card
    assert inspect_folder(tmp_path / "twice")["source"] == manifest["source"] == result.source
    assert result.loss_before[0][1].startswith("compressed before (recipe rtn-8,")
    with open_source(once) as source, open_source(tmp_path / "twice") as twice, Checkpoint.open(original) as plain:
        for record in result.layers[:4]:
            name, error, before = f"{record['name']}.weight", record["relative_error"], errors[record["name"]]
            if source.has(name):
                assert distance(source.tensor(name), twice.tensor(name)) == pytest.approx(error, rel=1e-3)
                bound = before + error * (1 + before)
                assert distance(plain.tensor(name).float(), twice.tensor(name)) <= bound * 1.001


def test_the_second_loss_is_that_against_plain_values(llama: Path, tmp_path: Path) -> None:
    """Compressing the folder is compressing a plain checkpoint of what it decodes to."""
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    model, _ = featherweight.load(llama)
    with open_source(tmp_path / "once") as source:
        model.float().load_state_dict({name: source.tensor(name).float().clone() for name in source.names})
    model.save_pretrained(tmp_path / "plain")
    one = compress(tmp_path / "once", "ptqtp", tmp_path / "one", threads=1)
    other = compress(tmp_path / "plain", "ptqtp", tmp_path / "other", threads=1)
    assert [x["relative_error"] for x in one.layers] == [x["relative_error"] for x in other.layers]
    made, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    for name in wanted:
        assert torch.equal(made[name].float(), wanted[name].float()), name


def test_what_the_recipe_leaves_stays_the_code_it_was(tiny: Any, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    compress(tiny("llama", tie_word_embeddings=True), "rtn-8", once, changes=["embedding=6bit"], threads=1)
    result = compress(once, "rtn-4", twice, changes=["layers.skip=[down_proj]"], threads=1)
    before, after = load_file(once / "model.safetensors"), load_file(twice / "model.safetensors")
    kept = [name for name in before if "down_proj" in name or "embed_tokens" in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    specs = specs_of(twice)
    assert specs["model.embed_tokens"] == specs_of(once)["model.embed_tokens"]
    assert specs["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert specs["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert result.fates["copied"] == result.tensors["source"] - len(result.layers)
    assert distance(logits(once, torch.arange(16)[None]), logits(twice, torch.arange(16)[None])) < 0.3


def test_biases_that_the_first_compression_gave_stay(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer=True)
    compress(model, "d2quant", tmp_path / "once", changes=SMALL, threads=1)
    given = {name for name, spec in specs_of(tmp_path / "once").items() if spec.get("bias")}
    others = json.loads((tmp_path / "once" / "config.json").read_text())["quantization_config"].get("biases", [])
    assert given or others
    ids = torch.arange(48).view(2, 24)
    for recipe in ("rtn-8", "gptq"):
        events: list[Any] = []
        out = tmp_path / recipe
        changes = [*SMALL, "grid.bits=8"] if recipe == "gptq" else []
        result = compress(tmp_path / "once", recipe, out, changes=changes, threads=1, observer=events.append)
        assert "does not ask for" not in said(events)
        assert not result.tensors["dropped"]
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert {name for name, spec in module_specs(config).items() if spec.get("bias")} == given
        assert config.get("biases", []) == others
        assert distance(logits(tmp_path / "once", ids), logits(out, ids)) < 0.02


def test_biases_stay_beside_plain_values(tiny: Any, tmp_path: Path) -> None:
    """An output of dense values cannot be an ordinary checkpoint where the class has no place for them."""
    compress(tiny("llama", tokenizer=True), "d2quant", tmp_path / "once", changes=SMALL, threads=1)
    compress(tmp_path / "once", "rtn-8", tmp_path / "dense", changes=["grid={kind: dense, dtype: float32}"], threads=1)
    ids = torch.arange(24)[None]
    assert distance(logits(tmp_path / "once", ids), logits(tmp_path / "dense", ids)) < 1e-3


@pytest.mark.parametrize(("first", "second"), [("quarot-gptq", "rtn-8"), ("rtn-8", "quarot-gptq")])
def test_rotations(tiny: Any, tmp_path: Path, first: str, second: str) -> None:
    """A rotation unties the head and changes embeddings; codes that it changes become plain values, which is said."""
    model = tiny("llama", tie_word_embeddings=True, tokenizer=True)
    changes = {"quarot-gptq": [*SMALL, "grid.bits=8"], "rtn-8": ["embedding=8bit"]}
    compress(model, first, tmp_path / "once", changes=changes[first], threads=1)
    events: list[Any] = []
    changes["rtn-8"] = []
    compress(tmp_path / "once", second, tmp_path / "twice", changes=changes[second], threads=1, observer=events.append)
    if second == "quarot-gptq":
        assert "model.embed_tokens.weight was coded, and calibration changes its values" in said(events)
    ids = torch.arange(24)[None]
    assert distance(logits(tmp_path / "once", ids), logits(tmp_path / "twice", ids)) < 0.05


def test_statistics_of_it(llama: Path, tmp_path: Path) -> None:
    """`calibrate` and a compression with what it gathered; statistics of the original are another model's."""
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    settings = {"sequences": 4, "length": 32}
    events: list[Any] = []
    stats = gather_statistics(
        tmp_path / "once", tmp_path / "stats.safetensors", settings=settings, notify=events.append
    )
    assert "is compressed already" in said(events)
    compress(tmp_path / "once", "gptq", tmp_path / "twice", calibration=stats, threads=1)
    with pytest.raises(featherweight.CalibrationError, match="another model"):
        compress(llama, "gptq", tmp_path / "other", calibration=stats, threads=1)


def test_workers_and_interruptions_see_the_same_source(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    alone = compress(tmp_path / "once", "ptqtp", tmp_path / "alone", threads=1)
    shared = compress(tmp_path / "once", "ptqtp", tmp_path / "shared", threads=2, workers=2)
    assert [x["relative_error"] for x in alone.layers] == [x["relative_error"] for x in shared.layers]
    assert compress(tmp_path / "once", "ptqtp", tmp_path / "alone", threads=1).already_complete
    with open_source(tmp_path / "once") as source, Checkpoint.open(tmp_path / "once") as coded:
        assert source.identity() == coded.identity()
        assert sample_digest(source) == sample_digest(coded)


def test_threads_share_it(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    with open_source(tmp_path / "once") as source:
        assert isinstance(source, DecodedCheckpoint)
        wanted = {name: source.tensor(name).clone() for name in source.compressed}
        wrong: list[str] = []

        def read(offset: int) -> None:
            names = list(wanted)
            for number in range(60):
                name = names[(number * 7 + offset) % len(names)]
                if not torch.equal(source.tensor(name), wanted[name]):
                    wrong.append(name)
                if not torch.equal(source.rows(name, 3, 9), wanted[name][3:9]):
                    wrong.append(name)
                source.release(name)

        threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_plan_counts_what_is_stored(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-8", tmp_path / "once", threads=1)
    with open_source(tmp_path / "once") as source:
        plan = make_plan(source, load_recipe("rtn-4", ["layers.skip=[down_proj]"]))
        assert plan.source_bytes == source.total_bytes
    result = compress(
        tmp_path / "once",
        "rtn-4",
        tmp_path / "twice",
        changes=["layers.skip=[down_proj]"],
        threads=1,
    )
    assert plan.output_bytes == result.bytes
    with Checkpoint.open(llama) as plain:
        unquantised = make_plan(plain, load_recipe("rtn-4"))
    with open_source(tmp_path / "once") as source:
        assert make_plan(source, load_recipe("rtn-4")).memory_bytes() > unquantised.memory_bytes(), "decoding counts"


def test_a_chain_is_kept(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-8", tmp_path / "one", threads=1)
    compress(tmp_path / "one", "rtn-4", tmp_path / "two", threads=1)
    compress(tmp_path / "two", "rtn-3", tmp_path / "three", threads=1)
    source = json.loads((tmp_path / "three" / "featherweight.json").read_text())["source"]
    assert (source["recipe"], source["source"]["recipe"]) == ("rtn-4", "rtn-8")


def test_a_compressed_base_model(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-8", tmp_path / "base", threads=1)
    result: Compression = compress(llama, "quantlrm", tmp_path / "out", base_model=tmp_path / "base", changes=SMALL)
    assert len(result.layers) == 14


def test_damaged_codes_are_one_sentence(llama: Path, tmp_path: Path) -> None:
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    modules = config["quantization_config"]["codes"][0]["modules"]
    modules["model.layers.0.mlp.up_proj"] = [128, 32]
    (tmp_path / "once" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="up_proj|belong together"):
        compress(tmp_path / "once", "rtn-4", tmp_path / "out", threads=1)


def test_convolutions_have_their_kernels_again(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", "rtn-8", tmp_path / "once", threads=1)
    with Checkpoint.open(tmp_path / "model") as plain, open_source(tmp_path / "once") as source:
        assert isinstance(source, DecodedCheckpoint)
        kernels = [name for name in source.compressed if len(source.entry(name).shape) == 4]
        assert len(kernels) == 9
        for name in kernels:
            assert source.entry(name).shape == plain.entry(name).shape
            assert distance(plain.tensor(name), source.tensor(name)) < 0.01
            assert torch.equal(source.rows(name, 2, 5), source.tensor(name)[2:5])
    assert compress(tmp_path / "once", "rtn-4", tmp_path / "twice", threads=1).tensors["replaced"] == 9


def test_divergence_from_a_compressed_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("All that is gold does glitter now and then. " * 12)
    compress(llama, "rtn-4", tmp_path / "once", threads=1)
    compress(tmp_path / "once", "rtn-8", tmp_path / "twice", threads=1)
    settings: dict[str, Any] = {"text": tmp_path / "text.txt", "context": 64}
    near = featherweight.evaluate(tmp_path / "twice", against=tmp_path / "once", **settings)
    far = featherweight.evaluate(tmp_path / "twice", against=llama, **settings)
    assert near.divergence is not None
    assert far.divergence is not None
    assert near.divergence.mean < far.divergence.mean / 4
