"""`feather converse`: conversations that a model writes itself, ahead of a calibration or for an evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.cli.console import claim_json, facts, note, out_console, quiet_transformers, steps, write_json
from featherweight.system.units import time_text


@dataclass(frozen=True)
class ConverseOptions:
    """settings : fields of `ConversationSettings`; count : how many conversations the file has in the end at least"""

    count: int
    settings: dict[str, Any]
    threads: int | None
    device: str
    trust_remote_code: bool


def run_converse(model: str, out: Path, options: ConverseOptions, json: Path | None) -> None:
    from featherweight.methods.calibrate.settings import ConversationSettings
    from featherweight.storage.checkpoint.checkpoint import Checkpoint
    from featherweight.system.devices import device_named
    from featherweight.system.threads import use_threads
    from featherweight.tasks.converse.conversations import Conversations, converse

    claim_json(json, ("file", "conversations", "unfinished"))
    quiet_transformers()
    device, settings = device_named(options.device), ConversationSettings(**options.settings)
    begun = time.monotonic()
    with use_threads(options.threads), steps("conversations") as notify, Checkpoint.open(model) as checkpoint:

        def watch(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                note(event["text"])
            elif event["event"] == "conversations":
                notify(event["step"], event["of"])

        checkpoint.trust_remote_code = options.trust_remote_code
        rows = converse(Conversations(checkpoint, settings, device, watch), out, options.count)
    cut = sum(not row["finished"] for row in rows)
    seconds = time.monotonic() - begun
    write_json(
        json, {"file": str(out), "conversations": len(rows), "unfinished": cut, "seconds": seconds, **options.settings}
    )
    table = [
        ("conversations", f"{len(rows)} in {out}"),
        ("ended by the limit of tokens", str(cut)),
        ("time", time_text(seconds)),
    ]
    out_console().print(facts(table))
