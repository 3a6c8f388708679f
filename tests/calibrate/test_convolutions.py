"""Convolutions as layers: their matrices, the inputs of these, codes in their place, and folders of image models."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight
import networks as n
from featherweight.errors import CalibrationError, CheckpointError, NonFiniteError, RecipeError
from featherweight.methods.calibrate.runner import Calibration
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.methods.quantize.grids.uniform import UniformGrid
from featherweight.methods.quantize.rounding.hessian import Hessian
from featherweight.methods.quantize.rounding.nearest import Nearest
from featherweight.methods.recipe import load_recipe
from featherweight.model.layers.coded import CodedConvolution
from featherweight.model.layers.modules import CodedModule
from featherweight.model.layers.replace import put_codes
from featherweight.model.network.unfold import unfolded
from featherweight.storage.checkpoint.anatomy import read_anatomy
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.size import measure_size
from featherweight.storage.checkpoint.weights import LayerWeight
from featherweight.storage.codes import Code
from featherweight.tasks.analyse.verify import verify

KINDS = [
    (nn.Conv1d, {"kernel_size": 3}, (11,)),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2, "groups": 2}, (17,)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}, (7, 9)),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "reflect"}, (8, 6)),
    (nn.Conv2d, {"kernel_size": 4, "padding": "same", "bias": False}, (6, 5)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 4}, (5, 5)),
    (nn.Conv2d, {"kernel_size": 1, "padding": "valid"}, (3, 4)),
    (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": 2, "padding": (1, 1, 0), "padding_mode": "replicate"}, (5, 6, 4)),
]


class Net(nn.Module):
    """Convolutions one behind the other and side by side, one of them in groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).relu()
        x = (self.wide(x) + self.narrow(x)).relu()
        out: Tensor = self.head(self.depthwise(x).mean((2, 3)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(count: int = 8, seed: int = 1) -> list[Tensor]:
    """Neighbouring pixels, and channels, are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, 3, 14, 14, generator=generator).flatten(0, 1)
    smooth = F.avg_pool2d(noise, 3, 1) * 3 + 0.3 * noise[:, :1, 1:-1, 1:-1]
    return list(smooth.split(4))


def forward(module: nn.Module, batch: Tensor) -> Any:
    return module(batch)


@pytest.mark.parametrize(("kind", "settings", "sizes"), KINDS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_convolution_is_a_product_with_unfolded_inputs(
    kind: type[Any], settings: dict[str, Any], sizes: tuple[int, ...], batched: bool
) -> None:
    torch.manual_seed(0)
    module = kind(4, 8, **settings).double()
    inputs = torch.randn(*([3] if batched else []), 4, *sizes, dtype=torch.float64)
    wanted = module(inputs).movedim(-len(sizes) - 1, -1).reshape(-1, 8)
    rows = unfolded(module, inputs)
    weights, parts = module.weight.flatten(1).chunk(module.groups), rows.chunk(module.groups, 1)
    found = torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)], 1)
    torch.testing.assert_close(found + (0 if module.bias is None else module.bias), wanted)


def test_statistics_of_convolutions() -> None:
    """Against torch's own unfolding, of what the layers before computed."""
    module, batches = net(), images()
    with torch.no_grad():
        pixels = torch.cat(batches)
        hidden = module.stem(pixels).relu()
    wanted = {"stem": F.unfold(pixels, 3, padding=1), "wide": F.unfold(hidden, 3, padding=1)}
    wanted["narrow"] = hidden.flatten(2)
    told: list[Any] = []
    options = {"convolutions": True, "notify": told.append}
    with Calibration.of_module(module, forward, batches, n.SMALL, ("gram", "mean"), **options) as calibration:
        (session,) = list(calibration.blocks())
        assert session.names == ["stem", "wide", "narrow", "depthwise", "head"]
        assert session.groups == [[name] for name in session.names]  # wide and narrow unfold the same input otherwise
        assert session.layers["wide"].shape == (8, 108)
        assert (session.layers["wide"].kernel, session.layers["depthwise"].groups) == ((3, 3), 8)
        found = session.gather(session.names, ("gram", "mean"))
        assert torch.equal(session.weight("wide"), module.wide.weight.detach().flatten(1))
    for name, columns in wanted.items():
        rows = columns.transpose(1, 2).flatten(0, 1)
        assert int(found[name]["tokens"]) == len(rows) == 32 * 144
        assert n.close(found[name]["gram"], n.gram(rows)), name
        assert n.close(found[name]["mean"], rows.mean(0), 1e-4), name
    assert list(found["depthwise"]) == ["tokens"]
    assert session.starved == {"depthwise": 0}
    unmeasured = [event for event in told if event["event"] == "unmeasured"]
    assert [event["layer"] for event in unmeasured] == ["depthwise"]
    assert "in 8 groups with inputs of their own" in unmeasured[0]["reason"]


def test_weights_of_convolutions_are_put_back() -> None:
    module, batches = net().to(memory_format=torch.channels_last), images()
    with Calibration.of_module(
        module, forward, batches, n.SMALL, ("fisher", "cross"), convolutions=True
    ) as calibration:
        (session,) = list(calibration.blocks())
        assert calibration.fisher("wide").shape == (8, 108)
        assert float(calibration.fisher("wide").min()) >= 0
        before, half = session.run(batches[0], 0), session.weight("wide") * 0.5
        with session.overridden({"wide": half.requires_grad_()}):
            session.run(batches[0], 0).sum().backward()  # type: ignore[no-untyped-call]
        assert half.grad is not None
        assert float(half.grad.abs().max()) > 0
        assert torch.equal(session.run(batches[0], 0), before)
        session.set_weight("wide", half)
        assert not torch.equal(session.run(batches[0], 0), before)
        moved = session.gather(["depthwise", "head"], ("cross",))
        assert float(moved["head"]["cross"].abs().max()) > 0
    assert torch.equal(module.wide.weight.flatten(1), half)


def solved(module: nn.Module, batches: list[Tensor], rounding: Any, **grid: Any) -> dict[str, Code]:
    """Codes of all layers, one after the other; without statistics where a layer has none."""
    codes: dict[str, Code] = {}
    twin = copy.deepcopy(module)
    with Calibration.of_module(twin, forward, batches, n.SMALL, ("gram",), convolutions=True) as calibration:
        for session in calibration.blocks():
            for stage in session.stages:
                statistics = session.gather(stage, ("gram",))
                for name in stage:
                    own = Nearest() if name in session.starved else rounding
                    source = HeldWeight(session.weight(name))
                    codes[name] = own.quantize_source(source, UniformGrid(**grid), statistics[name], SolveOptions())
                    session.set_weight(name, codes[name].decode())
    return codes


def codes_in(module: nn.Module) -> dict[str, CodedModule]:
    return {name: found for name, found in module.named_modules() if isinstance(found, CodedModule)}


def with_decoded(module: nn.Module, codes: Mapping[str, Code | CodedModule]) -> nn.Module:
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name, code in codes.items():
            weight = plain.get_parameter(f"{name}.weight")
            weight.copy_(code.decode().view(weight.shape))
    return plain


def output_error(module: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        wanted, found = (torch.cat([one(batch) for batch in batches]) for one in (module, other))
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_a_sweep_over_convolutions_serves_outputs_better() -> None:
    """GPTQ's sweep with statistics of unfolded inputs, against rounding to nearest on the same grid, on new images."""
    module, batches = net(), images(16)
    errors = {}
    for name, rounding in (("nearest", Nearest()), ("sweep", Hessian())):
        codes = solved(module, batches, rounding, bits=3, group_size=32, clip="minmax")
        coded = copy.deepcopy(module)
        put_codes(coded, codes)
        plain = with_decoded(module, codes)
        for batch in images(2, seed=5):
            with torch.no_grad():
                assert torch.equal(coded(batch), plain(batch))
        errors[name] = output_error(module, coded, images(4, seed=9))
    assert errors["sweep"] < 0.7 * errors["nearest"]
    assert errors["nearest"] < 0.2


@pytest.mark.parametrize("recipe", ["rtn-4", "ptqtp"])
def test_convolutions_of_every_shape_compute_with_their_decoded_weights(recipe: str) -> None:
    chosen = load_recipe(recipe)
    for kind, settings, sizes in KINDS:
        torch.manual_seed(0)
        holder = nn.Sequential(kind(4, 8, **settings))
        matrix = holder[0].weight.detach().flatten(1).float()
        code = chosen.rounding.quantize_source(HeldWeight(matrix), chosen.grid, {}, SolveOptions())
        plain = with_decoded(holder, {"0": code})
        put_codes(holder, {"0": code})
        held = holder[0]
        assert isinstance(held, CodedConvolution)
        assert isinstance(held, kind)
        assert torch.equal(held.decode(), code.decode())
        assert held.weight.shape == plain[0].weight.shape
        assert "weight" not in dict(held.named_parameters())
        inputs = torch.randn(2, 4, *sizes)
        with torch.no_grad():
            assert torch.equal(holder(inputs), plain(inputs))
            assert holder.to(torch.float64)(inputs.double()).dtype == torch.float64
        again = nn.Sequential(kind(4, 8, **settings))
        put_codes(again, {"0": code})
        again.load_state_dict(holder.float().state_dict())
        assert torch.equal(again[0].decode(), code.decode())


def test_codes_of_linear_layers_and_embeddings_in_memory() -> None:
    holder = nn.ModuleDict({"embedding": nn.Embedding(9, 16), "linear": nn.Linear(16, 4)})
    codes = {k: UniformGrid(bits=4).quantize(holder[k].weight.detach()) for k in holder}  # type: ignore[arg-type]
    bias = holder["linear"].bias
    put_codes(holder, codes)
    assert all(isinstance(module, CodedModule) for module in holder.values())
    x = holder["embedding"](torch.tensor([3, 1]))
    assert torch.equal(x, codes["embedding"].decode()[[3, 1]])
    assert torch.equal(holder["linear"](x), F.linear(x, codes["linear"].decode(), bias))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["gptq-3", "gptq-3-actorder", "squeezellm-4", "rtn-4"])
def test_recipes_for_networks_in_memory(recipe: str) -> None:
    """By a preset; what the module computes with its codes is what it computes with the decoded weights."""
    module, batches, told = net(), images(8), list[Any]()
    before = copy.deepcopy(module)
    changes = ("calibration.starved_tokens=0", "calibration.starved_floor=1")
    found = featherweight.quantize(module, recipe, batches, changes=changes, convolutions=True, observer=told.append)
    assert found is module
    codes = codes_in(module)
    solved = {event["name"]: event for event in told if event["event"] == "layer"}
    assert list(codes) == ["stem", "wide", "narrow", "depthwise", "head"] == list(solved)
    if recipe == "gptq-3":
        assert "held_out_error" in solved["wide"]
        assert solved["depthwise"]["fallback"] == "data-free"
    plain = with_decoded(before, codes)
    wanted = output_error(before, plain, images(4, seed=9))
    with torch.no_grad():
        assert all(torch.equal(module(batch), plain(batch)) for batch in images(2, seed=5))
    assert 0 < wanted < 0.2


def test_recipes_that_see_more_than_a_layer_are_refused() -> None:
    with pytest.raises(RecipeError, match="treats a block at a time .*awq"):
        featherweight.quantize(net(), "awq", images(2), convolutions=True)
    with pytest.raises(RecipeError, match="rounds inputs, which the convolution"):
        featherweight.quantize(net(), "flexq", images(2), convolutions=True)
    with pytest.raises(CalibrationError, match="held-out statistics are wanted"):
        featherweight.quantize(net(), "gptq", images(1), convolutions=True)
    with pytest.raises(CalibrationError, match="give calibration= a list of batches"):
        featherweight.quantize(net(), "gptq", convolutions=True)


def test_what_cannot_be_put_anywhere() -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3))
    code = UniformGrid(bits=4).quantize(torch.randn(4, 18))
    for path, why in (
        ("1", "no module '1' with a weight"),
        ("2", "no module '2'"),
        ("nowhere", "'nowhere'"),
        ("", "''"),
    ):
        with pytest.raises(CheckpointError, match=why):
            put_codes(module, {"0": code, path: code})
    with pytest.raises(CheckpointError, match=r"\[4, 17\], and the module's is \[4, 18\]"):
        put_codes(module, {"0": UniformGrid(bits=4).quantize(torch.randn(4, 17))})
    rounded = load_recipe("flexq").transforms
    wrapped = next(t for t in rounded if t.kind == "quantize-inputs").for_layer(torch.randn(4, 18), {}, 0, "conv")
    with pytest.raises(CheckpointError, match="'0' asks for rounded inputs"):
        put_codes(module, {"0": wrapped.wrap(code)})
    assert type(module[0]) is nn.Conv2d
    compressed = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    put_codes(compressed, {"0": code})
    with Calibration.of_module(compressed, forward, [torch.randn(1, 2, 5, 5)], n.SMALL, convolutions=True) as found:
        assert list(found.host.layers) == ["2"]
    with pytest.raises(CalibrationError, match="no linear layers.*convolutions=True"):
        Calibration.of_module(module, forward, [torch.randn(1, 2, 5, 5)], n.SMALL)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], num_labels=4)
    model = ResNetForImageClassification(config)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.add_(0.2 * torch.rand(value.shape))
    folder = tmp_path_factory.mktemp("resnet") / "model"
    model.save_pretrained(folder)
    return folder


def test_anatomy_of_a_resnet(resnet: Path) -> None:
    with Checkpoint.open(resnet) as checkpoint:
        found = read_anatomy(checkpoint)
        assert (found.family, found.blocks) == ("resnet", 3)
        assert sorted(found.tensors) == sorted(checkpoint.names)
        assert found.head is not None
        assert (found.head.name, found.head.shape) == ("classifier.1", (4, 32))
        assert {layer.kind for layer in found.layers} == {"convolution"}
        for layer in found.layers:
            stored = checkpoint.tensor(layer.tensor)
            assert layer.kernel == stored.shape[2:]
            assert layer.shape == (len(stored), stored[0].numel())
            source = LayerWeight(checkpoint, layer)
            source.scan(3)
            assert torch.equal(source.rows(1, 4), stored.flatten(1)[1:4])
            assert source.largest == float(stored.abs().max())
        assert [name for name in found.others if not name.endswith("num_batches_tracked")] == [
            "resnet.embedder.embedder.convolution.weight"
        ]


def test_where_a_kernel_is_not_finite(resnet: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(resnet / "model.safetensors")
    name = next(n for n, value in tensors.items() if value.shape == (8, 8, 3, 3))
    tensors[name][7, 5, 2, 1] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((resnet / "config.json").read_bytes())
    with Checkpoint.open(tmp_path) as checkpoint:
        layer = next(layer for layer in read_anatomy(checkpoint).layers if layer.tensor == name)
        with pytest.raises(NonFiniteError, match=r"nan at index \[7, 5, 2, 1\]"):
            LayerWeight(checkpoint, layer).scan(4)


@pytest.mark.parametrize("recipe", ["rtn-4", "ptqtp"])
def test_a_compressed_resnet_computes_with_its_decoded_weights(recipe: str, resnet: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    out = tmp_path / "out"
    featherweight.compress(resnet, recipe, out)
    assert verify(out).problems == []
    coded = AutoModelForImageClassification.from_pretrained(out).eval()
    plain = AutoModelForImageClassification.from_pretrained(resnet).eval()
    held = codes_in(coded)
    assert len(held) == 3 * 3 + 2
    before = {name: plain.get_parameter(f"{name}.weight").detach().clone() for name in held}
    with torch.no_grad():
        for name, module in held.items():
            plain.get_parameter(f"{name}.weight").copy_(module.decode().view(before[name].shape))
        pixels = torch.randn(2, 3, 32, 32)
        assert torch.equal(coded(pixels).logits, plain(pixels).logits)
        for name, weight in before.items():
            missed = (plain.get_parameter(f"{name}.weight") - weight).norm() / weight.norm()
            assert 0 < float(missed) < 0.25
    coded.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, coded(pixels).logits)
    size = measure_size(out)
    weights = sum(weight.numel() for weight in before.values())
    assert size.linear_weights == weights
    assert size.linear_bytes == sum(t.numel() * t.element_size() for m in held.values() for t in m.parameters())
    specs = json.loads((out / "config.json").read_text())["quantization_config"]["codes"]
    assert all(len(shape) == 2 for entry in specs for shape in entry["modules"].values())


def test_a_resnet_in_memory_is_calibrated_with_images(resnet: Path, tmp_path: Path) -> None:
    """The layers that a folder has, by a sweep with statistics of images, against the same grid without them."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(resnet).eval()
    pixels = F.avg_pool2d(torch.randn(24, 3, 68, 68, generator=torch.Generator().manual_seed(2)), 5, 2) * 4
    batches = list(pixels.split(4))
    logits = {"float": torch.cat([model(batch).logits for batch in batches[4:]]).detach()}
    for recipe in ("gptq-3", "rtn-3"):
        coded, settings = copy.deepcopy(model), load_recipe(recipe, ("calibration.starved_tokens=0",))
        featherweight.quantize(coded, settings, batches[:4], convolutions=True, forward=lambda m, b: m(b).logits)
        assert len(codes_in(coded)) == 3 * 3 + 2
        with torch.no_grad():
            logits[recipe] = torch.cat([coded(batch).logits for batch in batches[4:]])
            coded.save_pretrained(tmp_path / recipe)
            again = AutoModelForImageClassification.from_pretrained(tmp_path / recipe).eval()
            assert torch.equal(again(pixels).logits, coded(pixels).logits)
    errors = {name: float((value - logits["float"]).norm()) for name, value in logits.items()}
    assert 0 < errors["gptq-3"] < errors["rtn-3"]


@pytest.mark.parametrize(("recipe", "why"), [("gptq", "is calibrated with text"), ("flexq", "rounds inputs")])
def test_recipes_that_convolutions_cannot_follow(recipe: str, why: str, resnet: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words " * 500)
    with pytest.raises(RecipeError, match=why):
        featherweight.compress(resnet, recipe, tmp_path / "out", calibration=text)
