"""The documents say what the code does: README's lines run, the method page is current, files they name exist."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight
from featherweight.tasks.evaluate import evaluation
from models import make_tiny

ROOT = Path(__file__).resolve().parent.parent


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


def test_the_method_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["methods_page"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
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


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_files_named_in_the_documents_exist(page: str, known_files: set[str]) -> None:
    made = set(re.findall(r"^# (\S+\.\w+)$", (ROOT / page).read_text("utf-8"), re.MULTILINE))  # by the guide's reader
    made |= {Path(name).name for name in made} | {"__init__.py"}
    for name in sorted(named_by(ROOT / page) - made):
        there = any((ROOT / place / name).exists() or (ROOT / place / f"{name}.py").exists() for place in PLACES)
        assert there or ("/" not in name and name in known_files), f"{page} names {name}, which is not there"


def test_rooms_that_open_later_are_not_there() -> None:
    """Once one is, the table has to say so."""
    lines = (ROOT / "docs" / "architecture.md").read_text("utf-8").splitlines()
    rooms = [
        re.findall(r"`((?:methods|interop)/(?:\w+/)?)`", line)[-1] for line in lines if line.endswith(f"{NOT_YET} |")
    ]
    assert len(rooms) == 5
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
