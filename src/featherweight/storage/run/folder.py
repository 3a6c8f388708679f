"""A compression in progress: a folder in which every finished layer is an atomic, hashed artifact.

Beside the output OUT stands OUT.feather-run while the work lasts:

    run.json         what is being made: source, recipe and their digest; another command is refused here
    lock             held by the process at work
    artifacts/N.safetensors   layer N, its code's tensors, hashes and error; the name appears when it is complete
    tuned/N.safetensors       layer N once more, after a stage that changed all layers together; all of them or none
    training/S.safetensors    how far the training of step S has come; it goes on from there
    verdicts/S.json           what step S, which changed the whole model, did on held-out windows, and whether it stays
    changed/B.safetensors     plain tensors (norms, biases) that a calibrated recipe changed in block B; it may be empty
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
import json
import operator
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from featherweight.errors import CheckpointError, OutputError
from featherweight.storage.checkpoint.safetensors_file import SafetensorsFile
from featherweight.storage.checkpoint.writer import blob_of, disk_errors, to_json, write_safetensors, write_text
from featherweight.storage.codes import Code, code_from
from featherweight.storage.run.identity import Same, difference
from featherweight.storage.run.ownership import first_foreign, is_written
from featherweight.storage.run.training_state import TrainingFile, damaged_tensors, sha256_of

LAYER_KEY = "featherweight.layer"
LAYER_HASH_KEY = "featherweight.layer_sha256"
RUN_SUFFIX = ".feather-run"
FOLDERS = ("artifacts", "tuned", "tuned.partial", "training", "verdicts", "changed", "out", "replaced")
FILES = ("run.json", "run.json.part", "lock", "assembly.json", "assembly.json.part", "publishing", "publishing.part")
"""What a run folder holds. Nothing else in it is ever removed."""


class RunFolder:
    """See the module. `opened()` yields it with the lock held."""

    def __init__(
        self, out: Path, overwrite: bool = False, beside: Collection[str] = (), same: Same = operator.eq
    ) -> None:
        """
        beside : names of files that the output takes over from the source
        same : whether two identities are of the same work
        """
        self.out = out
        self.overwrite = overwrite
        self.beside = beside
        self.same = same
        self.inside = os.path.ismount(out)
        self.path = out / RUN_SUFFIX if self.inside else out.with_name(out.name + RUN_SUFFIX)
        self.artifacts = self.path / "artifacts"
        self.changes = self.path / "changed"
        self.tuned = self.path / "tuned"
        self.verdicts = self.path / "verdicts"
        self.training = self.path / "training"
        self.assembled = self.path / "out"
        self.assembly = self.path / "assembly.json"
        self.replaced = self.path / "replaced"
        self.marker = self.path / "publishing"

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        out: Path,
        identity: dict[str, Any],
        overwrite: bool,
        beside: Collection[str] = (),
        same: Same = operator.eq,
    ) -> Iterator[RunFolder]:
        """Begin or go on. `identity` says what is made; a run of something else is refused, or discarded if asked.

        A run that ends without a finished layer leaves no folder behind.
        """
        run = cls(out, overwrite, beside, same)
        foreign = run.foreign()
        if foreign is not None:
            raise OutputError(
                f"{run.path} is where the unfinished output is kept, but it holds {foreign.name}, which featherweight "
                "did not write; move it away or choose another --out"
            )
        with _locked(run.path):
            try:
                run._begin(identity)
                yield run
            finally:
                if not run._has_work():
                    run.remove()

    def _begin(self, identity: dict[str, Any]) -> None:
        found = self.identity()
        same = found is not None and self.same(found, identity)
        if not same:
            if found is not None and self._has_work() and not self.overwrite:
                raise OutputError(
                    f"an unfinished run of another command is in {self.path} ({difference(found, identity)}); "
                    "repeat that command to finish it, choose another --out, or discard it with --overwrite"
                )
            self._clear()
        with disk_errors(self.path):
            self.artifacts.mkdir(exist_ok=True)
            self.changes.mkdir(exist_ok=True)
            self.verdicts.mkdir(exist_ok=True)
            self.training.mkdir(exist_ok=True)
            self.assembled.mkdir(exist_ok=True)
        if not same:
            write_text(self.path / "run.json", to_json(identity))

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
        if folder == self.replaced or folder == self.assembled:
            return first_foreign(folder, held, self.beside, ours=folder == self.assembled) is None
        return all(is_written(path) for path in held)

    def identity(self) -> dict[str, Any] | None:
        """What the folder says is being made; None without one, {} if that cannot be read."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _has_work(self) -> bool:
        """Whether anything here is worth keeping."""
        kept = (self.assembly, self.replaced, self.marker)
        layers = any(self.artifacts.glob("*.safetensors"))
        return layers or any(path.exists() for path in kept) or any(self.training.glob("*.safetensors"))

    def kept_bytes(self) -> int:
        """Bytes of what is kept until the output is assembled."""
        folders = [folder for folder in (self.artifacts, self.tuned, self.training) if folder.exists()]
        return sum(path.stat().st_size for folder in folders for path in folder.iterdir())

    def _clear(self) -> None:
        """Remove all but the lock; an old output that was already aside goes back to its place first."""
        with disk_errors(self.path):
            if self.replaced.exists() and self.inside and not self.marker.exists():
                _move_all(self.replaced, self.out)
            elif self.replaced.exists() and not self.inside and not occupants(self.out):
                self._make_way()
                os.rename(self.replaced, self.out)
            for name in (*FOLDERS, *FILES):
                entry = self.path / name
                if name != "lock" and os.path.lexists(entry):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def publishing(self) -> bool:
        """The finished files are on their way into a mount point; nothing is left to do but to move the rest."""
        return self.marker.exists()

    def published(self, identity: dict[str, Any]) -> bool:
        """The output of this very run is in its place and only this folder was not removed any more."""
        found = self.identity()
        same = found is not None and self.same(found, identity)
        return same and self.assembly.exists() and not self.assembled.exists()

    def artifact(self, index: int) -> Path:
        """The file of a finished layer, in its latest form."""
        name = f"{index:06d}.safetensors"
        return self.tuned / name if (self.tuned / name).exists() else self.artifacts / name

    def discard(self, index: int) -> None:
        """Remove a layer's files: its shard is written."""
        for folder in (self.artifacts, self.tuned):  # never the latest form before the earlier one
            (folder / f"{index:06d}.safetensors").unlink(missing_ok=True)

    def keep(self, index: int, code: Code, record: dict[str, Any]) -> None:
        """Store a finished layer."""
        _write_layer(self.artifacts / f"{index:06d}.safetensors", code, record)

    def keep_tuned(self, layers: dict[int, tuple[Code, dict[str, Any]]]) -> None:
        """Store layers that were changed together; they count when all of them are there."""
        partial = self.path / "tuned.partial"
        with disk_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for index, (code, record) in layers.items():
                _write_layer(partial / f"{index:06d}.safetensors", code, record)
            shutil.rmtree(self.tuned, ignore_errors=True)
            os.rename(partial, self.tuned)

    def is_tuned(self, indices: Collection[int]) -> bool:
        """Whether these layers were changed together and stored; some of them may be in shards already."""
        names = (f"{index:06d}.safetensors" for index in indices)
        return self.tuned.exists() and (self.assembly.exists() or all((self.tuned / name).exists() for name in names))

    def drop_tuned(self) -> None:
        """Layers are what they were before the stage that changed all of them."""
        if not self.tuned.exists():
            return
        partial = self.path / "tuned.partial"
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(self.tuned, partial)  # at once: what is left of it never counts
        shutil.rmtree(partial, ignore_errors=True)

    def training_of(self, step: str, notify: Callable[[dict[str, Any]], None]) -> TrainingFile:
        """Where a training leaves its state."""
        return TrainingFile(self.training / f"{step}.safetensors", notify)

    def end_training(self) -> None:
        """What came of the trainings is stored: their states are no longer needed."""
        for path in self.training.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def keep_verdict(self, step: str, facts: dict[str, Any]) -> None:
        """Store what came of a step that changed the whole model; `facts` hold `kept`."""
        write_text(self.verdicts / f"{step}.json", to_json(facts))

    def verdict(self, step: str) -> dict[str, Any] | None:
        """What `keep_verdict` stored; None if there is nothing or it cannot be read."""
        try:
            found = json.loads((self.verdicts / f"{step}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("kept"), bool) else None

    def all_verdicts(self) -> list[dict[str, Any]]:
        """Of all steps: transforms, rounding, corrections, in their order."""
        order = ("transform", "rounding", "correction")
        steps = [path.stem for path in self.verdicts.glob("*.json")]
        steps.sort(key=lambda step: (order.index(step.partition("-")[0]), step))
        return [found for found in map(self.verdict, steps) if found is not None]

    def record(self, index: int, layer: str) -> dict[str, Any] | None:
        """What is known of a finished layer; None if its artifact is missing, damaged or of another layer."""
        path = self.artifact(index)
        if not path.exists():
            return None
        try:
            with SafetensorsFile.open(path) as file:
                text = file.metadata[LAYER_KEY]
                found = json.loads(text)
                intact = file.metadata[LAYER_HASH_KEY] == sha256_of(text) and not damaged_tensors(file)
                if intact and found["name"] == layer:
                    return dict(found)
        except (CheckpointError, KeyError, ValueError, TypeError, AttributeError):
            pass
        with disk_errors(path):
            if path.parent == self.tuned:  # its earlier form must not stand in for it among the others
                self.drop_tuned()
            else:
                path.unlink()
        return None

    def code(self, index: int) -> Code:
        """The code of a finished layer, as stored."""
        with SafetensorsFile.open(self.artifact(index)) as file:
            spec = json.loads(file.metadata[LAYER_KEY])["spec"]
            return code_from(spec, {name: file.tensor(name).clone() for name in file.entries})

    def keep_changed(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Store the plain tensors that a finished block has instead of the source's, also if there are none."""
        blobs = [blob_of(name, tensor.contiguous()) for name, tensor in tensors.items()]
        write_safetensors(self._changed_file(block), blobs, {}, sync=False)

    def changed(self, block: int) -> dict[str, Tensor] | None:
        """What `keep_changed` stored for a block; None if the block is not finished or the file is damaged."""
        path = self._changed_file(block)
        if not path.exists():
            return None
        try:
            with SafetensorsFile.open(path) as file:
                if not damaged_tensors(file):
                    return {name: file.tensor(name).clone() for name in file.entries}
        except (CheckpointError, KeyError, ValueError, TypeError, AttributeError):
            pass
        with disk_errors(path):
            path.unlink()
        return None

    def changed_tensors(self) -> dict[str, Path]:
        """Every plain tensor that some block changed, and the file that holds it."""
        found: dict[str, Path] = {}
        for path in sorted(self.changes.glob("*.safetensors")):
            with SafetensorsFile.open(path) as file:
                found |= dict.fromkeys(file.entries, path)
        return found

    def _changed_file(self, block: int) -> Path:
        return self.changes / f"{block:06d}.safetensors"

    def read_assembly(self) -> dict[str, Any] | None:
        """None while layers are missing, or if the file is damaged: what it says can be found again."""
        try:
            found = json.loads(self.assembly.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"layers", "shards"} <= found.keys() else None

    def publish(self) -> None:
        """Put the assembled output in its place, what stood there aside, and remove the run folder.

        OutputError if something came to stand there meanwhile and nobody said it may be replaced.
        """
        with disk_errors(self.out):
            if not self.publishing:
                if occupants(self.out):
                    self._set_aside()
                if self.inside:
                    write_text(self.marker, "")
            if self.inside:
                _move_all(self.assembled, self.out)
            else:
                self._make_way()
                os.rename(self.assembled, self.out)
        self.remove()

    def _set_aside(self) -> None:
        if not self.overwrite:
            raise OutputError(
                f"{self.out} came to hold other files while the work went on; move them away and run the same command "
                "again"
            )
        foreign = first_foreign(self.out, occupants(self.out), self.beside)
        if foreign is not None:
            raise OutputError(
                f"{self.out} came to hold {foreign.name} while the work went on, which featherweight did not write; "
                "move it away and run the same command again"
            )
        if self.inside:
            self.replaced.mkdir(exist_ok=True)
            _move_all(self.out, self.replaced)
            return
        if self.replaced.exists():  # aside since an earlier attempt, and OUT was filled again since
            shutil.rmtree(self.replaced)
        os.rename(self.out, self.replaced)

    def _make_way(self) -> None:
        """Windows cannot rename onto an empty folder."""
        if self.out.exists():
            self.out.rmdir()

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
            with contextlib.suppress(OutputError), _locked(self.path):
                self.remove()


def _write_layer(path: Path, code: Code, record: dict[str, Any]) -> None:
    blobs = [blob_of(name, tensor) for name, tensor in code.tensors().items()]
    text = json.dumps(record)  # in the order of its keys, so that it reads back as it would be written
    write_safetensors(path, blobs, {LAYER_KEY: text, LAYER_HASH_KEY: sha256_of(text)}, sync=False)


def occupants(folder: Path) -> list[Path]:
    """What an output must not mix with: all but the run folder within a mount point and a file system's own folder."""
    if not folder.exists():
        return []
    return [path for path in folder.iterdir() if path.name not in (RUN_SUFFIX, "lost+found")]


def _move_all(source: Path, target: Path) -> None:
    """Within one file system; config.json last, so that what is half there is never taken for a model."""
    for entry in sorted(occupants(source), key=lambda path: path.name == "config.json"):
        os.replace(entry, target / entry.name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock; OutputError if another process does."""
    while True:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / "lock").open("a")
        with stream:
            _lock(stream, folder)
            if _is_current(stream, folder / "lock"):
                yield
                return


def _is_current(stream: Any, path: Path) -> bool:
    """Whether the file that was locked still is the one of that name: another process may have removed it between."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except OSError:
        return False


def _lock(stream: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two runs on one output are the caller's to avoid
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another process is working in {path}; wait for it or choose another --out") from None
    except OSError:  # a file system without locks, as some network and FUSE ones are
        return
