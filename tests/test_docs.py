"""The documents say what the code does: README's lines run, the method page is current, files they name exist."""

from __future__ import annotations

import inspect
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import featherweight
from featherweight.cli.main import main
from featherweight.methods.calibrate.settings import CalibrationSettings
from featherweight.methods.recipe import recipe_from
from featherweight.tasks.evaluate import evaluation, speed
from models import make_chat, make_tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/featherweight/assets/*.md")]
)


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_three_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny("llama", tmp_path / "model", tokenizer=True)
    monkeypatch.chdir(tmp_path)
    text = evaluation.bundled_text()[:5000]
    monkeypatch.setattr(evaluation, "bundled_text", lambda *_: text)
    (block,) = code_blocks("README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 1


MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL")
"""What stands for a model in the pages."""
TOLD = ("pip install", "python3 -m venv", "make ")
"""Commands of another kind: set-up, which CI runs (.github/workflows, .ci/run), and what make does."""


def commands_of(page: str) -> list[list[str]]:
    """The words of every `feather` command in a page's blocks of shell, but for `feather`. No other lines are there."""
    lines = [line for block in code_blocks(page, "sh") for line in block.splitlines() if line.strip()]
    for line in lines:
        assert line.startswith(("feather ", *TOLD)), f"{page}: {line} is run by no test"
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("feather ")]


GUIDE = "docs/adding-a-method.md"
"""Its commands belong to the package that it builds: tests/test_guide.py runs them."""
WITH_COMMANDS = [page for page in PAGES if page != GUIDE and commands_of(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, on a tiny model and a few texts; what a page takes as there is made before."""
    make_chat(tmp_path / "model")
    text = evaluation.bundled_text()[:20_000]
    (tmp_path / "own.txt").write_text(text)
    lines = [json.dumps({"text": text[i : i + 1000]}) for i in range(0, len(text), 1000)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    questions = [
        {"question": "What is frozen water?", "choices": ["ice", "steam"], "answer": 0},
        {"context": "The river was frozen, and they walked over the", "target": "ice"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "bundled_text", lambda *_: text)
    monkeypatch.setattr(speed, "BUFFER_BYTES", 1 << 22)
    first = commands_of(page)[0]
    if first[0] not in ("compress", "plan") and page != "docs/tasks/calibration.md":
        featherweight.compress("model", "rtn-4", "small")
    for words in commands_of(page):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\n"))
        arguments = ["model" if word in MODELS else word for word in words]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *QUICK.get(words[0], ())])
        assert stop.value.code in (0, None), f"{page}: feather {shlex.join(words)}: {capsys.readouterr().err}"


QUICK = {
    "compress": ("--set", "calibration.sequences=8", "calibration.length=64"),
    "calibrate": ("--set", "calibration.sequences=8", "calibration.length=64"),
    "chat": ("--max-tokens", "4"),
    "bench": ("--repeats", "1"),
    "heal": ("--steps", "2", "--length", "32", "--windows", "32", "--limit", "512"),
    "train": ("--steps", "2", "--length", "32", "--batch", "2"),
}
"""What makes a command of the pages quick; it goes through the same code."""


def test_every_asset_has_a_licence() -> None:
    assets = ROOT / "src" / "featherweight" / "assets"
    said = (assets / "LICENSES.md").read_text("utf-8")
    tracked = subprocess.run(
        ["git", "ls-files", str(assets)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    files = {(ROOT / name).relative_to(assets).as_posix() for name in tracked} - {"LICENSES.md", "__init__.py"}
    assert len(files) > 8
    for name in sorted(files):
        assert f"`{name}`" in said, f"{name} has no line in LICENSES.md"


def test_every_page_is_in_the_site() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


def test_the_site_is_built_with_what_the_extra_names() -> None:
    """make docs-site installs these alone: with the extra would come PyTorch."""
    listed = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert listed is not None
    make = (ROOT / "Makefile").read_text("utf-8")
    for requirement in re.findall(r'"([^"]+)"', listed[1]):
        assert f"'{requirement}'" in make


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="other.html">', "leads to no file"),
        ('<a href="#there">', "leads to no heading"),
        ('<script src="https://a.b/c.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="https://a.b/c.css">', "from elsewhere"),
    ],
)
def test_the_check_of_the_site_finds_faults(tmp_path: Path, html: str, fault: str) -> None:
    faults_of = runpy.run_path(str(ROOT / "scripts" / "check_site.py"))["faults_of"]
    (tmp_path / "index.html").write_text('<h1 id="here"></h1><a href="#here"></a><a href="https://a.b">')
    assert faults_of(tmp_path) == []
    (tmp_path / "index.html").write_text(html)
    (found,) = faults_of(tmp_path)
    assert fault in found


GENERATED = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["PAGES"]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == GENERATED[name]()


def cells_of(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: str) -> None:
    """A bar within a cell, |x|, begins another cell unless it is written \\|x\\|."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, *rows = table.splitlines()
        for row in rows:
            assert cells_of(row) == cells_of(head), f"{page}: {row}"


def test_the_recipe_of_the_reference_is_one() -> None:
    (text,) = code_blocks("docs/recipes.md", "yaml")
    recipe = recipe_from({"name": "reference", **yaml.safe_load(text)}, "docs/recipes.md")
    assert recipe.calibrated
    assert len(recipe.overrides) == 2


def test_every_setting_of_a_recipe_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for name in CalibrationSettings.model_fields:
        assert f"| `calibration.{name}` |" in page
    for field in ("layers.include", "layers.skip", "layers.head", "layers.routers", "match", "embedding", "head"):
        assert f"| `{field}` |" in page


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


PLACES = (
    "",
    "src/featherweight",
    "docs",
    "tests",
    "src/featherweight/native/cpp",
    "src/featherweight/storage/checkpoint",
)
"""Where paths in the documents may begin."""
NOT_YET = "opens with its first"
ELSEWHERE = ("llama.cpp", "artifacts/", "claims/", "out/")
"""What only looks like a file of the source: another project, and what is in a run folder."""


def paths_in(text: str) -> set[str]:
    """What looks like a file of the source, or like a folder in it."""
    plain = re.sub(r"https?://\S+|^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    files = re.findall(r"(?<![\w./*<-])((?:[\w.-]+/)*[\w.-]+\.(?:py|h|cpp|yaml|yml|md|toml))\b(?![\w/])", plain)
    folders = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", plain)
    return {*files, *folders}


def named_by(page: Path) -> set[str]:
    """Paths of a page; not those of rooms that it says are not there yet, or of the package that the guide makes."""
    lines = [line for line in page.read_text("utf-8").splitlines() if NOT_YET not in line]
    example = re.compile(r"(^|/)(featherweight-more|featherweight_more|OUT\.feather-run)(/|$)")
    return {path for path in paths_in("\n".join(lines)) if not example.search(path) and not path.startswith(ELSEWHERE)}


@pytest.fixture(scope="module")
def known_files() -> set[str]:
    """Names of all files under version control or beside them."""
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", "scripts", "cmake")]
    return {path.name for folder in folders for path in folder.rglob("*")} | {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_documents_exist(page: str, known_files: set[str]) -> None:
    made = set(re.findall(r"^# (\S+\.\w+)$", (ROOT / page).read_text("utf-8"), re.MULTILINE))  # by the guide's reader
    made |= {Path(name).name for name in made} | {"__init__.py"}
    for name in sorted(named_by(ROOT / page) - made):
        places = [(ROOT / page).parent, *(ROOT / place for place in PLACES)]
        there = any((place / name).exists() or (place / f"{name}.py").exists() for place in places)
        assert there or ("/" not in name and name in known_files), f"{page} names {name}, which is not there"


def test_rooms_that_open_later_are_not_there() -> None:
    """Once one is, the table has to say so."""
    lines = (ROOT / "docs" / "architecture.md").read_text("utf-8").splitlines()
    rooms = [
        re.findall(r"`((?:methods|interop)/(?:\w+/)?)`", line)[-1] for line in lines if line.endswith(f"{NOT_YET} |")
    ]
    assert len(rooms) == 2  # pruning and merging
    for room in rooms:
        assert not (ROOT / "src" / "featherweight" / room).exists(), room


def test_paths_are_recognised() -> None:
    """The pattern above finds what it is for."""
    text = "see `storage/codes/` and (model/a.py), team.h; not https://a.b/c.py nor config.json, `decode()` or *.yaml"
    assert paths_in(text) == {"storage/codes/", "model/a.py", "team.h"}


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("compress", ("Parameters", "Returns", "Raises")),
        ("evaluate", ("Parameters", "Returns", "Raises")),
        ("fit", ("Parameters", "Returns", "Raises")),
        ("load", ("Parameters", "Returns", "Raises")),
        ("quantize", ("Parameters", "Returns", "Raises")),
        ("report", ("Parameters", "Returns", "Raises")),
    ],
)
def test_help_describes_every_parameter(name: str, sections: tuple[str, ...]) -> None:
    function = getattr(featherweight, name)
    text = inspect.getdoc(function) or ""
    for section in sections:
        assert re.search(rf"^{section}\n-+$", text, re.MULTILINE), section
    described = text.partition("Parameters\n")[2].partition("Returns\n---")[0]
    names = set(re.findall(r"^(\w+)(?: : .+)?$", described, re.MULTILINE))
    assert names == set(inspect.signature(function).parameters)


def test_python_m_featherweight_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "featherweight", "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT / "src"
    )
    assert done.returncode == 0, done.stderr
    for command in ("compress", "eval", "generate", "verify", "methods"):
        assert re.search(rf"^\s+{command} ", done.stdout, re.MULTILINE), command
    assert done.stdout.startswith("Usage: feather ") or "Usage: feather " in done.stdout


def test_type_checkers_find_the_types() -> None:
    """py.typed lies in the package and git does not ignore it: the wheel takes the package as git has it."""
    assert (ROOT / "src" / "featherweight" / "py.typed").is_file()
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'wheel.packages = ["src/featherweight"]' in project
    assert "wheel.exclude" not in project
    ignored = subprocess.run(["git", "check-ignore", "-q", "src/featherweight/py.typed"], cwd=ROOT, timeout=60)
    assert ignored.returncode != 0
