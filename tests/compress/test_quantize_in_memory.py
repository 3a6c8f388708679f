"""`quantize`: models in memory. The oracle is `compress` on the same weights, and what codes decode to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight
from featherweight.errors import CalibrationError, FeatherError, NonFiniteError, RecipeError
from featherweight.methods.recipe import load_recipe
from featherweight.model.layers.modules import CodedModule, FeatherLinear
from featherweight.model.layers.tied import TiedLinear
from models import byte_tokenizer

MakeModel = Callable[..., Path]
TEXT = "".join(f"{number * 7919 % 1000} green bottles hang on the wall, and {number} more. " for number in range(400))
SMALL = ("calibration.sequences=8", "calibration.length=32", "grid.group_size=32")


def plain(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def codes_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: module._parameters[key].detach() for key in module.layout}  # type: ignore[union-attr]
        for name, module in model.named_modules()
        if isinstance(module, CodedModule)
    }


def assert_same_codes(one: nn.Module, other: nn.Module) -> None:
    found, expected = codes_of(one), codes_of(other)
    assert list(found) == list(expected)
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == expected[name][key].dtype
            assert torch.equal(tensor, expected[name][key]), f"{name}.{key}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def source(tiny: MakeModel) -> Path:
    return tiny("llama", dtype=torch.float32, tokenizer=True)


QUICK = {
    "rtn-4": ("grid.group_size=32",),
    "gptq": SMALL,
    "awq": (*SMALL, "transforms=[{kind: awq, points: 4, search_tokens: 256, clip_steps: 4}]"),
    "flexround-3": (*SMALL, "rounding.steps=6"),
}


@pytest.mark.parametrize("preset", QUICK)
def test_codes_are_those_of_compress(preset: str, source: Path, text: Path, tmp_path: Path) -> None:
    changes = QUICK[preset]
    featherweight.compress(source, preset, tmp_path / "out", changes=changes, calibration=text, threads=1)
    model = plain(source)
    returned = featherweight.quantize(
        model, preset, None if preset == "rtn-4" else text, byte_tokenizer(), changes=changes, threads=1
    )
    assert returned is model
    loaded, _ = featherweight.load(tmp_path / "out")
    assert_same_codes(model, loaded)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    for (name, one), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name  # norms and biases that a choice changed are changed here too


def test_it_is_saved_as_compress_would_have_written_it(source: Path, tmp_path: Path) -> None:
    model = featherweight.quantize(plain(source), "rtn-4", threads=1)
    model.save_pretrained(tmp_path / "saved")
    loaded, _ = featherweight.load(tmp_path / "saved")
    assert_same_codes(loaded, model)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.quantization_config.stored["recipe"] == load_recipe("rtn-4").dump()


def test_token_ids_and_lists_of_batches(source: Path) -> None:
    """The same tokens in either form give the same codes, a batch a window."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 256, (8, 32), generator=generator)
    changes = (*SMALL, "calibration.batch_tokens=32")
    one = featherweight.quantize(plain(source), "gptq", ids, changes=changes, threads=1)
    batches = [{"input_ids": row.unsqueeze(0)} for row in ids]
    other = featherweight.quantize(plain(source), "gptq", batches, changes=changes, threads=1)
    assert_same_codes(one, other)
    tokens = torch.arange(24).view(2, 12)
    assert one.config.use_cache is plain(source).config.use_cache
    with torch.no_grad():
        assert one(tokens, use_cache=True).past_key_values is not None


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.down(self.up(x).relu())


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(Mixer(32) for _ in range(2))
        self.head = nn.Linear(32, 3)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        x = self.patch(images) * scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


RECIPE = {
    "grid": {"kind": "uniform", "bits": 4, "group_size": 16},
    "rounding": {"kind": "hessian"},
    "calibration": {"held_out": 0.25, "starved_floor": 8, "starved_tokens": 0.0},
}


def test_any_module_without_data() -> None:
    """Each layer is exchanged for the code that the grid gives its weight; the rest stays the very same object."""
    model = Vision().eval()
    before, bias = copy.deepcopy(model), model.head.bias
    recipe = load_recipe({"grid": RECIPE["grid"], "layers": {"skip": ["patch"]}})
    featherweight.quantize(model, recipe)
    assert type(model.patch) is nn.Linear
    assert model.head.bias is bias
    for name, module in before.named_modules():
        if isinstance(module, nn.Linear) and name != "patch":
            layer = model.get_submodule(name)
            assert isinstance(layer, FeatherLinear)
            assert torch.equal(layer.decode(), recipe.grid.quantize(module.weight.detach()).decode()), name
            module.weight.data = layer.decode()
    images = torch.randn(2, 5, 12)
    assert torch.equal(model(images), before(images))
    assert model.blocks[0].mix.name == "blocks.0.mix"


def test_any_module_with_data() -> None:
    """The output of a calibrated model is nearer to the original's than that of rounding to nearest; layers in front of
    and behind the blocks, which are not run through, are rounded to nearest."""
    torch.manual_seed(1)
    original, told = Vision().eval(), list[dict[str, Any]]()
    mixing = torch.randn(12, 12) @ torch.diag(torch.logspace(0, -2, 12))
    batches = [torch.randn(4, 6, 12) @ mixing for _ in range(12)]
    calibrated, nearest = copy.deepcopy(original), copy.deepcopy(original)
    featherweight.quantize(calibrated, RECIPE, batches, observer=told.append)
    featherweight.quantize(nearest, {"grid": RECIPE["grid"]})
    assert torch.equal(calibrated.head.decode(), nearest.head.decode())
    assert not torch.equal(calibrated.blocks[1].down.decode(), nearest.blocks[1].down.decode())
    calibrated.patch, calibrated.head = nearest.patch, nearest.head = original.patch, original.head
    fresh = [torch.randn(4, 6, 12) @ mixing for _ in range(20)]

    def missed(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((model(x) - original(x)).square().sum()) for x in fresh)

    assert missed(calibrated) < 0.8 * missed(nearest)
    assert any("head is compressed without data: calibration does not run" in str(e.get("text")) for e in told)


def test_a_forward_function_and_blocks() -> None:
    batches = [(torch.randn(4, 6, 12), 0.5) for _ in range(6)]
    one, other = Vision().eval(), Vision().eval()
    other.load_state_dict(one.state_dict())
    featherweight.quantize(one, RECIPE, batches)  # a tuple is handed on as arguments
    featherweight.quantize(other, RECIPE, batches, forward=lambda m, b: m(b[0], scale=b[1]), blocks="blocks")
    assert_same_codes(one, other)
    whole = Vision().eval()
    featherweight.quantize(whole, RECIPE, batches, blocks="")
    assert len(codes_of(whole)) == 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["rtn-4", "gptq"])
def test_embeddings_as_in_compress(preset: str, tied: bool, tiny: MakeModel, text: Path, tmp_path: Path) -> None:
    """One code for both ends where they are tied; saved and loaded again it is the same model."""
    source = tiny("llama", dtype=torch.float32, tokenizer=True, tie_word_embeddings=tied)
    changes = (*QUICK[preset], "embedding={grid: {kind: uniform, bits: 6, group_size: 32}}")
    featherweight.compress(source, preset, tmp_path / "out", changes=changes, calibration=text, threads=1)
    model = plain(source)
    events: list[dict[str, Any]] = []
    featherweight.quantize(
        model, preset, None if preset == "rtn-4" else text, byte_tokenizer(), changes=changes, threads=1,
        observer=events.append,
    )  # fmt: skip
    loaded, _ = featherweight.load(tmp_path / "out", dtype="float32")
    assert_same_codes(model, loaded)
    assert isinstance(model.get_input_embeddings(), CodedModule)
    assert isinstance(model.get_output_embeddings(), TiedLinear) == tied
    model.save_pretrained(tmp_path / "saved")
    again, _ = featherweight.load(tmp_path / "saved", dtype="float32")
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        expected = loaded(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(again(ids).logits, expected)
    plan = next(event for event in events if event["event"] == "plan")
    assert plan["bits_per_weight_outside"] == 6 + (16 + 6) / 32  # scale and zero of a group


def test_an_embedding_that_wants_data_gets_none_and_says_so(source: Path, text: Path) -> None:
    events: list[dict[str, Any]] = []
    model = plain(source)
    changes = (*SMALL, "embedding=same")
    featherweight.quantize(model, "gptq", text, byte_tokenizer(), changes=changes, threads=1, observer=events.append)
    assert isinstance(model.get_input_embeddings(), CodedModule)
    assert [e for e in events if e["event"] == "note" and "without data" in e["text"] and "embed_tokens" in e["text"]]


def test_shared_and_tied_weights() -> None:
    """A matrix that two layers share is compressed once, for both; one that is the embedding's stays."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.one, self.other, self.output = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
            self.other.weight, self.output.weight = self.one.weight, self.embedding.weight
            self.again = self.one

    model = Tied()
    bias = model.other.bias
    notes: list[dict[str, Any]] = []
    featherweight.quantize(model, {"grid": RECIPE["grid"], "embedding": "6bit"}, observer=notes.append)
    assert any("no token embedding that is known" in event.get("text", "") for event in notes)
    assert type(model.output) is nn.Linear
    assert model.output.weight is model.embedding.weight
    assert model.again is model.one
    assert isinstance(model.one, FeatherLinear)
    assert torch.equal(model.one.decode(), model.other.decode())
    assert model.other.bias is bias


def test_attention_of_torch_reads_the_weight_of_its_output_layer() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    dense = copy.deepcopy(model)
    featherweight.quantize(model, {"grid": RECIPE["grid"]})
    assert isinstance(model.out_proj, FeatherLinear)
    dense.out_proj.weight.data = model.out_proj.decode()
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        found, expected = model.train(mode)(x, x, x)[0], dense.train(mode)(x, x, x)[0]
        torch.testing.assert_close(found, expected)


def test_a_single_layer_is_given_back() -> None:
    layer = nn.Linear(16, 8)
    found = featherweight.quantize(layer, {"grid": RECIPE["grid"]})
    assert isinstance(found, FeatherLinear)
    assert found.bias is layer.bias


def test_layers_with_a_forward_of_their_own_stay() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, told = nn.Sequential(nn.Linear(16, 16), Doubled(16, 16)), list[dict[str, Any]]()
    featherweight.quantize(model, {"grid": RECIPE["grid"]}, observer=told.append)
    assert [type(layer) for layer in model] == [FeatherLinear, Doubled]
    assert any(event.get("text") == "1 has a forward function of its own and stays as it is" for event in told)


def bad_weight() -> nn.Module:
    model = Vision()
    model.head.weight.data[1, 2] = torch.nan
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nothing": (lambda: featherweight.quantize(nn.LayerNorm(4), "rtn-4"), FeatherError, "LayerNorm has no linear"),
    "twice": (
        lambda: featherweight.quantize(featherweight.quantize(Vision(), "rtn-4"), "rtn-4"),
        FeatherError,
        "compressed already",
    ),
    "not finite": (
        lambda: featherweight.quantize(bad_weight(), "rtn-4"),
        NonFiniteError,
        r"head is not finite at",
    ),
    "meta": (lambda: featherweight.quantize(Vision().to("meta"), "rtn-4"), FeatherError, "patch is on the meta device"),
    "no data": (lambda: featherweight.quantize(Vision(), RECIPE), CalibrationError, "give calibration= a list"),
    "float ids": (
        lambda: featherweight.quantize(Vision(), RECIPE, torch.randn(4, 8)),
        CalibrationError,
        "expected token ids",
    ),
    "no batches": (lambda: featherweight.quantize(Vision(), RECIPE, []), CalibrationError, "at least one batch"),
    "whole model": (
        lambda: featherweight.quantize(Vision(), "discquant", [torch.randn(2, 12)]),
        RecipeError,
        "treats the whole model at once",
    ),
    "base": (lambda: featherweight.quantize(Vision(), "quantlrm", []), RecipeError, "fine-tuned from"),
    "pattern": (
        lambda: featherweight.quantize(Vision(), {"grid": RECIPE["grid"], "layers": {"skip": ["q_proj"]}}),
        RecipeError,
        "q_proj.* matches no layer",
    ),
    "recipe": (
        lambda: featherweight.quantize(Vision(), {"grids": {}}),
        RecipeError,
        "recipe custom: there is no field grids .did you mean 'grid'",
    ),
    "file": (
        lambda: featherweight.quantize(Vision(), RECIPE, "/nowhere.txt"),
        FeatherError,
        "no calibration file /nowhere.txt",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_said(what: str) -> None:
    call, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        call()


def test_a_mapping_is_a_recipe(source: Path, tmp_path: Path) -> None:
    mapping = load_recipe("rtn-4").dump()
    kept = copy.deepcopy(mapping)
    assert load_recipe(mapping) == load_recipe(load_recipe("rtn-4"))
    assert load_recipe(mapping, ["grid.bits=3"]).dump()["grid"]["bits"] == 3
    assert mapping == kept
    done = featherweight.compress(source, {"grid": {"kind": "uniform", "bits": 3}}, tmp_path / "out")
    assert done.recipe["name"] == "custom"
    assert {layer["spec"]["bits"] for layer in done.layers} == {3}
