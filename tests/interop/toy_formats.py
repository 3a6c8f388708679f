"""A format for the tests of what all formats share: a file `NAME.toy` that says which folder of codes it holds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from featherweight.errors import CheckpointError
from featherweight.interop.exports import Exporter, Told, Verdict
from featherweight.interop.imports import Imported, ImportedTensor, Importer
from featherweight.interop.stored import StoredModel
from featherweight.registry import register
from featherweight.storage.checkpoint.checkpoint import Checkpoint
from featherweight.storage.checkpoint.format import module_layout, module_specs
from featherweight.storage.checkpoint.stored_code import load_code
from featherweight.storage.codes import Code

ORIGIN = "TOY, 8 bits, llama"


@register("importer", "toy")
class Toy(Importer):
    """A JSON file: `folder`, of ours; `stop`, a tensor at which reading fails; `log`, a file with a line a tensor."""

    title: ClassVar[str] = "TOY"

    @classmethod
    def recognises(cls, path: Path, config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return path.suffix == ".toy" or (isinstance(settings, dict) and settings.get("quant_method") == "toy")

    @classmethod
    def open(cls, path: Path) -> Imported:
        about = json.loads((path / "model.toy" if path.is_dir() else path).read_text())
        source = Checkpoint.open(about["folder"])
        specs = module_specs(source.quantization_config or {})
        owner = {f"{m}.{name}": m for m, spec in specs.items() for name in module_layout(m, spec)}
        tensors: dict[str, ImportedTensor] = {}
        for name in source.names:
            module, entry = owner.get(name), source.entry(name)
            full = name if module is None else module if module.endswith("]") else f"{module}.weight"
            spec = None if module is None else load_code(source, module).spec
            shape = entry.shape if spec is None else tuple(spec["shape"])
            load = partial(cls._load, source, name if module is None else module, module is not None, about)
            tensors.setdefault(full, ImportedTensor(full, shape, load, entry.torch_dtype, spec))
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        beside = partial(cls._write_beside, source.other_files())
        return Imported(config, tuple(tensors.values()), ORIGIN, beside, ("a toy is a toy",), source.close)

    @staticmethod
    def _write_beside(files: Sequence[Path], folder: Path) -> None:
        for file in files:
            if not file.name.startswith("featherweight"):
                shutil.copy(file, folder)

    @staticmethod
    def _load(source: Checkpoint, name: str, coded: bool, about: dict[str, Any]) -> Code | Tensor:
        time.sleep(float(about.get("pause", 0)))
        if "log" in about:
            with Path(about["log"]).open("a") as log:
                log.write(f"{name}\n")
        if about.get("stop") == name:
            raise CheckpointError(f"the toy is broken at {name}")
        return load_code(source, name) if coded else source.tensor(name)


@register("exporter", "toy")
class ToyExporter(Exporter):
    """A folder with a line a tensor."""

    title: ClassVar[str] = "TOY"
    bits: int = 8
    fail_at: str = ""
    refuse: str = ""

    def verdicts(self, model: StoredModel) -> tuple[Verdict, ...]:
        return tuple(
            Verdict(name, "no toy", "impossible", 0, "toys have no such tensor")
            if self.refuse and self.refuse in name
            else Verdict(name, f"toy {self.bits}", "exact", self.bits)
            for name in model.tensors
        )

    def write(self, model: StoredModel, out: Path, told: Told) -> Sequence[Verdict]:
        for number, (name, tensor) in enumerate(model.tensors.items()):
            if name == self.fail_at:
                raise RuntimeError("the exporter broke")
            total = sum(float(rows.sum()) for _, _, rows in tensor.windows())
            with (out / "toy.txt").open("a") as stream:
                stream.write(f"{name} {total}\n")
            told(number + 1, len(model.tensors))
        return self.verdicts(model)


def write_toy(path: Path, folder: Path, **about: Any) -> Path:
    """The file, of a folder of ours."""
    path.write_text(json.dumps({"folder": str(folder), **{k: str(v) for k, v in about.items()}}))
    return path
