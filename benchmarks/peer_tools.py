"""The tools that quality_vs_peers.py measures: their scripts, variants and environments."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Peer:
    """A tool, the script that runs it, the module that must import, and the variants that use calibration or not.

    `suffix` of the environment's folder and of the requirements' file, for a tool that needs one of its own; `squares`
    where it wants the mean squares of the layers' inputs instead of the tokens.
    """

    name: str
    script: str
    module: str
    calibrated: tuple[str, ...] = ()
    data_free: tuple[str, ...] = ()
    suffix: str = ""
    squares: bool = False

    def python(self, options: argparse.Namespace) -> Path:
        environment = options.peers_python.parent.parent
        return Path(environment.with_name(environment.name + self.suffix) / "bin" / "python")


LLAMA_CPP_TYPES = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS"),
    *("IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ1_0"),
)
TOOLS = (
    Peer(
        "llama.cpp",
        "quantize_llama_cpp.py",
        "llama_cpp",
        LLAMA_CPP_TYPES,
        ("Q4_K_M-plain", "Q3_K_M-plain", "Q3_K_S-plain"),
        squares=True,
    ),
    Peer("hqq", "quantize_hqq.py", "hqq", (), ("4bit-g128", "3bit-g128", "4bit-g64", "3bit-g64", "3bit-g64-axis0")),
    Peer(
        "nncf",
        "quantize_nncf.py",
        "nncf",
        ("int4-asym-g64-awq-se", "int4-sym-g64-awq-se"),
        ("int4-asym-g64", "int4-sym-g64"),
        suffix="-nncf",
    ),
    Peer(
        "llm-compressor",
        "quantize_llm_compressor.py",
        "llmcompressor",
        ("gptq-w4-g128", "gptq-w3-g128", "gptq-w4-g128-asym", "gptq-w3-g128-asym", "awq-w4-g128-asym"),
    ),
    Peer("turbopress", "quantize_turbopress.py", "turbopress", ("3bit-s16", "3bit-s64")),
)


def peer_environment() -> dict[str, str]:
    """Nothing of ours, and no hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def set_up(folder: Path) -> None:
    """Virtual environments with the peers. Compiles llama.cpp."""
    for suffix in dict.fromkeys(peer.suffix for peer in TOOLS):
        place = folder.with_name(folder.name + suffix)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", **os.environ}
        requirements = str(PEERS / f"requirements{suffix}.txt")
        install = [str(place / "bin" / "python"), "-m", "pip", "install", "-r", requirements]
        subprocess.run(install, env=environment, check=True)


def available(peer: Peer, python: Path) -> str | None:
    """None if the peer can be used, else why not."""
    if not python.is_file():
        return f"there is no {python} (make it with --setup, or name the environment of most with --peers-python)"
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
    if subprocess.run([str(python), "-c", find], env=peer_environment()).returncode:
        return f"{python} has no module {peer.module} (install benchmarks/peers/requirements{peer.suffix}.txt)"
    return None
