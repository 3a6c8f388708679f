"""What every peer's script needs: its job, and how it hands back dense weights. Runs in the peers' environment.

A job is a JSON file {"model", "out", "variants", "calibration", "squares", "threads", "kept_bytes"}: the original as a
float32 model folder; where to write; what to make; a safetensors file with `input_ids` int64 [sequences, length]; one
with the mean square of every input column of every linear layer, float32 [in], by tensor name, which is there for
peers that ask for it; the bytes that the original's own file spends on all but these layers. With "keep": true the
peer's own file stays in `out` (llama.cpp's `<variant>.gguf`, OpenVINO's `<variant>.xml` and `.bin`). Each variant
becomes `out/<variant>/` with `model.safetensors` (the original with what the peer changed, decoded to float32) and
`peer.json` (sizes, seconds, versions; or the error).
"""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Job:
    model: Path
    out: Path
    variants: tuple[str, ...]
    calibration: Path
    squares: Path
    threads: int
    kept_bytes: int
    keep: bool = False

    def weights(self) -> dict[str, np.ndarray]:
        """All tensors of the original, float32."""
        return dict(load_file(self.model / "model.safetensors"))


@dataclass(frozen=True)
class Compressed:
    """`weights` float32 [out, in] by tensor name, decoded from what is stored; `stored_bytes` of all of them together;
    `seconds` the peer spent, calibration included where it does its own; `others` are tensors that changed with them,
    the embedding among them where the peer compresses it, and `embedding_bytes` what is stored for it then, output
    layer included. `file_bytes` are those of the weight file as a user has it; None for a peer without a file of its
    own, which leaves all but the linear layers as they are.
    """

    weights: dict[str, np.ndarray]
    stored_bytes: int
    seconds: float
    note: str = ""
    file_bytes: int | None = None
    embedding_bytes: int | None = None
    others: dict[str, np.ndarray] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def linear_names(weights: dict[str, np.ndarray]) -> list[str]:
    """The linear layers inside the blocks of a Llama."""
    return sorted(name for name in weights if LINEAR.fullmatch(name))


def run(quantize: Callable[[Job, str], Compressed], packages: tuple[str, ...]) -> None:
    """Do the job named on the command line; a variant that fails does not stop the next."""
    fields = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(fields[name]) for name in ("model", "out", "calibration", "squares")}
    numbers = {name: fields[name] for name in ("threads", "kept_bytes")}
    job = Job(variants=tuple(fields["variants"]), keep=fields.get("keep", False), **numbers, **paths)
    versions = {name: _version(name) for name in packages}
    for variant in job.variants:
        folder = job.out / variant
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = _write(job, folder, quantize(job, variant))
        except Exception as error:  # reported by the caller beside the variants that worked
            traceback.print_exc()
            report = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        (folder / "peer.json").write_text(json.dumps({"name": variant, "versions": versions, **report}, indent=2))


def _write(job: Job, folder: Path, compressed: Compressed) -> dict[str, Any]:
    dense = job.weights()
    names = linear_names(dense)
    if sorted(compressed.weights) != names:
        raise ValueError(f"{len(compressed.weights)} of the {len(names)} linear layers came back")
    for name, weight in {**compressed.weights, **compressed.others}.items():
        found = np.ascontiguousarray(weight, dtype=np.float32)
        if found.shape != dense[name].shape or not np.isfinite(found).all():
            raise ValueError(f"{name} came back with shape {found.shape} or with values that are not finite")
        dense[name] = found
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    embedding = sum(dense[name].size for name in EMBEDDINGS if name in dense)
    stored = compressed.embedding_bytes
    return {
        "bits": 8 * compressed.stored_bytes / sum(dense[name].size for name in names),
        "file_bytes": compressed.file_bytes or compressed.stored_bytes + job.kept_bytes,
        "embedding_bits": None if stored is None else 8 * stored / embedding,
        "seconds": compressed.seconds,
        "note": compressed.note,
        "details": compressed.details,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Clock:
    """`with Clock() as clock: ...` then `clock.seconds`."""

    seconds = 0.0

    def __enter__(self) -> Clock:
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun
