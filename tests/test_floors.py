"""The plan of the house: no import goes up or in a circle, and no function or file is too long to read."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "featherweight"
FLOORS = (
    "version",
    "errors",
    "events",
    "plugins",
    "registry",
    "system",
    "pages",
    "native",
    "storage.codes",
    "storage.checkpoint",
    "storage.run",
    "model.products",
    "model.layers",
    "model.text",
    "model.network",
    "model.decoder",
    "methods.calibrate",
    "methods.learn",
    "methods.quantize",
    "methods.budget",
    "methods.recipe",
    "methods.train",
    "integrations",
    "interop",
    "tasks.converse",
    "tasks.compress",
    "tasks.evaluate",
    "tasks.analyse",
    "tasks.report",
    "tasks.fit",
    "cli",
    "__main__",
)
"""From the ground up: a room imports its own modules and those of rooms before it; see docs/architecture.md."""
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 450, 80
MOST_PARAMETERS = 6
"""Beside options, which have a default and are given by name, and `self`."""
COMMANDS = ("cli.main", "cli.more")
"""Its functions have a parameter for each option of a command."""


def name_of(path: Path) -> str:
    """Dotted name inside the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
WINGS = {name.rpartition(".")[0] for name in FLOORS} | {"", "recipes", "assets"}


@functools.cache
def nodes_of(name: str) -> tuple[ast.AST, ...]:
    """All nodes of a module's tree."""
    return tuple(ast.walk(ast.parse(FILES[name].read_text("utf-8"))))


def floor_of(name: str) -> int:
    found = [i for i, floor in enumerate(FLOORS) if name == floor or name.startswith(f"{floor}.")]
    assert found, f"{name} is in no room: give it a floor here and in docs/architecture.md"
    return found[0]


def imports_of(name: str) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports anywhere, in functions and for types too; and the lines."""
    for node in nodes_of(name):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports are written with full names"
            module = node.module or ""
            if module == "featherweight" or module.startswith("featherweight."):
                inner = module.removeprefix("featherweight").lstrip(".")
                for alias in node.names:
                    full = f"{inner}.{alias.name}".lstrip(".")
                    yield (full if full in FILES else inner), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "featherweight":
                    yield alias.name.removeprefix("featherweight").lstrip("."), node.lineno


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_no_import_goes_up(name: str) -> None:
    if name in WINGS:
        assert not list(imports_of(name)), "a wing's own __init__ imports nothing"
        return
    for imported, line in imports_of(name):
        place = f"{FILES[name].relative_to(PACKAGE)}, line {line}"
        assert imported in FILES, f"{place} imports {imported}, which is no module"
        assert imported, f"{place} imports the package as a whole, which is above every room"
        assert floor_of(imported) <= floor_of(name), f"{place} imports {imported}, which is above it"


def test_there_is_no_circle() -> None:
    graph = {name: {found for found, _ in imports_of(name) if found != name} for name in FILES if name}
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, "modules import each other: " + " -> ".join((*path[path.index(name) :], name))
        if name in state or name not in graph:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            visit(other, (*path, name))
        state[name] = 2

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_can_be_read(name: str) -> None:
    text = FILES[name].read_text("utf-8")
    assert text.count("\n") <= MOST_LINES_OF_A_FILE, f"{FILES[name].name} is longer than {MOST_LINES_OF_A_FILE} lines"
    for node in nodes_of(name):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            first = node.body[0]
            told = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - told  # help may be as long as it has to be
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} in {FILES[name].name} has {lines} lines"


@pytest.mark.parametrize("name", [name for name in FILES if name not in COMMANDS])
def test_what_has_many_settings_gets_them_together(name: str) -> None:
    for node in nodes_of(name):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            given = [*node.args.posonlyargs, *node.args.args]
            needed = [
                one for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if not default
            ]
            count = len(given) + len(needed) - (given != [] and given[0].arg in ("self", "cls"))
            assert count <= MOST_PARAMETERS, f"{node.name} in {FILES[name].name} has {count} parameters"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is code for a GPU, which cannot call Python functions of ours."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_the_plan_names_every_room() -> None:
    plan = (PACKAGE.parent.parent / "docs" / "architecture.md").read_text("utf-8")
    for floor in FLOORS:
        assert floor.replace(".", "/") in plan or floor in ("__main__", "version"), (
            f"docs/architecture.md lacks {floor}"
        )
