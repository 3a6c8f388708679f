"""A model that is to be read as plain weights, whatever it is stored as."""

from __future__ import annotations

import math
from pathlib import Path

from featherweight.model.network.accounting import account_of, as_stored
from featherweight.storage.checkpoint.accounting import is_whole
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.decoded import DecodedCheckpoint, is_coded
from featherweight.storage.checkpoint.resolve import resolve


def open_source(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open what is to be compressed, or run while statistics are gathered.

    A folder of codes is a `DecodedCheckpoint`, with a note that says so; any other is as `Checkpoint.open` has it, also
    one that another tool has quantised.

    Parameters
    ----------
    model : str or Path
        See `resolve`.
    trust_remote_code : bool
        Run the code that the folder brings for its class.

    Raises
    ------
    CheckpointError
        In one sentence, whatever keeps the model from being read.
    """
    place = resolve(model)
    checkpoint = Checkpoint.at(place)
    if is_coded(checkpoint):
        try:
            checkpoint = _decoded(checkpoint, place.read_from or place.folder, trust_remote_code)
        except BaseException:
            checkpoint.close()
            raise
    checkpoint.trust_remote_code = trust_remote_code
    return checkpoint


def _decoded(coded: Checkpoint, named: Path, trust_remote_code: bool) -> DecodedCheckpoint:
    """With the shapes that the model's class has, where no family's file says them."""
    decoded = DecodedCheckpoint(coded, named=named)
    if not decoded.compressed or is_whole(decoded):
        return decoded
    account = account_of(decoded, trust_remote_code)
    shapes = {as_stored(name, decoded): tuple(wanted) for name, _, wanted in account.mismatched}
    known = {n: s for n, s in shapes.items() if n in decoded.compressed and math.prod(s) == decoded.entry(n).elements}
    return DecodedCheckpoint(coded, known, named) if known else decoded
