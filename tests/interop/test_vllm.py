"""vLLM really runs what is exported for it, and folders of ours by the plug-in. Skipped where vLLM is not installed.

Each model is run in a process of its own: vLLM keeps what it has taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import featherweight
from featherweight.interop.exporting import export
from featherweight.system.places import ASSETS

TOKENS = [11, 250, 77, 1030, 512, 4, 99, 2048, 300, 301, 18, 7]
RUN = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    folder, tokens = sys.argv[1], json.loads(sys.argv[2])
    model = LLM(folder, dtype="float16", max_model_len=256, max_num_seqs=4, enforce_eager=sys.argv[3] == "eager")
    asked = SamplingParams(temperature=0, max_tokens=4, logprobs=5, prompt_logprobs=0, ignore_eos=True)
    (found,) = model.generate([TokensPrompt(prompt_token_ids=tokens)], asked)
    told = [next(iter(entry.values())).logprob for entry in found.prompt_logprobs[1:]]
    print("FOUND" + json.dumps([told, list(found.outputs[0].token_ids)]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def by_vllm(folder: Path, script: Path, mode: str = "eager") -> tuple[list[float], list[int]]:
    """Log-probabilities of TOKENS from the second on, and what follows, greedily."""
    script.write_text(RUN)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, folder, json.dumps(TOKENS), mode],
        capture_output=True, text=True, timeout=550, env=environment, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    told, follows = json.loads(lines[0].removeprefix("FOUND"))
    return told, follows


def by_us(folder: Path) -> tuple[list[float], list[int]]:
    model, _ = featherweight.load(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].float().log_softmax(-1)
        told = [float(logits[place, token]) for place, token in enumerate(TOKENS[1:])]
        follows = model.generate(torch.tensor([TOKENS]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return told, follows[0, len(TOKENS) :].tolist()


def same(folder: Path, original: Path, script: Path, mode: str = "eager") -> None:
    told, follows = by_vllm(folder, script, mode)
    expected, continued = by_us(original)
    assert told == pytest.approx(expected, abs=0.05)  # float16, and kernels of another order
    assert follows == continued


@pytest.mark.parametrize("recipe", ["rtn-4", "ptqtp-tied"])
def test_vllm_runs_an_exported_folder(recipe: str, tmp_path: Path) -> None:
    featherweight.compress(ASSETS / "reference", recipe, tmp_path / "small", changes=("grid.group_size=64",))
    export(tmp_path / "small", "compressed-tensors", tmp_path / "out")
    same(tmp_path / "out", tmp_path / "small", tmp_path / "run.py")


@pytest.mark.skipif(
    not any(point.name == "featherweight" for point in entry_points(group="vllm.general_plugins")),
    reason="this installation of featherweight is not known to vLLM",
)
@pytest.mark.parametrize(
    ("recipe", "changes", "mode"),
    [
        ("ptqtp", (), "eager"),
        ("ptqtp", (), "compiled"),
        ("rtn-3", ("embedding=6bit",), "eager"),
        ("rtn-4", ("layers.skip=[k_proj]",), "eager"),
    ],
)
def test_vllm_runs_our_codes_by_the_plug_in(recipe: str, changes: tuple[str, ...], mode: str, tmp_path: Path) -> None:
    featherweight.compress(ASSETS / "reference", recipe, tmp_path / "small", changes=changes)
    same(tmp_path / "small", tmp_path / "small", tmp_path / "run.py", mode)
