"""The forms of the commands and the keys of their JSON that scripts rely on."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from feather_command import Outcome, feather, feather_here
from safetensors.torch import load_file, save_file

import featherweight

ESCAPE = "\x1b"
HEAVY = ("torch", "transformers", "pydantic", "rich.progress", "matplotlib", "numpy", "yaml", "safetensors")


def read(path: Path) -> Any:
    """Strict JSON: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_compress_json(report: dict[str, Any]) -> None:
    for key in ("seconds", "peak_memory_bytes", "weights", "bits_per_weight"):
        assert is_number(report[key]), key
    assert report["layers"]
    for layer in report["layers"]:
        assert isinstance(layer["name"], str)
        assert isinstance(layer["code"], str)
        assert is_number(layer["bits_per_weight"])
        assert is_number(layer["relative_error"])


def test_json_replaces_earlier_results_alone(llama: Path, tmp_path: Path) -> None:
    """Said before the work; a file that is no result of the same command stays."""
    report, config, notes = tmp_path / "report.json", tmp_path / "config.json", tmp_path / "notes.txt"
    config.write_bytes((llama / "config.json").read_bytes())
    notes.write_text("mine")
    assert feather_here("inspect", llama, "--json", report).code == 0
    held = {path: path.read_bytes() for path in (report, config, notes)}
    assert feather_here("inspect", llama, "--json", report).code == 0
    assert "so it is not replaced" in feather_here("plan", llama, "--recipe", "rtn-4", "--json", report).sentence()
    for path in (config, notes):
        assert "so it is not replaced" in feather_here("inspect", llama, "--json", path).sentence()
        command = ("compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "out", "--json", path)
        assert "so it is not replaced" in feather_here(*command).sentence()
    assert "is no file" in feather_here("methods", "--json", tmp_path).sentence()
    assert {path: path.read_bytes() for path in held} == held
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compress_with_every_option(llama: Path, tmp_path: Path, text: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    command = (
        *("compress", llama, "--recipe", "ptqtp", "--out", out),
        *("--set", "grid.planes=3", "--set", "grid.group_size=64", "--calibration", text, "--threads", 1),
        *("--seed", 7, "--max-memory", "64GB", "--overwrite", "--json", report),
    )
    done = feather(*command)
    assert done.code == 0, done.errors
    assert ESCAPE not in done.output + done.errors
    found = read(report)
    check_compress_json(found)
    assert {layer["code"] for layer in found["layers"]} == {"3 trit-planes g64"}
    assert found["weights"] == sum(64 * n for n in (64, 32, 32, 64, 128, 128, 128)) * 2
    for shown in ("3 trit-planes g64", "14 layers", "7 tensors copied, 0 dropped"):
        assert shown in done.errors
    for shown in (str(out), "21: 14 replaced, 7 copied, 0 dropped", "peak memory"):
        assert shown in done.output
    config = read(out / "config.json")["quantization_config"]
    assert config["quant_method"] == "featherweight"
    assert config["recipe"]["grid"]["planes"] == 3
    assert "import featherweight" in config["note"]
    events = [json.loads(line) for line in (tmp_path / "out.log.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["plan", *["layer"] * 14, "shard", "done"]
    assert all(is_number(event["time"]) for event in events)
    assert [event["number"] for event in events if event["event"] == "layer"] == list(range(1, 15))
    assert all(is_number(event["relative_error"]) for event in events if event["event"] == "layer")


def test_compress_run_again(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("compress", llama, "--recipe", "rtn-4", "--out", out, "--json", tmp_path / "report.json")
    first = feather_here(*command)
    again = feather_here(*command)
    assert first.code == again.code == 0
    assert f"{out} is complete already; nothing to do" in again.output
    assert "complete already" not in first.output
    check_compress_json(read(tmp_path / "report.json"))
    refused = feather_here(*command, "--set", "grid.bits=3").sentence()
    assert "is the output of another command; choose another folder or replace it with --overwrite" in refused
    assert feather_here(*command, "--set", "grid.bits=3", "--overwrite").code == 0
    assert read(out / "featherweight.json")["recipe"]["grid"]["bits"] == 3


def test_several_changes_behind_one_set(llama: Path, tmp_path: Path) -> None:
    """`--set a=1 b=2` as well as `--set a=1 --set b=2`."""
    report = tmp_path / "plan.json"
    for sets in (
        ("--set", "grid.bits=3", "grid.group_size=32"),
        ("--set", "grid.bits=3", "--set", "grid.group_size=32"),
        ("--set=grid.bits=3", "--set", "grid.group_size=32"),
    ):
        for command in (
            ("plan", llama, "--recipe", "rtn-4", *sets, "--json", report),
            ("plan", "--recipe", "rtn-4", "--json", report, *sets, "--threads", "1", llama),
        ):
            assert feather_here(*command).code == 0
            assert read(report)["roles"][0]["code"] == "3 bit asymmetric g32"


def test_recipe_from_a_file(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("grid: {kind: uniform, bits: 5}\noverrides:\n  - {match: down_proj, grid: {bits: 6}}\n")
    report = tmp_path / "report.json"
    assert feather_here("compress", llama, "--recipe", recipe, "--out", tmp_path / "o", "--json", report).code == 0
    found = read(report)
    assert found["recipe"]["name"] == "mine"
    assert {layer["code"][:5] for layer in found["layers"]} == {"5 bit", "6 bit"}


MIXED = "allocation={kind: mixed-precision, bits: 4, grids: [{bits: 2}, {bits: 3}, {bits: 5}]}"


def test_plan_says_what_its_bytes_are(llama: Path, tmp_path: Path) -> None:
    """Those of layers that are measured; at most so many where they cannot be."""
    report = tmp_path / "plan.json"
    command = ("plan", llama, "--recipe", "rtn-3", "--set", "grid.group_size=32", MIXED, "--json", report)
    done = feather_here(*command)
    assert done.code == 0
    measured = read(report)
    assert measured["bytes_are"] == "planned after measuring"
    assert "(measured)" in done.output
    assert 3 < measured["bits_per_weight"] <= 4
    assert len({row["code"] for row in measured["roles"]}) > 1
    out = tmp_path / "made.json"
    made = ("compress", llama, *command[2:6], MIXED, "--out", tmp_path / "out", "--json", out)
    assert feather_here(*made).code == 0
    assert read(out)["bits_per_weight"] == measured["bits_per_weight"]
    done = feather_here(*command, "--set", "allocation.errors=outputs")
    assert done.code == 0
    bound = read(report)
    assert bound["bytes_are"] == "at most"
    assert "become at most" in done.output
    assert bound["output_bytes"] >= measured["output_bytes"]


def test_plan(llama: Path, tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    done = feather_here("plan", llama, "--recipe", "ptqtp", "--json", report)
    assert done.code == 0
    found = read(report)
    for key in (
        *("parameters", "weights", "layers", "bits_per_weight", "bits_per_weight_model", "source_bytes"),
        *("output_bytes", "disk_bytes", "memory_bytes", "seconds"),
    ):
        assert is_number(found[key]), key
    assert found["tensors"] == {"replaced": 14, "copied": 7, "dropped": 0}
    assert "2 trit-planes g128" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.slow
def test_eval_with_every_option(llama: Path, compressed: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "eval.json"
    command = ("--text", text, "--protocol", "strided", "--context", 64, "--limit", 400, "--threads", 1)
    done = feather("eval", compressed, "--against", llama, *command, "--json", report)
    assert done.code == 0, done.errors
    assert ESCAPE not in done.output + done.errors
    found = read(report)
    for key in ("perplexity", "tokens", "kl", "top1_agreement", "bytes"):
        assert is_number(found[key]), key
    assert found["protocol"] == "strided"
    assert found["kl"] > 0
    assert 0 <= found["top1_agreement"] <= 1
    assert found["bytes"] == (compressed / "model.safetensors").stat().st_size
    bits = found["bits_per_weight"]
    made = read(compressed / "featherweight.json")
    assert bits["linear"] == pytest.approx(made["bits_per_weight_linear"])
    assert bits["model"] == pytest.approx(made["bits_per_weight_model"])
    assert f"{found['perplexity']:.4f}" in done.output
    assert "protocol: " in done.output
    assert "windows of 64 tokens every 32" in done.output


@pytest.mark.parametrize(("protocol", "context"), [("own", None), ("2048", 32), ("4096", 32), ("llama.cpp", 32)])
def test_eval_protocols(compressed: Path, text: Path, tmp_path: Path, protocol: str, context: int | None) -> None:
    report = tmp_path / "eval.json"
    window = () if context is None else ("--context", context)
    assert feather_here("eval", compressed, "--text", text, "--protocol", protocol, *window, "--json", report).code == 0
    found = read(report)
    assert found["protocol"] == protocol
    assert found["context"] == (context or 128)
    assert found["kl"] is None
    assert found["top1_agreement"] is None


def test_eval_of_the_model_against_itself(llama: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "eval.json"
    assert feather_here("eval", llama, "--against", llama, "--text", text, "--json", report).code == 0
    found = read(report)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert found["bits_per_weight"] == {"linear": 16, "model": 16}


def test_generate(compressed: Path) -> None:
    def write(*options: Any) -> str:
        done = feather_here("generate", compressed, "--prompt", "It was", "--max-tokens", 12, *options)
        assert done.code == 0, done.errors
        assert done.output.startswith("It was")
        return done.output

    assert write("--temperature", 0) == write("--temperature", 0)
    sampled = write("--temperature", "1.5", "--seed", 1)
    assert sampled == write("--temperature", "1.5", "--seed", 1)
    assert sampled != write("--temperature", "1.5", "--seed", 2)


def test_chat(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd then?\n"))  # an empty line is no turn
    done = feather_here("chat", compressed, "--max-tokens", 5, "--temperature", 0, "--system", "Be brief.")
    assert done.code == 0, done.errors
    assert done.output.count("model: ") == 2


def test_inspect(llama: Path, compressed: Path, tmp_path: Path) -> None:
    report = tmp_path / "inspect.json"
    for folder, code in ((compressed, "2 trit-planes g128"), (llama, "dense bfloat16")):
        done = feather_here("inspect", folder, "--json", report)
        assert done.code == 0
        found = read(report)
        assert found["architecture"] == "LlamaForCausalLM"
        assert found["blocks"] == 2
        assert set(found["bits_per_weight"]) == {"linear", "model"}
        layers = {layer["name"]: layer for layer in found["layers"]}
        down = layers["model.layers.1.mlp.down_proj"]
        assert down["code"] == code
        assert down["shape"] == [64, 128]
        assert is_number(down["bits_per_weight"])
        assert "model.layers.1.mlp.down_proj" in done.output


def test_verify(llama: Path, compressed: Path) -> None:
    whole = feather_here("verify", compressed)
    assert whole.code == 0
    assert re.search(r"is whole: (\d+) of \1 tensors match their hashes, 14 compressed layers match", whole.output)
    assert "21 tensors carry no hash" in feather_here("verify", llama).output


def test_methods(tmp_path: Path) -> None:
    report = tmp_path / "methods.json"
    done = feather_here("methods", "--json", report)
    assert done.code == 0
    rows = {row["preset"]: row for row in read(report)}
    assert rows["ptqtp"]["grid"] == "trit-planes"
    assert rows["ptqtp"]["paper"].startswith("arXiv 2509.16989")
    assert rows["ptqtp"]["needs"] == "no data"
    # two planes of base-3 digits and two float16 scales a group of 128
    assert rows["ptqtp"]["bits"] == pytest.approx(2 * 8 / 5 + 2 * 16 / 128, abs=1e-3)
    assert rows["ptqtp"]["memory"] == "tensor"
    assert rows["gptq"]["seen_tokens"] == 128 * 512
    assert rows["trit-2"]["trained_tokens"] == 120 * 2048
    assert rows["rtn-4"]["bits"] == pytest.approx(4 + (16 + 4) / 128, abs=1e-3)
    for name in rows:
        assert name in done.output


def test_bench(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherweight.tasks.evaluate.speed.BUFFER_BYTES", 1 << 20)
    report = tmp_path / "bench.json"
    done = feather_here("bench", compressed, "--threads", 1, "--json", report)
    assert done.code == 0, done.errors
    found = read(report)
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second", "bytes_per_token", "bandwidth_gb_s"):
        assert is_number(found[key]), key
        assert found[key] > 0


def test_json_to_a_new_folder(llama: Path, tmp_path: Path) -> None:
    assert feather_here("plan", llama, "--recipe", "rtn-4", "--json", tmp_path / "a" / "b.json").code == 0
    assert read(tmp_path / "a" / "b.json")


def test_version_and_help() -> None:
    assert feather_here("--version").output == f"featherweight {featherweight.__version__}\n"
    shown = feather_here("--help")
    assert shown.code == 0
    for command in ("compress", "plan", "eval", "generate", "chat", "inspect", "verify", "methods", "bench", "demo"):
        assert re.search(rf"^  {command} ", shown.output, re.MULTILINE), command
        assert feather_here(command, "--help").code == 0


def test_starting_imports_nothing_heavy() -> None:
    program = (
        "import sys; import featherweight.cli.main as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    source = str(Path(featherweight.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": source, "PATH": ""}
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done


# Threads.


def test_threads_reach_the_kernels(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.native import library

    asked: list[int] = []

    def count(threads: int | None = None) -> int:
        asked.append(thread_count(threads))
        return asked[-1]

    thread_count = library.thread_count
    monkeypatch.setattr(library, "thread_count", count)
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", "3")
    arguments = ("eval", compressed, "--limit", 40, "--context", 20)
    assert feather_here(*arguments, "--threads", 2).code == 0
    assert set(asked) == {2}
    asked.clear()
    assert feather_here(*arguments).code == 0
    assert set(asked) == {3}


@pytest.mark.parametrize("value", ["20000", "abc", "0", "-1"])
def test_numbers_of_threads_that_make_no_sense(
    value: str, llama: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_THREADS", value)
    for command in (
        ("compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "out"),
        ("eval", compressed),
        ("generate", compressed, "--prompt", "a"),
        ("chat", compressed),
        ("bench", compressed),
        ("calibrate", llama, "--out", tmp_path / "out.safetensors"),
    ):
        assert "expected a number of threads from 1 to 1024" in feather_here(*command).sentence()
    monkeypatch.delenv("FEATHERWEIGHT_THREADS")
    for command in (
        ("compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "out"),
        ("eval", compressed),
        ("generate", compressed, "--prompt", "a"),
    ):
        assert "threads is 20000" in feather_here(*command, "--threads", "20000").sentence()
    assert not (tmp_path / "out").exists()


# Ctrl-C.


def interrupted_compress(model: str, out: str, errors: str) -> None:
    """Target of a process: `feather compress`, interrupted from the keyboard at the third layer."""
    import os
    import signal

    from featherweight.cli import progress
    from featherweight.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a script's background
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    shown = progress.Watcher.__call__

    def interrupt(self: Any, event: dict[str, Any]) -> None:
        shown(self, event)
        if event.get("number") == 3:
            os.kill(os.getpid(), signal.SIGINT)

    progress.Watcher.__call__ = interrupt  # type: ignore[method-assign]
    main(["compress", model, "--recipe", "rtn-4", "--out", out, "--threads", "1"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_interrupted_from_the_keyboard(llama: Path, tmp_path: Path) -> None:
    import multiprocessing

    errors = tmp_path / "errors"
    arguments = (str(llama), str(tmp_path / "out"), str(errors))
    process = multiprocessing.get_context("spawn").Process(target=interrupted_compress, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 130
    assert errors.read_text().splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert not (tmp_path / "out").exists()
    done: Outcome = feather_here(
        "compress", llama, "--recipe", "rtn-4", "--out", tmp_path / "out", "--json", tmp_path / "report.json"
    )
    assert done.code == 0
    assert read(tmp_path / "report.json")["resumed"] >= 3


def test_counts_of_tensors_add_up_on_the_terminal(llama: Path, tmp_path: Path) -> None:
    """Biases that no class asks for are dropped, and a wrapper's prefix goes."""
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")][:3]:
        tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    save_file({f"module.{n}": t for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    done = feather_here("compress", model, "--recipe", "rtn-4", "--out", out)
    assert "0 tensors copied, 7 renamed, 3 dropped" in done.errors
    assert "24: 14 replaced, 0 copied, 7 renamed, 3 dropped" in done.output
    planned = feather_here("plan", model, "--recipe", "rtn-4")
    assert "14 replaced, 0 copied, 7 renamed, 3 dropped" in planned.output


def test_compress_with_workers(llama: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert feather_here("compress", llama, "--recipe", "rtn-4", "--out", alone).code == 0
    done = feather_here("compress", llama, "--recipe", "rtn-4", "--out", shared, "--workers", 2)
    assert done.code == 0, done.errors
    made, shared_made = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (alone, shared))
    facts, shared_facts = (
        json.loads(found.pop("featherweight-run.json"))["compression"] for found in (made, shared_made)
    )
    assert made == shared_made
    assert facts.keys() == shared_facts.keys()
    assert facts["peak_memory_bytes"] > 0
    refused = feather_here("compress", llama, "--recipe", "gptq", "--out", tmp_path / "no", "--workers", 2)
    assert "leave --workers out" in refused.sentence()
