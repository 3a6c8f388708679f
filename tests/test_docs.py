"""The documents say what the code does: README's lines run, the method page is current, the guide's example works."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from featherweight.methods.quantize.base import HeldWeight, SolveOptions
from featherweight.registry import registered
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


def test_the_guide_to_a_new_grid_works(tmp_path: Path) -> None:
    block = next(b for b in code_blocks("docs/adding-a-method.md", "python") if "AbsmeanGrid" in b)
    assert "absmean" not in registered("grid")
    path = tmp_path / "absmean.py"
    path.write_text(block)
    from featherweight import registry

    before = {axis: dict(names) for axis, names in registry._entries.items()}
    try:
        grid = runpy.run_path(str(path))["AbsmeanGrid"]()
        weight = torch.randn(6, 300)
        code = grid.quantize_source(HeldWeight(weight), SolveOptions())
        assert code.spec == grid.spec((6, 300))
        first = weight[0, :128]
        assert torch.allclose(code.decode()[0, :128].abs().amax(), first.abs().mean(), rtol=1e-3)
        last = weight[5, 256:]  # the short group's mean is over its own 44 weights
        assert torch.allclose(code.decode()[5, 256:].abs().amax(), last.abs().mean(), rtol=1e-3)
    finally:
        for axis, names in before.items():
            registry._entries[axis].clear()
            registry._entries[axis].update(names)


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_files_named_in_the_documents_exist() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for name in re.findall(
            r"\b((?:scripts|benchmarks|docs|tests)/[\w/]+\.(?:py|md))\b", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / name).exists(), (page.name, name)
