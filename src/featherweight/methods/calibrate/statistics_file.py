"""Files of statistics.

A file holds the statistics of the original network and can serve any number of recipes. It is a safetensors file;
layers that share an input share its tensors.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from featherweight.errors import CalibrationError, CheckpointError
from featherweight.events import Observer
from featherweight.methods.calibrate.statistics import gathered_names
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.weights import sample_digest
from featherweight.storage.checkpoint.writer import Blob, blob_of, write_safetensors
from featherweight.system.files import disk_errors

if TYPE_CHECKING:
    from featherweight.methods.calibrate.runner import Calibration

METADATA_KEY = "featherweight_statistics"
FILE_VERSION = 1


def save_statistics(
    calibration: Calibration,
    path: str | Path,
    checkpoint: Checkpoint,
    needs: Collection[str] = ("gram", "mean", "mean_abs"),
    text_digest: str = "",
) -> None:
    """Run the original network once and write the statistics of all its layers to a file, whole or not at all.

    Starved layers, and those into which NaN or infinity went, are left out and noted. Raises CalibrationError if that
    leaves none.
    """
    path = Path(path)
    parts = path.with_name(path.name + ".parts")
    places: dict[str, str] = {}
    left_out: dict[str, str] = {}
    try:
        with disk_errors(parts):
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
        held: set[str] = set()
        for session in calibration.blocks():
            found = session.gather(session.names, needs)
            left_out.update({name: f"saw {tokens} tokens" for name, tokens in session.starved.items()})
            left_out.update({name: f"not finite: {place}" for name, place in session.non_finite.items()})
            groups = session.groups if not calibration.settings.guidance else [[name] for name in session.names]
            kept = [[name for name in group if name not in left_out] for group in groups]
            tensors = {f"{g[0]}.{stat}": value for g in kept if g for stat, value in found[g[0]].items()}
            held |= {statistic for group in kept if group for statistic in found[group[0]]}
            places.update({name: group[0] for group in kept for name in group})
            if tensors:
                blobs = [blob_of(name, value) for name, value in tensors.items()]
                write_safetensors(parts / f"{session.index}.safetensors", blobs, {}, sync=False)
        _report_left_out(left_out, bool(places), calibration.notify)
        about = {
            "version": FILE_VERSION,
            "model": sample_digest(checkpoint),
            "text": text_digest,
            "settings": calibration.settings.model_dump(mode="json"),
            "names": sorted(({*needs, "tokens"} & set(gathered_names())) | held),
            "layers": places,
            "left_out": left_out,
        }
        _join(path, sorted(parts.glob("*.safetensors")), {METADATA_KEY: json.dumps(about)})
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _report_left_out(left_out: Mapping[str, str], others: bool, notify: Observer) -> None:
    """CalibrationError if no layer has statistics, a note if some have none."""
    if not left_out:
        return
    name, reason = next(iter(left_out.items()))
    if not others:
        raise CalibrationError(
            f"no layer has statistics ({name} {reason}): calibrate with more text, raise calibration.sequences or "
            "calibration.length, or lower calibration.starved_tokens"
        )
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    notify({"event": "note", "text": f"no statistics of {name} ({reason}){more}: recipes treat them without data"})


def _join(path: Path, parts: list[Path], metadata: dict[str, str]) -> None:
    with contextlib.ExitStack() as stack:
        blobs = []
        for part in parts:
            file = stack.enter_context(SafetensorsFile.open(part))
            for name, entry in file.entries.items():
                chunks = _windows_of(file, name)
                blobs.append(Blob(name, entry.dtype, entry.shape, entry.nbytes, chunks))
        write_safetensors(path, blobs, metadata)


def _windows_of(file: SafetensorsFile, name: str) -> Any:
    def chunks() -> Iterator[memoryview]:
        yield from file.raw_windows(name)

    return chunks


class StatisticsFile:
    """Statistics of a model's layers on disk, read when asked for; a context manager.

    names : which statistics there are
    layers : of which layers
    left_out : layers without statistics -> why
    settings : the settings they were gathered with, JSON
    text : digest of the text
    """

    def __init__(self, file: SafetensorsFile, about: Mapping[str, Any]) -> None:
        self._file = file
        self._places: dict[str, str] = about["layers"]
        self.path = file.path
        self.names: tuple[str, ...] = tuple(about["names"])
        self.layers: tuple[str, ...] = tuple(self._places)
        self.left_out: dict[str, str] = about["left_out"]
        self.settings: dict[str, Any] = about["settings"]
        self.text: str = about["text"]
        self.model: str = about["model"]

    @classmethod
    def open(cls, path: str | Path, checkpoint: Checkpoint | None = None) -> StatisticsFile:
        """CalibrationError if the file is none of statistics, or of another model than `checkpoint`."""
        try:
            file = SafetensorsFile.open(path)
        except CheckpointError as error:
            raise CalibrationError(f"{path} is no file of statistics: {error}") from error
        try:
            opened = cls(file, _about(file))
            if checkpoint is not None and opened.model != sample_digest(checkpoint):
                raise CalibrationError(
                    f"the statistics in {path} were gathered from another model than {checkpoint.folder}, or from "
                    "other weights of it; gather them again with `feather calibrate`"
                )
            return opened
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> StatisticsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def place(self, layer: str) -> str | None:
        """What layers with the same statistics have in common; None for a layer without any."""
        return self._places.get(layer)

    def statistics(self, layer: str) -> dict[str, Tensor]:
        """The statistics of a layer's input, empty if there are none. Copies."""
        place = self._places.get(layer)
        if place is None:
            return {}
        keys = {name: f"{place}.{name}" for name in self.names}
        return {name: self._file.tensor(key).clone() for name, key in keys.items() if key in self._file.entries}


def is_statistics(path: Path) -> bool:
    """Whether a file is one of statistics, as `feather calibrate` writes them."""
    try:
        with SafetensorsFile.open(path) as file:
            return METADATA_KEY in file.metadata
    except CheckpointError:
        return False


def load_statistics(path: str | Path, checkpoint: Checkpoint | None = None) -> dict[str, dict[str, Tensor]]:
    """All statistics of a file at once, by layer; see `StatisticsFile` for one layer at a time."""
    with StatisticsFile.open(path, checkpoint) as file:
        return {layer: file.statistics(layer) for layer in file.layers}


def _about(file: SafetensorsFile) -> dict[str, Any]:
    try:
        about = json.loads(file.metadata[METADATA_KEY])
        version = about["version"]
        fields = {"layers": dict, "names": list, "left_out": dict, "settings": dict, "text": str, "model": str}
        sound = all(isinstance(about[name], kind) for name, kind in fields.items())
    except (KeyError, ValueError, TypeError):
        raise CalibrationError(f"{file.path} is no file of statistics; make one with `feather calibrate`") from None
    if version != FILE_VERSION or not sound:
        raise CalibrationError(
            f"{file.path} holds statistics of version {version}, this is version {FILE_VERSION}: "
            "gather them again with `feather calibrate`"
        )
    found: dict[str, Any] = about
    return found
