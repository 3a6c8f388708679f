"""Real Ctrl-C at random moments: how many runs stop, with which exit code, and how long it takes.

Scripts (`NativeModel` in a program of the user's) and the command (`feather generate`, both engines), in the prompt
and in the generation. Of a script what counts is when KeyboardInterrupt leaves the call; it then uses the model again,
and its last one goes uncaught: Python ends by the signal itself, which a shell reports as 130. (How long Python takes
to end is not ours: with torch imported that is half a second of processor time.) Of the command the end of the process
counts.

    python benchmarks/interrupts.py --runs 100 --json bench-out/interrupts.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY = b"ready\n"
LONGEST = 60.0  # seconds until a run counts as not stopped
SHAPE = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 6, "num_attention_heads": 16}

EACH = 5  # signals that a script gets
SCRIPT = """
import sys, time
from featherweight.model.decoder.model import NativeModel
model = NativeModel.open(sys.argv[1], threads=int(sys.argv[3]), precision="float")
tokens = list(range(3, 203)) * (35 if sys.argv[2] == "prompt" else 1)
for left in reversed(range(int(sys.argv[4]))):
    try:
        model.reset()
        print("ready", flush=True)
        model.generate(tokens, 6000, on_token=lambda token: None, stops=())
        print("not stopped", flush=True)
    except KeyboardInterrupt:
        print("caught", time.monotonic(), flush=True)
        assert len(model.generate(tokens[:3], 2, stops=())) == 2
        if left == 0:
            raise
"""

COMMAND = """
import sys
from featherweight.cli import backends
from featherweight.cli.main import main

for backend in (backends.NativeBackend, backends.TransformersBackend):
    def write(self, tokens, choices, write=backend.write):
        print("ready", flush=True)
        return write(self, tokens, choices)
    backend.write = write
main()
print("not stopped", flush=True)
"""


@dataclass(frozen=True)
class Run:
    kind: str
    code: int
    seconds: float
    clean: bool  # nothing on standard error but what is to be there

    @property
    def stopped(self) -> bool:
        return self.code == 130 and self.clean


def make_model(folder: Path) -> Path:
    """Random weights and the tokenizer of the bundled model: a prompt of thousands of tokens takes it a minute."""
    import shutil

    import torch
    import transformers

    import featherweight

    transformers.utils.logging.set_verbosity_error()
    reference = Path(featherweight.__file__).parent / "assets" / "reference"
    vocabulary = json.loads((reference / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=8192, **SHAPE)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference / name, folder)
    return endless(folder)


def endless(folder: Path) -> Path:
    """No token ends an answer."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    return folder


def copied(model: Path, folder: Path) -> Path:
    """A model of somebody's, whose files stay as they are."""
    import shutil

    return endless(Path(shutil.copytree(model, folder, dirs_exist_ok=True)))


def command_line(kind: str, folder: Path, threads: int) -> list[str]:
    who, moment = kind.split(", ")
    if who == "script":
        return [sys.executable, "-c", SCRIPT, str(folder), moment, str(threads), str(EACH)]
    engine = who.removeprefix("feather ")
    prompt = "It was the best of times, it was the worst of times. " * (350 if moment == "prompt" else 1)
    options = ["--engine", engine, "--dtype", "float32", "--max-tokens", "6000", "--threads", str(threads)]
    return [sys.executable, "-c", COMMAND, "generate", str(folder), "--prompt", prompt, *options]


def interrupt_script(kind: str, folder: Path, threads: int, waits: list[float]) -> list[Run]:
    process = start(kind, folder, threads)
    assert process.stdout is not None
    assert process.stderr is not None
    seconds = []
    for wait in waits:
        line = process.stdout.readline()
        assert line == READY, line + process.stderr.read()
        time.sleep(wait)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        word, _, moment = process.stdout.readline().decode().partition(" ")
        seconds.append(float(moment) - begun if word == "caught" else LONGEST)
    errors = process.stderr.read().decode()
    process.wait()
    clean = errors.rstrip().endswith("KeyboardInterrupt") and "ignored" not in errors
    code = 130 if process.returncode == -signal.SIGINT else process.returncode
    return [Run(kind, code, one, clean) for one in seconds]


def start(kind: str, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_line(kind, folder, threads), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def interrupt_command(kind: str, folder: Path, threads: int, wait: float) -> Run:
    process = start(kind, folder, threads)
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.endswith(READY):
            break
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    begun = time.perf_counter()
    rescue = threading.Timer(LONGEST, process.kill)
    rescue.start()
    process.wait()  # with a time-out it would look only every twentieth of a second
    seconds = time.perf_counter() - begun
    rescue.cancel()
    output, errors = process.stdout.read(), process.stderr.read().decode()
    return Run(kind, process.returncode, seconds, errors == "interrupted\n" and b"not stopped" not in output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="half of them scripts, half the command")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds until the signal, at most")
    parser.add_argument("--model", type=Path, help="a folder that the native decoder reads, in place of random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    scripts = ["script, prompt", "script, generation"]
    commands = [
        f"feather {engine}, {moment}" for engine in ("native", "transformers") for moment in ("prompt", "generation")
    ]
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder)) if options.model is None else copied(options.model, Path(folder))
        for number in range(options.runs // 2 // EACH):
            waits = [draw.uniform(0.0, options.longest) for _ in range(EACH)]
            runs += interrupt_script(scripts[number % len(scripts)], model, options.threads, waits)
            notify(runs[-EACH:])
        for number in range(options.runs // 2):
            kind = commands[number % len(commands)]
            runs.append(interrupt_command(kind, model, options.threads, draw.uniform(0.0, options.longest)))
            notify(runs[-1:])
    print(f"{'':<32} {'runs':>5} {'stopped, 130, clean':>20} {'within 0.2 s':>13} {'median s':>9} {'longest s':>10}")
    for kind in [*scripts, *commands]:
        show(kind, [run for run in runs if run.kind == kind])
    show("all", runs)
    for run in runs:
        if not run.stopped or run.seconds > 0.2:
            print(f"  {run}")
    if options.json:
        Path(options.json).absolute().parent.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {
            "threads": options.threads,
            "load": os.getloadavg()[0],
            "runs": [vars(r) for r in runs],
        }
        Path(options.json).write_text(json.dumps(report, indent=1))


def notify(runs: list[Run]) -> None:
    for run in runs:
        print(
            f"{run.kind}: {run.code}, {run.seconds:.3f} s{'' if run.clean else ', not clean'}",
            file=sys.stderr,
            flush=True,
        )


def show(kind: str, runs: list[Run]) -> None:
    if runs:
        times = [run.seconds for run in runs]
        stopped, soon = sum(run.stopped for run in runs), sum(seconds <= 0.2 for seconds in times)
        print(
            f"{kind:<32} {len(runs):>5} {stopped:>20} {soon:>13} {statistics.median(times):>9.3f} {max(times):>10.3f}"
        )


if __name__ == "__main__":
    main()
