"""`feather plan` without a recipe and `feather recommend`: presets side by side, and the one that suits."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.cli.console import claim_json, facts, note, out_console, say, steps, write_json
from featherweight.system.units import parse_size, size_text, time_text

if TYPE_CHECKING:
    from featherweight.cli.commands import PlanOptions
    from featherweight.tasks.compress.presets import Offer, Quality

FITS = 8 * 10**9
"""Bytes of memory of an ordinary small machine, which tables name."""
LEAST = 10**6
"""Bytes below which a number without a unit cannot be meant."""
PRETRAINED, BUNDLED = "SmolLM2", "bundled"
"""Columns of what presets cost on the two models that they were measured on."""


def run_choice(model: str, options: PlanOptions, json: Path | None) -> None:
    """A dozen presets for a model, a row each.

    Raises FeatherError where an option was given that says something of one recipe.
    """
    from featherweight.errors import FeatherError
    from featherweight.system.memory import available_bytes

    for name, value in (("--set", options.changes), ("--max-device-memory", options.max_device_memory)):
        if value:
            given = value if isinstance(value, str) else " ".join(value)
            raise FeatherError(f"{name} {given} is about one recipe: name it with --recipe")
    claim_json(json, ("model", "presets"))
    found = _offers(model, options.threads, options.trust_remote_code, timed=True)
    write_json(json, {"model": model, "free_memory_bytes": available_bytes(), "presets": [o.to_json() for o in found]})
    _show(found)
    say(f"\none of them in full: feather plan {shlex.quote(model)} --recipe {found[0].preset}")
    say(f"choose by a limit:   feather recommend {shlex.quote(model)} --ram 8GB")


def _offers(model: str, threads: int | None, trust_remote_code: bool, timed: bool) -> list[Offer]:
    from featherweight.model.network.source import open_source
    from featherweight.system.threads import use_threads
    from featherweight.tasks.compress.earlier import earlier_notes
    from featherweight.tasks.compress.presets import offers

    shown = (
        steps("presets") if timed else nullcontext(lambda done, total: None)
    )  # planning alone is a matter of seconds
    with use_threads(threads), shown as notify, open_source(model, trust_remote_code) as checkpoint:
        for text in earlier_notes(checkpoint):
            note(text)
        return offers(checkpoint, threads, timed=timed, notify=notify)


COLUMNS = {
    76: ("preset", "file", PRETRAINED, BUNDLED, "runs in", "made in", "time", "needs"),
    50: ("preset", "file", PRETRAINED, BUNDLED, "needs"),
    0: ("preset", "file", PRETRAINED),
}
"""Least width of a terminal -> what fits."""


def _show(found: list[Offer]) -> None:
    from rich.table import Table

    console, table = out_console(), Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = next(names for width, names in COLUMNS.items() if console.width >= width)
    for name in names:
        table.add_column(name, justify="left" if name in ("preset", "needs") else "right")
    for offer in found:
        cells = {
            "preset": offer.preset,
            "file": size_text(offer.output_bytes),
            PRETRAINED: _cost(offer, True),
            BUNDLED: _cost(offer, False),
            "runs in": size_text(offer.run_bytes),
            "made in": size_text(offer.memory_bytes),
            "time": time_text(offer.seconds) + ("+" if offer.learned else ""),
            "needs": "text" if offer.calibrated else "no data",
        }
        table.add_row(*(cells[name] for name in names))
    console.print(table)
    say()
    for line in _legend(found):
        console.print(line)


def _cost(offer: Offer, pretrained: bool) -> str:
    """On one of the two models."""
    return next((_percents(one) for one in offer.qualities if one.pretrained == pretrained), "-")


def _percents(quality: Quality) -> str:
    digits = 0 if abs(quality.excess) >= 100 else 1 if abs(quality.excess) >= 1 else 2
    return f"{quality.excess:+.{digits}f} %"


def _legend(found: list[Offer]) -> list[str]:
    """What the columns mean, and what their figures do not say."""
    from featherweight.tasks.compress.presets import CONTEXT, measured

    models = {model["pretrained"]: model for model in measured()["models"].values()}
    small = [offer.preset for offer in found if offer.run_bytes <= FITS]
    fitting = "all" if len(small) == len(found) else ", ".join(small) or "none"
    cost = (
        f"{PRETRAINED}, {BUNDLED}: how much more perplexity it cost on {models[True]['name']} "
        f"({models[True]['protocol']}) and on {models[False]['name']} ({models[False]['protocol']}). Other models "
        "differ: measure yours with feather eval."
    )
    changed = dict.fromkeys(
        f"{offer.preset} with {quality.changes} on {PRETRAINED if quality.pretrained else 'the bundled one'}"
        for offer in found
        for quality in offer.qualities
        if quality.changes
    )
    if changed:
        cost += f" What was measured was {', '.join(changed)}."
    memory = (
        f"runs in: memory to write text with the result, {CONTEXT} tokens of context. made in: memory to compress. "
        "time: of compressing on this machine, measured on samples, disk not included."
    )
    if learned := sorted({kind for offer in found for kind in offer.learned}):
        memory += f" +: {', '.join(learned)} not counted."
    return [f"fits {size_text(FITS)}: {fitting}", cost, memory]


@dataclass(frozen=True)
class RecommendOptions:
    """Limits as they are written: `ram`, `size` and `max_memory` are sizes, `quality` percent."""

    ram: str | None
    size: str | None
    quality: str | None
    max_memory: str | None
    data_free: bool
    threads: int | None
    trust_remote_code: bool


def run_recommend(model: str, options: RecommendOptions, json: Path | None) -> None:
    from featherweight.errors import FeatherError
    from featherweight.system.memory import available_bytes
    from featherweight.tasks.compress.presets import Wish, recommended

    claim_json(json, ("model", "preset", "command"))
    free = available_bytes() or None
    limits = {name: _size(f"--{name}", getattr(options, name)) for name in ("ram", "size")}
    making = _size("--max-memory", options.max_memory) or free
    percent = _percent(options.quality)
    if percent is None and not any(limits.values()):
        limits["ram"] = free
        if free:
            note(f"no limit is given, so what is free here counts: --ram {size_text(free).replace(' ', '')}")
    wish = Wish(limits["ram"], limits["size"], percent, making, options.data_free)
    found = _offers(model, options.threads, options.trust_remote_code, timed=False)
    best = recommended(found, wish)
    if best is None:
        raise FeatherError(_nothing(found, wish, model))
    command = _command(model, best.preset)
    write_json(json, {"model": model, **best.to_json(), "command": command})
    rows = [
        ("preset", best.preset),
        ("file", f"about {size_text(best.output_bytes)}, {best.bits:.2f} bits a weight in the layers"),
        ("runs in", f"about {size_text(best.run_bytes)}"),
        ("made in", f"about {size_text(best.memory_bytes)}" + (f" ({size_text(free)} free)" if free else "")),
        *(("costs", f"{_percents(one)} perplexity on {_where(one)}; other models differ") for one in best.qualities),
        ("needs", "text; a shipped one, unless --calibration names yours" if best.calibrated else "no data"),
    ]
    out_console().print(facts(rows))
    say(f"\n{command}")
    say(f"feather eval {_folder(model, best.preset)} --against {shlex.quote(model)}")


def _where(quality: Quality) -> str:
    return quality.model + (f" with {quality.changes}" if quality.changes else "")


def _nothing(found: list[Offer], wish: Any, model: str) -> str:
    """Why no preset will do, and how near the nearest is."""
    from dataclasses import replace

    from featherweight.tasks.compress.presets import recommended

    remedies = []
    for field, name, what in (
        ("run_bytes", "--ram", "run_bytes"),
        ("size_bytes", "--size", "output_bytes"),
        ("memory_bytes", "--max-memory", "memory_bytes"),
    ):
        near = [offer for offer in found if replace(wish, **{field: None}).granted(offer) and offer.quality]
        if getattr(wish, field) is not None and near:
            least = min(near, key=lambda offer: int(getattr(offer, what)))
            needs = size_text(getattr(least, what)).replace(" ", "")
            remedies.append(f"{name} {needs} or more would do ({least.preset})")
    near_quality = recommended(found, replace(wish, excess=None)) if wish.excess is not None else None
    if near_quality is not None and near_quality.quality is not None:
        remedies.append(f"--quality {near_quality.quality.excess:.1f} or more would do ({near_quality.preset})")
    more = "; ".join(remedies) or f"feather plan {shlex.quote(model)} shows what there is"
    return f"no preset has all that is asked for: {more}"


def _size(name: str, text: str | None) -> int | None:
    """Bytes of a limit on a model's memory or file; a bare number is one whose unit was forgotten."""
    from featherweight.errors import FeatherError

    if text is None:
        return None
    if text.strip().isdigit() and int(text) < LEAST:
        raise FeatherError(f"{name} {int(text)} B is less than any model takes (did you mean {text.strip()}GB?)")
    return parse_size(text, name)


def _percent(text: str | None) -> float | None:
    """Of `5`, `5%` or `5 %`."""
    from featherweight.errors import FeatherError

    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise FeatherError(
            f"--quality is {text!r}, but is the most percent of perplexity that compressing may cost: write it like 5"
        )
    return value


def _folder(model: str, preset: str) -> str:
    """A folder for the output that is not there yet."""
    base = f"{Path(model).expanduser().resolve().name.removesuffix('.safetensors')}-{preset}"
    number, folder = 1, base
    while Path(folder).exists():
        number += 1
        folder = f"{base}-{number}"
    return shlex.quote(folder)


def _command(model: str, preset: str) -> str:
    return f"feather compress {shlex.quote(model)} --recipe {preset} --out {_folder(model, preset)}"
