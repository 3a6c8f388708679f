"""A piece of work in progress: a folder in which everything that is finished is an atomic, hashed artifact.

Beside the output OUT stands OUT.feather-run while the work lasts:

    run.json         what is being made: source, recipe and their digest; another command is refused here; and
                     the device that was worked on, which may be another one the next time
    lock             held by the process at work and its workers
    artifacts/       everything that is finished, by key; see store.py for a file, work.py for the keys there are
    claims/          a lock file for each job that some process has taken, where several share the work; see executor.py
    assembly.json    written when all layers are done: which tensors go to which shard, and what is known of the layers
    out/             the output being assembled; renamed to OUT when complete
    replaced/        what stood in OUT before, while it is exchanged
    publishing       only where OUT is a mount point: its old content is aside, the new files are on their way

A mount point cannot be renamed, so there the run folder lies within OUT and the finished files are moved one by one.

Whatever moment the process dies at, the same command finds complete artifacts (by hash) and goes on. Nothing in the
output depends on time or on where the work was interrupted.
"""

from __future__ import annotations

import contextlib
import operator
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from featherweight.errors import OutputError
from featherweight.storage.run.identity import Same, difference
from featherweight.storage.run.ownership import first_foreign, is_written
from featherweight.storage.run.publishing import RUN_SUFFIX, Publishing
from featherweight.storage.run.store import SUFFIX, Store
from featherweight.storage.run.work import CHANGED, VERDICT, Work
from featherweight.system.files import disk_errors, read_object, to_json, write_text
from featherweight.system.locks import FileLock

__all__ = ["RUN_SUFFIX", "RunFolder"]

LAYOUT = 2
"""Of run folders; what older ones hold cannot be used."""
OLDER = ("tuned", "tuned.partial", "training", "verdicts", "changed")  # folders of layout 1
FOLDERS = ("artifacts", "claims", "out", "replaced", *OLDER)
FILES = ("run.json", "run.json.part", "lock", "assembly.json", "assembly.json.part", "publishing", "publishing.part")
"""What a run folder holds. Nothing else in it is ever removed."""


class RunFolder(Work):
    """See the module. `opened()` yields it with the lock held.

    Parameters
    ----------
    out : Path
        Where the output goes.
    overwrite : bool
        Another unfinished run, or an output of ours in OUT, may be replaced.
    beside : Collection[str]
        Names of files that the output takes over from the source.
    same : Same
        Whether two identities are of the same work.
    device : str
        Where the work is done. It is no part of the identity: `earlier_device` is another one, on which the work was
        begun, or None.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        beside: Collection[str] = (),
        same: Same = operator.eq,
        device: str = "cpu",
    ) -> None:
        self.out = out
        self.overwrite = overwrite
        self.beside = beside
        self.same = same
        self.device = device
        self.earlier_device: str | None = None
        self.path = out / RUN_SUFFIX if os.path.ismount(out) else out.with_name(out.name + RUN_SUFFIX)
        self.store = Store(self.path / "artifacts")
        self.claims = self.path / "claims"
        self.assembly = self.path / "assembly.json"
        self.place = Publishing(out, self.path, overwrite, beside)
        self.assembled = self.place.assembled
        self.lock = FileLock(self.path / "lock", make_folder=True)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        out: Path,
        identity: dict[str, Any],
        overwrite: bool,
        beside: Collection[str] = (),
        same: Same = operator.eq,
        device: str = "cpu",
    ) -> Iterator[RunFolder]:
        """Begin or go on. `identity` says what is made; a run of something else is refused, or discarded if asked.

        A run that ends without a finished layer leaves no folder behind.

        Raises
        ------
        OutputError
            Where another process is at work, the folder holds another unfinished run, one of an older featherweight,
            or what is not ours.
        """
        run = cls(out, overwrite, beside, same, device)
        foreign = run.foreign()
        if foreign is not None:
            raise OutputError(
                f"{run.path} is where the unfinished output is kept, but it holds {foreign.name}, which featherweight "
                "did not write; move it away or choose another --out"
            )
        with run.lock:
            if not run.lock.acquire():
                raise OutputError(f"another process is working in {run.path}; wait for it or choose another --out")
            try:
                run._begin(identity)
                yield run
            finally:
                if not run._has_work():
                    run.remove()

    @property
    def moved_note(self) -> str | None:
        """What is to be said where the work was on another device before."""
        if self.earlier_device is None:
            return None
        return (
            f"this run was on {self.earlier_device} before and goes on on {self.device}: what is finished stays as it "
            "is, and the rest may differ in the last bits from a run in one place, which adds up in one order"
        )

    def _begin(self, identity: dict[str, Any]) -> None:
        found, readable = self.identity(), self._is_readable()
        same = found is not None and self.same(found, identity) and readable
        if not same:
            if found is not None and self._has_work() and not self.overwrite:
                raise OutputError(self._other_run(found, identity, readable))
            self._clear()
        with disk_errors(self.path):
            for folder in (self.store.folder, self.claims, self.assembled):
                folder.mkdir(exist_ok=True)
        earlier = read_object(self.path / "run.json") if same else {}
        before = earlier.get("device", "cpu") if same else self.device
        if before != self.device and self._has_work():
            self.earlier_device = str(before)
        if not same or before != self.device:
            self._write({**earlier, "layout": LAYOUT, "device": self.device, "identity": identity})

    def _write(self, begun: dict[str, Any]) -> None:
        write_text(self.path / "run.json", to_json(begun))

    def remembered(self, name: str, value: str) -> str:
        """What was noted under a name when this work began; else, or where nothing is done, `value`, which is noted."""
        begun = read_object(self.path / "run.json")
        noted = begun.get("noted")
        noted = noted if isinstance(noted, dict) else {}
        if isinstance(noted.get(name), str) and self._has_work():
            return str(noted[name])
        self._write({**begun, "noted": {**noted, name: value}})
        return value

    def _other_run(self, found: dict[str, Any], identity: dict[str, Any], readable: bool) -> str:
        """Why the run that is here is not gone on with, and what to do."""
        if not readable and found:
            return (
                f"an unfinished run of another version of featherweight is in {self.path}, which this one cannot go on "
                "with; finish it with that version, choose another --out, or discard it with --overwrite"
            )
        return (
            f"an unfinished run of another command is in {self.path} ({difference(found, identity)}); "
            "repeat that command to finish it, choose another --out, or discard it with --overwrite"
        )

    def foreign(self) -> Path | None:
        """What is in the place of the run folder and no part of one; None if there is nothing of the kind."""
        if not os.path.lexists(self.path):
            return None
        if not self.path.is_dir():
            return self.path
        begun = self.identity() is not None
        for entry in sorted(self.path.iterdir()):
            folder = entry.name in FOLDERS and entry.is_dir()
            if not (folder or entry.name in FILES) or (folder and not begun and not self._is_left(entry)):
                return entry
        return None

    def _is_left(self, folder: Path) -> bool:
        """Whether a folder is what an interrupted removal leaves, all of it written by us."""
        held = list(folder.iterdir())
        if folder in (self.place.replaced, self.assembled):
            return first_foreign(folder, held, self.beside, ours=folder == self.assembled) is None
        return all(is_written(path) for path in held)

    def identity(self) -> dict[str, Any] | None:
        """What the folder says is being made; None without one, {} if that cannot be read."""
        path = self.path / "run.json"
        if not path.is_file():
            return None
        found = read_object(path)
        inner = found.get("identity", {}) if "layout" in found else found  # layout 1 had nothing around it
        return inner if isinstance(inner, dict) else {}

    def _is_readable(self) -> bool:
        """Whether the folder is laid out as this version does it."""
        return read_object(self.path / "run.json").get("layout") == LAYOUT

    def _has_work(self) -> bool:
        """Whether anything here is worth keeping."""
        if any(path.exists() for path in (self.assembly, self.place.replaced, self.place.marker)):
            return True
        slight = (CHANGED, VERDICT)  # found again in no time
        done = any(not key.startswith(slight) for key in self.store.names())
        return done or any((self.path / "training").glob(f"*{SUFFIX}"))  # of layout 1

    def _clear(self) -> None:
        """Remove all but the lock; an old output that was already aside goes back to its place first."""
        with disk_errors(self.path):
            self.place.take_back()
            for name in (*FOLDERS, *FILES):
                entry = self.path / name
                if name != "lock" and os.path.lexists(entry):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def publishing(self) -> bool:
        """See `Publishing.begun`."""
        return self.place.begun

    def published(self, identity: dict[str, Any]) -> bool:
        """The output of this very run is in its place and only this folder was not removed any more."""
        found = self.identity()
        same = found is not None and self.same(found, identity)
        return same and self.assembly.exists() and not self.assembled.exists()

    def read_assembly(self) -> dict[str, Any] | None:
        """None while layers are missing, or if the file is damaged: what it says can be found again."""
        found = read_object(self.assembly)
        return found if {"layers", "shards"} <= found.keys() else None

    def publish(self) -> None:
        """See `Publishing.publish`; then remove the run folder."""
        self.place.publish()
        self.remove()

    def remove(self) -> None:
        """The folder with all that is ours in it; something else keeps it there."""
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in FILES:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def remove_leftover(self, identity: dict[str, Any]) -> None:
        """After a run of `identity` was published: its folder, unless it is another run's or in use."""
        found = self.identity()
        if self.foreign() is None and self.path.is_dir() and (found is None or self.same(found, identity)):
            with contextlib.suppress(OutputError), self.lock:
                if self.lock.acquire():
                    self.remove()
