"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Else FEATHERWEIGHT_THREADS, OMP_NUM_THREADS, or the processors allowed."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where the network runs and layers are solved: cpu, cuda, cuda:1, mps, or auto, an accelerator if any.",
    ),
]
RunDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where the model runs: cpu, cuda, cuda:1, mps or auto. The native decoder is on the CPU; elsewhere "
        "transformers runs the model. Else a GPU, if there is one.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--max-device-memory", metavar="SIZE", help="Use so much of the device's memory: 8GB. Else what is free there."
    ),
]
Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A preset (see `feather methods`) or YAML.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a recipe field: grid.planes=3.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="For recipes that run the network: .txt, .jsonl, .parquet, a folder, hf:DATASET, self (conversations that "
        "the model writes), a mixture of these by weight (self=0.1,FILE=0.9), or a statistics file.",
    ),
]
Engine = Annotated[str, typer.Option("--engine", help="auto, native (the decoder for CPUs) or transformers.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
KvCache = Annotated[str, typer.Option("--kv-cache", help="Keys and values: auto, float16 or int8 (native only).")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .safetensors file or a hub id.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings for its class.")
]
