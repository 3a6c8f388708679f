"""Putting a finished output in its place: at once where it can be renamed, file by file within a mount point.

What stood there is aside in the run folder while that happens, and goes back if the output is discarded before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from featherweight.errors import OutputError
from featherweight.storage.run.ownership import first_foreign
from featherweight.system.files import disk_errors, write_text

RUN_SUFFIX = ".feather-run"


class Publishing:
    """The way of an output from the run folder to OUT.

    Parameters
    ----------
    out : Path
        Where it goes.
    run : Path
        The run folder: beside OUT, or within it where OUT is a mount point, which cannot be renamed.
    overwrite : bool
        An output of ours that stands in OUT may be replaced.
    beside : Collection[str]
        Names of files that the output takes over from the source.
    """

    def __init__(self, out: Path, run: Path, overwrite: bool, beside: Collection[str]) -> None:
        self.out, self.overwrite, self.beside = out, overwrite, beside
        self.inside = run.parent == out
        self.assembled, self.replaced, self.marker = run / "out", run / "replaced", run / "publishing"

    @property
    def begun(self) -> bool:
        """The finished files are on their way into a mount point; nothing is left to do but to move the rest."""
        return self.marker.exists()

    def publish(self) -> None:
        """Put the assembled output in its place, and what stood there aside.

        Raises
        ------
        OutputError
            If something came to stand there meanwhile and nobody said it may be replaced.
        """
        with disk_errors(self.out):
            if not self.begun:
                if occupants(self.out):
                    self._set_aside()
                if self.inside:
                    write_text(self.marker, "")
            if self.inside:
                _move_all(self.assembled, self.out)
            else:
                self._make_way()
                os.rename(self.assembled, self.out)

    def take_back(self) -> None:
        """Put an old output that was already aside back into its place, before its replacement is discarded."""
        if self.replaced.exists() and self.inside and not self.begun:
            _move_all(self.replaced, self.out)
        elif self.replaced.exists() and not self.inside and not occupants(self.out):
            self._make_way()
            os.rename(self.replaced, self.out)

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


def occupants(folder: Path) -> list[Path]:
    """What an output must not mix with: all but the run folder within a mount point and a file system's own folder."""
    if not folder.exists():
        return []
    return [path for path in folder.iterdir() if path.name not in (RUN_SUFFIX, "lost+found")]


def _move_all(source: Path, target: Path) -> None:
    """Within one file system; config.json last, so that what is half there is never taken for a model."""
    for entry in sorted(occupants(source), key=lambda path: path.name == "config.json"):
        os.replace(entry, target / entry.name)
