"""A folder as transformers is to see it: the weight files that were chosen, and no adapter beside them.

transformers reads `model.safetensors` or an index and nothing else, and where peft is installed it loads an adapter
that lies beside the weights. Where what we read differs, it gets a folder of links that says the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from featherweight.errors import CheckpointError
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.resolve import ADAPTER_CONFIG, Place
from featherweight.storage.checkpoint.shards import INDEX_NAME, SINGLE_NAME, find_shards


class View:
    """folder : for transformers to load from; `close` removes it if it was made for this"""

    def __init__(self, checkpoint: Checkpoint, place: Place) -> None:
        self._made: str | None = None
        self.folder = place.folder
        usual = _is_usual(checkpoint, place) and not _empty_method(checkpoint)
        if (place.folder / ADAPTER_CONFIG).exists() or not usual:
            self._made = tempfile.mkdtemp(prefix="featherweight-")
            self.folder = Path(self._made)
            try:
                _link(checkpoint, place.folder.resolve(), self.folder)
            except OSError as error:
                self.close()
                raise CheckpointError(
                    f"cannot make a folder of links to {place.folder} in {tempfile.gettempdir()}: "
                    f"{error.strerror or error}"
                ) from error

    def close(self) -> None:
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made = None


def _is_usual(checkpoint: Checkpoint, place: Place) -> bool:
    """Whether transformers finds these very files by itself."""
    names = [file.path.name for file in checkpoint.files]
    single = (place.folder / SINGLE_NAME).exists()
    if place.file is not None or names == [SINGLE_NAME]:
        return names == [SINGLE_NAME]
    # transformers 4 reads only tensors that the index names, 5 all that are in its files
    shards = find_shards(place.folder)
    return not single and shards.readable and shards.placed.keys() == checkpoint.renamed.keys()


def _empty_method(checkpoint: Checkpoint) -> bool:
    """Whether config.json has an empty quantization_config, which says nothing and is refused by transformers."""
    return "quantization_config" in checkpoint.config and not checkpoint.config["quantization_config"]


def _link(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    for path in checkpoint.other_files():
        os.symlink(path.resolve(), folder / path.name)
    if _empty_method(checkpoint):
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        os.symlink(source / "config.json", folder / "config.json")
    if len(checkpoint.files) == 1:
        os.symlink(checkpoint.files[0].path.resolve(), folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for file in checkpoint.files:
        os.symlink(file.path.resolve(), folder / file.path.name)
        weight_map |= dict.fromkeys(file.entries, file.path.name)
    index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
