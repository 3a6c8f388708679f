"""`feather stack`, and `--size` of the commands that take a stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, error_console, facts, note, out_console, write_json
from featherweight.cli.progress import Watcher
from featherweight.system.units import size_text, time_text


@dataclass(frozen=True)
class StackOptions:
    """Fields of `StackSettings`."""

    recipe: str
    changes: list[str]
    blocks: int
    rank: int | None
    order: str
    tokens: int
    seed: int


def sized(model: str, size: str | None) -> str:
    """The model that a command is to take: with a size, the folder that the stack's prefix is."""
    if size is None:
        return model
    from featherweight.storage.checkpoint.resolve import resolve
    from featherweight.storage.stack.writing import sized_folder

    folder, blocks = sized_folder(resolve(model).folder, size)
    note(f"{blocks} blocks of {model} fit into {size}")
    return str(folder)


def run_stack(model: str, out: Path, options: StackOptions, given: Mapping[str, Any], json: Path | None) -> None:
    from featherweight.tasks.stack.stacking import StackSettings, stack

    claim_json(json, ("least", "most", "blocks"))
    settings = StackSettings(**{**vars(options), "changes": tuple(options.changes)})
    with Watcher(error_console()) as watcher:
        result = stack(model, out, settings=settings, observer=watcher, **given)
    write_json(json, result.to_json())
    _show(result, f"{result.blocks} beyond the first of {result.layers} layers, {result.order} order")


def run_cut(folder: str, out: Path, size: str, json: Path | None) -> None:
    from featherweight.storage.checkpoint.resolve import resolve
    from featherweight.tasks.stack.stacking import cut_stack

    claim_json(json, ("least", "most", "blocks"))
    result = cut_stack(resolve(folder).folder, out, size)
    write_json(json, result.to_json())
    _show(result, f"{result.blocks} beyond the first of {result.layers} layers")


def _show(result: Any, blocks: str) -> None:
    sizes = f"{size_text(result.least)} to {size_text(result.most)}"
    rows = [("output", str(result.out)), ("size", size_text(result.bytes)), ("blocks", blocks), ("models", sizes)]
    out_console().print(facts([*rows, ("time", time_text(result.seconds))]))
