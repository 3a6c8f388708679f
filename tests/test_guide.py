"""docs/adding-a-method.md, word by word: its package is written down, installed, and used as the page says.

Every block whose first line is a comment with a path is that file. The commands and the lines of Python run in fresh
processes that find the package as an installed distribution; the package is in no place that featherweight knows.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
import yaml

import featherweight
from featherweight.methods.recipe import presets
from featherweight.registry import PACKAGES, registered
from models import make_tiny

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
QUICK = {
    "compress": ["--set", "calibration.sequences=8", "--set", "calibration.length=32"],
    "eval": ["--limit", "400"],
}
"""What the test adds to the page's commands, so that little text is run."""
RUN = """
import json, sys
from featherweight.cli.main import main
for line in json.loads(sys.argv[1]):
    print("$", *line, flush=True)
    try:
        main(line)
    except SystemExit as stop:
        if stop.code:
            raise
"""


def files_of_the_page() -> dict[str, str]:
    found = [(re.match(r"# (\S+\.\w+)\n", text), text) for _, text in BLOCKS]
    return {match[1]: text for match, text in found if match}


def lines_of(language: str) -> list[str]:
    """Lines of the blocks that are not files."""
    return [
        line
        for tongue, text in BLOCKS
        if tongue == language and not text.startswith("# ")
        for line in text.splitlines()
        if line
    ]


class Package:
    """The page's package: `project` as written, `site` what an installer would leave of it."""

    def __init__(self, folder: Path) -> None:
        self.project, self.site = folder / "featherweight-more", folder / "site"
        for name, text in files_of_the_page().items():
            path = self.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        (self.project / "src" / "featherweight_more" / "__init__.py").touch()
        project = tomllib.loads((self.project / "pyproject.toml").read_text("utf-8"))["project"]
        info = self.site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir(parents=True)
        named = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(named, "utf-8")
        groups = project["entry-points"].items()
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups]
        (info / "entry_points.txt").write_text("\n".join(lines), "utf-8")

    def python(self, *arguments: str, cwd: Path, installed: bool = True) -> subprocess.CompletedProcess[str]:
        """A fresh interpreter, with or without the package."""
        places = [str(Path(featherweight.__file__).parents[1])]
        places += [str(self.site), str(self.project / "src")] if installed else []
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "COLUMNS": "300"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
        )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("outside"))


@pytest.fixture(scope="module")
def used(package: Package, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the page's commands have run, and what they printed."""
    folder = tmp_path_factory.mktemp("used")
    make_tiny("llama", folder / "model", torch.float32, tokenizer=True, num_hidden_layers=3)
    commands = [shlex.split(line)[1:] for line in lines_of("sh") if line.startswith("feather ")]
    commands = [[*command, *QUICK.get(command[0], [])] for command in commands]
    done = package.python("-c", RUN, json.dumps(commands), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    return folder, done.stdout


def test_the_page_has_an_example_of_everything() -> None:
    text = "\n".join(files_of_the_page().values())
    assert {axis for axis, _ in re.findall(r'^@register\("(\w+)", "(\S+)"\)', text, re.MULTILINE)} == set(PACKAGES)
    assert sum(name.endswith(".yaml") for name in files_of_the_page()) >= 2


def test_its_names_are_not_ours() -> None:
    """A name that is ours would shadow what the page makes, and the page would show nothing."""
    text = "\n".join(files_of_the_page().values())
    for axis, name in re.findall(r'^@register\("(\w+)", "(\S+)"\)', text, re.MULTILINE):
        assert name not in registered(axis), (axis, name)
    for path in files_of_the_page():
        assert not (path.endswith(".yaml") and Path(path).stem in presets()), path


def test_the_tree_of_the_package_is_what_the_blocks_make(package: Package) -> None:
    (tree,) = re.findall(r"^    featherweight-more/\n((?:        .*\n)+)", PAGE, re.MULTILINE)
    named = set(re.findall(r"(\S+\.\w+)(?=\s|$)", re.sub(r"#.*", "", tree)))
    assert named == {path.name for path in package.project.rglob("*") if path.is_file()}


def test_the_code_is_as_ours_is_written(package: Package) -> None:
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = package.python("-m", "ruff", "check", *settings, "--ignore", "I", ".", cwd=package.project)
    assert done.returncode == 0, done.stdout


def test_methods_says_where_they_come_from(used: tuple[Path, str]) -> None:
    _, output = used
    listed = output.partition("$ methods")[2].partition("\n$ ")[0]
    (row,) = re.findall(r"^nf4 .*$", listed, re.MULTILINE)
    assert "featherweight-more 0.1.0" in row
    assert re.search(r"^gptq +featherweight ", listed, re.MULTILINE)
    added = listed.partition("choices from other packages")[2]
    for choice in ("code normal-float", "grid normal-float", "rounding quantease", "statistic max_abs"):
        assert re.search(rf"{choice} +featherweight-more 0\.1\.0", added), choice


def quantiles() -> list[float]:
    """NF4's levels by their definition, from the standard library."""
    normal, tail = NormalDist(), 0.9677083
    positive = [normal.inv_cdf(tail + (0.5 - tail) * i / 8) for i in range(8)]
    negative = [-normal.inv_cdf(tail + (0.5 - tail) * i / 7) for i in range(7)]
    return sorted(value / positive[0] for value in (*positive, *negative, 0.0))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Groups of 64 columns to the nearest quantile times the largest |w|, rounded to float16."""
    groups = weight.reshape(weight.shape[0], -1, 64)
    levels = groups.abs().amax(-1, keepdim=True).half().double().unsqueeze(-1) * torch.tensor(quantiles()).double()
    best = (groups.double().unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
    return levels.expand(*groups.shape, 16).gather(-1, best).reshape(weight.shape).to(weight.dtype)


def test_an_nf4_grid_from_an_outside_package(used: tuple[Path, str], package: Package) -> None:
    """The model that the page loads computes what the original does with weights rounded here, by other means."""
    from transformers import AutoModelForCausalLM

    folder, _ = used
    logits = "\n".join(
        [
            *lines_of("python"),
            "import torch",
            'exact, _ = featherweight.load("small", dtype="float32")',
            "ids = torch.arange(40).reshape(2, 20)",
            "with torch.no_grad():",
            '    torch.save({"said": model(ids).logits, "exact": exact(ids).logits}, "logits.pt")',
        ]
    )
    done = package.python("-c", logits, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "logits.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        plain = model(torch.arange(40).reshape(2, 20)).logits
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(module.weight))
        expected = model(torch.arange(40).reshape(2, 20)).logits
    assert torch.allclose(found["exact"], expected, atol=1e-4)
    assert torch.equal(found["said"], found["exact"])  # the model is float32 as it is stored
    assert not torch.allclose(plain, expected, atol=1e-3)


def codes_of(folder: Path) -> dict[str, Any]:
    """Module -> spec of its code."""
    config = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return {module: entry["code"] for entry in config["codes"] for module in entry["modules"]}


def test_nf4_takes_its_bits(used: tuple[Path, str]) -> None:
    """Four bits a weight and 16 for each 64: 4.25."""
    report = json.loads((used[0] / "small" / "featherweight.json").read_text("utf-8"))
    assert {layer["bits_per_weight"] for layer in report["layers"]} == {4.25}
    assert {code["kind"] for code in codes_of(used[0] / "small").values()} == {"normal-float"}


def test_all_choices_together(used: tuple[Path, str]) -> None:
    kinds = json.dumps(list(codes_of(used[0] / "smooth").values()))
    for kind in ("column-scaled", "sum", "low-rank", "normal-float"):
        assert f'"kind": "{kind}"' in kinds, kind


def test_more_bits_where_the_rule_says(used: tuple[Path, str]) -> None:
    """Three blocks: no first eighth, the last eighth begins at block 2, which is every third one as well."""
    for module, code in codes_of(used[0] / "mixed").items():
        more = module.startswith("model.layers.2.") and module.endswith(("v_proj", "down_proj"))
        assert code["bits"] == (6 if more else 4), module


def test_the_tests_of_the_page_pass(package: Package) -> None:
    done = package.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=package.project)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b9 passed", done.stdout), done.stdout


def test_its_grid_goes_through_our_roundings_and_transforms(package: Package) -> None:
    """The sweep, the page's coordinate descent, and both under a rotation, leave less of the output than rounding."""
    script = """
import torch
import featherweight_more.plugin
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.registry import find
generator = torch.Generator().manual_seed(0)
mix = torch.randn(96, 96, generator=generator) / 10 + torch.eye(96)
x, w = torch.randn(500, 96, generator=generator) @ mix, torch.randn(32, 96, generator=generator) * 0.02
grid, gram = find("grid", "normal-float")(group_size=32), x.T @ x / 500
cost = lambda code: float(torch.einsum("ij,jk,ik->", w - code.decode(), gram, w - code.decode()))
nearest = cost(grid.quantize(w))
rotation = find("transform", "hadamard")(block=32).for_layer(w, {}, 1)
for kind in ("hessian", "quantease"):
    rounding = find("rounding", kind)()
    assert cost(rounding.quantize_source(HeldWeight(w), grid, {"gram": gram}, SolveOptions())) < 0.8 * nearest, kind
    moved = rotation.statistics({"gram": gram})
    code = rounding.quantize_source(HeldWeight(rotation.apply(w)), grid, moved, SolveOptions())
    assert cost(rotation.wrap(code)) < 0.8 * nearest, kind
"""
    done = package.python("-c", script, cwd=package.project)
    assert done.returncode == 0, done.stderr


def test_coordinate_descent_against_all_roundings(package: Package) -> None:
    """Four levels, five columns: no single change is better, and it is nearer to the best of all 1024 than rounding."""
    script = """
import itertools, torch
import featherweight_more.plugin
from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.registry import find
grid, rounding = find("grid", "uniform")(bits=2, group_size=5), find("rounding", "quantease")(passes=20)
excess = []
for seed in range(12):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(20, 5, generator=generator), torch.randn(1, 5, generator=generator)
    gram = x.T @ x / 20
    cost = lambda q: float((w - q) @ gram @ (w - q).T)
    found = rounding.quantize_source(HeldWeight(w), grid, {"gram": gram}, SolveOptions()).decode()
    levels = grid.levels(grid.fit(w))[0, 0].tolist()
    every = [torch.tensor([choice]) for choice in itertools.product(levels, repeat=5)]
    neighbours = [q for q in every if int((q != found).sum()) == 1]
    assert len(neighbours) == 15
    assert cost(found) <= min(map(cost, neighbours)) + 1e-6
    nearest = grid.quantize(w).decode()
    excess.append((cost(found) / min(map(cost, every)), cost(nearest) / min(map(cost, every))))
found, nearest = (sum(column) / len(excess) for column in zip(*excess))
assert found < nearest, (found, nearest)
"""
    done = package.python("-c", script, cwd=package.project)
    assert done.returncode == 0, done.stderr


def test_without_the_package_its_code_is_named(used: tuple[Path, str], package: Package) -> None:
    """`verify` still compares hashes; `plan` does not know the preset; loading says what is missing and what to do."""
    script = """
import sys
from featherweight.cli.main import main
for line in (["verify", "small"], ["plan", "model", "--recipe", "nf4"]):
    try:
        main(line)
    except SystemExit as stop:
        print("code", stop.code, file=sys.stderr)
"""
    done = package.python("-c", script + "\n".join(lines_of("python")), cwd=used[0], installed=False)
    assert done.returncode == 1
    verified, planned, loaded = done.stderr.split("code 1\n")
    assert "'normal-float'" in verified
    assert re.search(r"all \d+ hashes match, .* or install that package$", verified.splitlines()[-1])
    assert "there is no recipe called 'nf4'" in planned.splitlines()[-1]
    assert re.match(r"featherweight\.\S*(CheckpointError|UnknownCodeError): ", loaded.splitlines()[-1])
    assert "'normal-float'" in loaded.splitlines()[-1]
    assert "install the package that adds it" in loaded.splitlines()[-1]


def test_presets_of_the_page_are_read_as_ours_are(package: Package) -> None:
    for path in package.project.rglob("*.yaml"):
        assert {"title", "paper", "grid"} <= yaml.safe_load(path.read_text("utf-8")).keys(), path
