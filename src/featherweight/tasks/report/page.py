"""The report: one HTML file that opens offline, with figures inside, for a model and its compressed variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from featherweight.pages.render import render, style
from featherweight.system.files import disk_errors, replacing
from featherweight.tasks.report import plots
from featherweight.tasks.report.tables import cost_columns, origins, quality_columns, shares, table_of, task_columns
from featherweight.tasks.report.variants import Page, Variant, findings, first_of


def write_report(
    path: str | Path,
    variants: Sequence[Variant | Mapping[str, Any]],
    model: str = "model",
    parameters: int | None = None,
    prompt: str | None = None,
    commands: Sequence[str] = (),
) -> Path:
    """Write the page. `prompt` is what the samples continue, `commands` what made the whole run.

    The same input gives the same bytes. The file is written aside and renamed, so a reader never sees half of it.
    OutputError where it cannot be written.
    """
    page = Page.of(Variant.of(v) for v in variants)
    html = report_html(page, model, parameters, prompt, commands)
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path


def report_html(
    page: Page, model: str, parameters: int | None = None, prompt: str | None = None, commands: Sequence[str] = ()
) -> str:
    """The page as text."""
    subject = page.originals[0] if page.originals else None
    tokens = next((count for v in page.rows if (count := v.number("tokens"))), None)
    return render(
        "report.html.jinja",
        style=style(),
        model=model,
        parameters=first_of(parameters, subject.number("size", "model_weights") if subject else None),
        variants=len(page.variants),
        tokens=tokens,
        findings=findings(page),
        tradeoff=_tradeoff(page),
        quality=table_of(page, quality_columns(page), page.rows),
        tasks=table_of(page, task_columns(page), page.rows),
        control=any(v.number("control_tokens", "kl") is not None for v in page.rows),
        cost=table_of(page, cost_columns(), page.variants),
        origins=origins(page),
        warnings=[(v.name, text) for v in page.rows for text in _warnings_of(v)],
        missing=[(v.name, text) for v in page.rows for text in v.missing],
        shares=_shares(page),
        errors=_errors(page),
        histograms=_histograms(page),
        cards=[_card(page, v) for v in page.rows if v.sample or v.recipe or v.command],
        prompt=prompt,
        protocols=_protocols(page),
        commands="\n".join(commands),
    )


def _series(page: Page, variant: Variant) -> int | None:
    return None if variant.original else page.series(variant)


def _tradeoff(page: Page) -> dict[str, Any] | None:
    points = [
        plots.Point(v.name, v.linear_bits, v.perplexity, page.series(v))
        for v in page.variants
        if v.linear_bits and v.perplexity
    ]
    if not points:
        return None
    wide, narrow = plots.tradeoff(points, page.perplexity), plots.tradeoff(points, page.perplexity, 340, 430)
    return {"wide": wide.svg, "narrow": narrow.svg, "unnamed": wide.unnamed, "unnamed_narrow": narrow.unnamed}


def _warnings_of(variant: Variant) -> list[str]:
    """What was said of its measurement, and of its control tokens."""
    said = variant.evaluation.get("warnings")
    texts = [text for text in said if isinstance(text, str)] if isinstance(said, list | tuple) else []
    found = variant.evaluation.get("control_tokens")
    text = found.get("warning") if isinstance(found, Mapping) else None
    return texts + ([text] if isinstance(text, str) and text not in texts else [])


def _shares(page: Page) -> list[dict[str, Any]]:
    found = [(v, shares(v.layers)) for v in page.variants]
    return [{"name": v.name, "series": page.series(v), "rows": rows} for v, rows in found if rows]


def _errors(page: Page) -> dict[str, Any] | None:
    grids = [(v, grid) for v in page.variants if (grid := plots.error_grid(v.layers))]
    if not grids:
        return None
    limits = plots.error_limits([grid for _, grid in grids])
    maps = [
        {"name": v.name, "series": page.series(v), "note": _means(grid), "svg": plots.error_map(grid, limits)}
        for v, grid in grids
    ]
    return {"least": f"{limits[0]:.2g}", "most": f"{limits[1]:.2g}", "colours": plots.ERROR_COLOURS, "maps": maps}


def _means(grid: plots.ErrorGrid) -> str:
    """The mean of the map, and the errors of layers that stand in no block."""
    return f"mean {grid.mean:.3g}" + "".join(f", {role} {error:.3g}" for role, error in grid.outside)


def _histograms(page: Page) -> list[dict[str, Any]]:
    layers = dict.fromkeys(str(h.get("layer", "")) for v in page.variants for h in v.histograms)
    return [
        {
            "layer": layer,
            "figures": [
                {
                    "name": v.name,
                    "series": page.series(v),
                    "note": _levels_note(h),
                    "svg": plots.histogram(h, page.series(v)),
                }
                for v in page.variants
                for h in v.histograms
                if str(h.get("layer", "")) == layer and h.get("edges") and h.get("counts")
            ],
        }
        for layer in layers
    ]


def _levels_note(data: Mapping[str, Any]) -> str:
    count, error = len(data.get("levels") or ()), data.get("relative_error")
    parts = [f"{count} levels" if count else "more levels than can be drawn"]
    parts += [str(data["basis"])] if data.get("basis") else []
    parts += [f"error {error:.3g}"] if isinstance(error, float) else []
    return ", ".join(parts)


def _card(page: Page, variant: Variant) -> dict[str, Any]:
    recipe = ""
    if variant.recipe:
        recipe = yaml.safe_dump(_plain(variant.recipe), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return {
        "name": variant.name,
        "series": _series(page, variant),
        "sample": variant.sample.strip(),
        "recipe": recipe.strip(),
        "command": variant.command,
    }


def _plain(value: Any) -> Any:
    """Only what YAML can say."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _protocols(page: Page) -> list[tuple[str, str]]:
    """(whose, description) of every protocol; nobody is named where all have the same."""
    sentences: dict[str, list[str]] = {}
    for variant in page.rows:
        description = variant.evaluation.get("description")
        if description:
            sentences.setdefault(str(description), []).append(variant.name)
    return [(", ".join(names) if len(sentences) > 1 else "", text) for text, names in sentences.items()]
