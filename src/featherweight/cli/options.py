"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.console import be_quiet


def preset_names(incomplete: str) -> list[str]:
    """Presets that come with the package, for the shell to complete."""
    from featherweight.system.places import PRESETS

    return sorted(path.stem for path in PRESETS.glob(f"{incomplete}*.yaml"))


def train_preset_names(incomplete: str) -> list[str]:
    """Presets of trainings, for the shell to complete."""
    from featherweight.system.places import PRESETS

    return sorted(path.stem for path in (PRESETS / "train").glob(f"{incomplete}*.yaml"))


def train_dtype(name: str) -> str:
    """WrongUse where a training cannot compute in it."""
    from featherweight.cli.console import WrongUse

    if name not in ("auto", "float32", "bfloat16"):
        raise WrongUse(f"--dtype {name} is nothing that a training computes in: auto, float32 or bfloat16")
    return name


def task_names(given: list[str] | None) -> list[str] | None:
    """Of `--tasks`, which may stand several times, with commas between names."""
    return None if given is None else [name.strip() for part in given for name in part.split(",") if name.strip()]


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - prints it, and nothing else."),
]
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
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=be_quiet, help="No progress and no notes: results and errors alone."),
]
_recipe = typer.Option(
    "--recipe",
    metavar="NAME|FILE",
    help="A preset (see `feather methods`) or a YAML file.",
    autocompletion=preset_names,
)
Recipe = Annotated[str, _recipe]
OptionalRecipe = Annotated[str | None, _recipe]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a recipe field: grid.planes=3.")
]
TrainRecipe = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A preset of trainings, or a YAML file.",
        autocompletion=train_preset_names,
    ),
]
TrainChanges = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a recipe field: forward.scope=row.")
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
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Questions with right answers, commas between: novels-choice, novels-cloze (shipped), a .jsonl file; with "
        "featherweight[tasks] also those of lm-evaluation-harness. Adds accuracies, and paired tests with --against.",
    ),
]
Items = Annotated[
    int | None, typer.Option("--items", metavar="N", min=1, help="Use only the first N items of each task.")
]
Answering = Annotated[
    str, typer.Option("--engine", help="What answers the tasks: transformers, or native (the decoder for CPUs).")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Compute type: auto, float32, bfloat16 or float16.")]
KvCache = Annotated[str, typer.Option("--kv-cache", help="Keys and values: auto, float16 or int8 (native only).")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .safetensors file or a hub id.")]
StackSize = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", help="Of a stack: as many blocks as this weight file holds, 60MB."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings for its class.")
]
Sensitivity = Annotated[
    str,
    typer.Option(
        "--sensitivity",
        metavar="NAME",
        help="How it is found what hangs on each layer: kl, gradient, fisher, lim, zd, fidelity or weights.",
    ),
]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, help="Processes that must be able to share every layer.")
]
TokensPerSecond = Annotated[
    float | None,
    typer.Option("--tokens-per-second", help="Least rate of products in decoding, by rates measured here."),
]
