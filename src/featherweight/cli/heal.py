"""`feather heal`: settings, progress, and what it came to as a short table."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, error_console, facts, out_console, quiet_transformers, write_json
from featherweight.cli.progress import Watcher
from featherweight.system.units import count_text, size_text, time_text

MINUTES = 15.0


def run_heal(
    small: str,
    against: str,
    out: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    files: tuple[Path | None, Path | None],
) -> None:
    """settings : of `HealSettings`; options : keywords of `heal`; files : for the page, for JSON"""
    from featherweight.tasks.heal.healing import heal
    from featherweight.tasks.heal.settings import HealSettings

    html, json = files
    quiet_transformers()
    claim_json(json, ("steps", "loss_before", "loss_after"))
    if settings["minutes"] is None and settings["steps"] is None:
        settings = {**settings, "minutes": MINUTES}
    with contextlib.ExitStack() as stack:
        watcher = stack.enter_context(Watcher(error_console()))
        result = heal(small, against, out, settings=HealSettings(**settings), observer=watcher, **options)
    write_json(json, result.to_json())
    if html is not None:
        from featherweight.tasks.report.heal_page import write_heal_page

        write_heal_page(html, result.to_json(), Path(small).name)
    show(result)


def show(result: Any) -> None:
    """What was trained, and the scores before and after."""
    losses = [f"{a:.4g} -> {b:.4g}" for a, b in zip(result.loss_before, result.loss_after, strict=True)]
    shown = ", ".join(losses[:3]) + (f", ... ({len(losses)} in all)" if len(losses) > 3 else "")
    rows = [
        ("output", str(result.out)),
        ("size", f"{size_text(result.bytes)}, as before"),
        (
            "trained",
            f"{result.steps} steps, {count_text(result.tokens)} tokens; {100 * result.moved:.1f} % of digits moved",
        ),
        ("held-out loss", shown),
    ]
    if result.before is not None and result.after is not None:
        rows.append(("KL to the original", f"{result.before.kl:.4f} -> {result.after.kl:.4f} nats a token"))
        rows.append(
            (
                "perplexity",
                f"{result.before.perplexity:.3f} -> {result.after.perplexity:.3f} (original "
                f"{result.original_perplexity:.3f})",
            )
        )
    if result.recovered is not None:
        rows.append(("excess recovered", f"{100 * result.recovered:.0f} %"))
    if not result.kept:
        rows.append(("note", "nothing that was trained was better on held-out windows: the output is what was given"))
    rows.append(("time", f"{time_text(result.seconds)}, peak memory {size_text(result.peak_memory_bytes)}"))
    out_console().print(facts(rows))
