"""What newcomers get wrong, a case each: one sentence that names what, where and what to do; nothing is written.

Code 1 is for what a command finds wrong, code 2 for what is no use of a command at all.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from feather_command import feather_here

COMPRESS = "compress {model} --out {out}"

MISTAKES: dict[str, tuple[int, tuple[str, ...]]] = {
    # commands
    "quantize {model}": (2, ("'quantize'", "did you mean 'compress'?")),
    "comprss {model}": (2, ("'comprss'", "did you mean 'compress'?")),
    "evaluate {model}": (2, ("'evaluate'", "did you mean 'eval'?")),
    "list": (2, ("'list'", "did you mean 'methods'?")),
    "{model}": (2, ("there is no command", "there are compress")),
    "--compress {model}": (2, ("--compress", "feather --help")),
    # options
    "compress {model} --recipe rtn-4 --output {out}": (2, ("--output", "did you mean '--out'?")),
    "compress {model} --recipe rtn-4 -o {out}": (2, ("-o", "did you mean '--out'?")),
    "compress {model} --recpe rtn-4 --out {out}": (2, ("--recpe", "did you mean '--recipe'?")),
    "compress {model} --recipe rtn-4": (2, ("needs --out DIR", "folder to make", "--help")),
    COMPRESS: (2, ("needs --recipe NAME|FILE", "feather methods", "--help")),
    "compress --recipe rtn-4 --out {out}": (2, ("needs MODEL", "a folder, a .safetensors file or a hub id")),
    COMPRESS + " --recipe rtn-4 --bits 3": (2, ("--bits", "--set grid.bits=3")),
    COMPRESS + " --recipe rtn-4 --cuda": (2, ("--cuda", "--device cuda")),
    COMPRESS + " --recipe rtn-4 --protocol 2048": (2, ("--protocol", "one of feather eval")),
    "eval {model} --recipe rtn-4": (2, ("--recipe", "feather compress")),
    "eval {model} --original {model}": (2, ("--original", "did you mean '--against'?")),
    "generate {model} --prompt hello --max-new-tokens 5": (2, ("--max-new-tokens", "'--max-tokens'")),
    "verify {model} --text {text}": (2, ("--text", "feather eval")),
    "generate {model} --prompt Once upon a time": (2, ("'upon a time'", "quotation marks")),
    COMPRESS + " --recipe": (2, ("--recipe lacks its value", "a preset")),
    COMPRESS + " rtn-4": (2, ("needs --recipe",)),
    # values
    COMPRESS + " --recipe rtn-4 --threads two": (2, ("--threads is 'two'", "a whole number")),
    COMPRESS + " --recipe rtn-4 --threads 0": (2, ("--threads is '0'", "1")),
    COMPRESS + " --recipe rtn-4 --seed 1.5": (2, ("--seed is '1.5'", "a whole number")),
    COMPRESS + " --recipe rtn-4 --workers -1": (2, ("--workers is '-1'", "1")),
    COMPRESS + " --recipe rtn-4 --max-memory lots": (1, ("--max-memory", "'lots'", "2GB")),
    COMPRESS + " --recipe rtn-4 --max-memory -1GB": (1, ("--max-memory", "'-1GB'", "2GB")),
    COMPRESS + " --recipe rtn-4 --max-memory 1,5GB": (1, ("--max-memory", "'1,5GB'", "like 1.5GB")),
    COMPRESS + " --recipe rtn-4 --max-memory 2GBit": (1, ("--max-memory", "'2GBit'", "2GB")),
    COMPRESS + " --recipe rtn-4 --max-memory 10kB": (1, ("--max-memory 10 kB", "needs")),
    COMPRESS + " --recipe rtn-4 --device gpu": (1, ("'gpu'", "cpu")),
    COMPRESS + " --recipe rtn-4 --device cuda:99": (1, ("cuda:99", "cpu")),
    "eval {model} --protocol wikitext2": (1, ("protocol", "'wikitext2'", "own")),
    "eval {model} --dtype fp16": (1, ("dtype", "'fp16'", "float16")),
    "eval {model} --context 1k": (2, ("--context is '1k'", "a whole number")),
    "eval {model} --limit 1": (2, ("--limit is '1'", "2")),
    "generate {model} --prompt a --engine llama.cpp": (1, ("--engine is 'llama.cpp'", "native")),
    "generate {model} --prompt a --temperature warm": (2, ("--temperature is 'warm'", "a number")),
    "generate {model} --prompt a --temperature -1": (2, ("--temperature is '-1'", "0")),
    "generate {model} --prompt a --top-p 90": (2, ("--top-p is '90'", "1")),
    "generate {model} --prompt a --kv-cache int4": (1, ("--kv-cache is 'int4'", "int8")),
    "generate {model} --prompt a --max-tokens 0": (2, ("--max-tokens is '0'", "1")),
    "bench {model} --repeats none": (2, ("--repeats is 'none'", "a whole number")),
    "recommend {model} --ram 8": (1, ("--ram 8 B", "8GB")),
    "recommend {model} --ram much": (1, ("--ram", "'much'", "2GB")),
    "recommend {model} --size 1kB": (1, ("--size", "would do")),
    "recommend {model} --quality good": (1, ("--quality is 'good'", "percent")),
    "recommend {model} --quality -3": (1, ("--quality is '-3'", "percent")),
    # recipes
    COMPRESS + " --recipe GPTQ": (1, ("'GPTQ'", "did you mean 'gptq'?")),
    COMPRESS + " --recipe gptq4": (1, ("'gptq4'", "did you mean 'gptq", "feather methods")),
    COMPRESS + " --recipe trit2": (1, ("'trit2'", "did you mean 'trit-2'?")),
    COMPRESS + " --recipe Q4_K_M": (1, ("'Q4_K_M'", "llama.cpp", "four")),
    COMPRESS + " --recipe mine.yml": (1, ("no recipe file mine.yml", "feather methods")),
    COMPRESS + " --recipe {folder}": (1, ("{folder}", "folder", "feather methods")),
    COMPRESS + " --recipe {grd}": (1, ("{grd}", "no field grd", "did you mean 'grid'?")),
    COMPRESS + " --recipe {later}": (1, ("{later}", "no field sparsity", "featherweight 0.1.0")),
    COMPRESS + " --recipe {report}": (1, ("{report}", "recipe of a compressed folder", "--recipe")),
    COMPRESS + " --recipe {text}": (1, ("{text}", "a mapping of fields")),
    COMPRESS + " --recipe rtn-4 --set grid.bits 3": (2, ("'3'", "FIELD=VALUE")),
    COMPRESS + " --recipe rtn-4 --set bits=3": (1, ("no field bits", "did you mean 'grid.bits'?")),
    COMPRESS + " --recipe rtn-4 --set grid.bits=three": (1, ("grid.bits is 'three'", "integer")),
    COMPRESS + " --recipe rtn-4 --set grid.bits=16": (1, ("grid.bits is 16", "8")),
    COMPRESS + " --recipe rtn-4 --set grid.groupsize=64": (1, ("grid.groupsize", "'group_size'")),
    COMPRESS + " --recipe rtn-4 --set grid.kind=trit": (1, ("no grid called 'trit'", "trit-planes")),
    COMPRESS + " --recipe rtn-4 --set layers.skip=q_prj": (1, ("'q_prj'", "layers.skip", "did you mean 'q_proj'?")),
    COMPRESS + " --recipe rtn-4 --set layers.include=[mpl]": (1, ("'mpl'", "layers.include", "did you mean 'mlp'?")),
    COMPRESS + " --recipe rtn-4 --set embedding=9bit": (1, ("embedding is '9bit'", "6bit")),
    COMPRESS + " --recipe rtn-4 --set head=true": (1, ("head is True", "keep")),
    COMPRESS + " --recipe rtn-4 --set corrections=lorc": (1, ("corrections", "'lorc'", "[{{kind: lorc}}]")),
    COMPRESS + " --recipe rtn-4 --set overrides={{match:down_proj}}": (1, ("overrides", "must be a list")),
    COMPRESS + " --recipe gptq --set calibration=64": (1, ("calibration is 64", "must be a mapping")),
    COMPRESS + " --recipe rtn-4 --set grid.symmetric=perhaps": (1, ("grid.symmetric is 'perhaps'", "true or false")),
    COMPRESS + " --recipe gptq --set calibration.sequences=many": (1, ("calibration.sequences is 'many'", "integer")),
    COMPRESS + " --recipe gptq --set calibration.lenght=64": (1, ("calibration.lenght", "did you mean 'length'?")),
    "plan {model} --set grid.bits=3": (1, ("--set grid.bits=3", "--recipe")),
    "methods gtpq": (1, ("'gtpq'", "did you mean 'gptq'?")),
    # models
    "compress ./nowhere --recipe rtn-4 --out {out}": (1, ("nowhere", "no folder or file")),
    "inspect {text}": (1, ("{text}", "is not a model", "a folder, a .safetensors file or a hub id")),
    "compress {folder} --recipe rtn-4 --out {out}": (1, ("{folder}", "has no config.json")),
    "compress {model}/config.json --recipe rtn-4 --out {out}": (1, ("config.json", "is not a model", "{model}")),
    "eval {model} --against ./nowhere": (1, ("nowhere", "no folder or file")),
    "chat {folder}": (1, ("{folder}", "has no config.json")),
    # files
    "compress {model} --recipe rtn-4 --out {text}": (1, ("--out {text}", "is a file", "folder")),
    "compress {model} --recipe rtn-4 --out {model}": (1, ("{model}", "choose")),
    "compress {model} --recipe gptq --out {out} --calibration text.txt": (1, ("text.txt", "no calibration file")),
    "eval {model} --text missing.txt": (1, ("missing.txt", "no text file")),
    "eval {model} --text {folder}": (1, ("{folder}", "is a folder", "file")),
    "eval {model} --conversations missing.jsonl --against {model}": (1, ("--conversations", "chat template")),
    "eval {model} --conversations {text}": (1, ("conversations", "--against")),
    "generate {model} --prompt-file missing.txt": (1, ("missing.txt", "--prompt-file")),
    "generate {model} --prompt-file {folder}": (1, ("{folder}", "is a folder", "--prompt-file")),
    "generate {model} --prompt a --prompt-file {text}": (2, ("--prompt", "--prompt-file", "one of")),
    "generate {model}": (2, ("--prompt", "--prompt-file")),
    "generate {model} --prompt -": (1, ("the prompt is empty", "standard input")),
    "calibrate {model} --out {folder}": (1, ("{folder}",)),
    "calibrate {model} --out {out}.safetensors --needs gramm": (1, ("'gramm'", "did you mean 'gram'?")),
    "methods --json {folder}": (1, ("--json {folder}", "no file")),
    # other tools
    "convert {model}": (2, ("'convert'", "did you mean 'export'?")),
    "export {model} --out {out}": (2, ("needs --to FORMAT", "--help")),
    "export {model} --to gguf": (2, ("needs --out PATH", "--help")),
    "export {model} --format gguf --out {out}": (2, ("--format", "did you mean '--to'?")),
    "export {model} --to gguf --out {out} --outtype q8_0": (2, ("--outtype", "--set type=q8_0")),
    "export {model} --to ggml --out {out}": (1, ("'ggml'", "did you mean 'gguf'?")),
    "export {model} --to gguf --out {out} --set typ=q8_0": (1, ("'typ'", "did you mean 'type'?")),
    "export {model} --to gguf --out {out} --set type=q8": (1, ("type is 'q8'", "did you mean 'q8_0'?")),
    "export {model} --to gguf --out {out} --set type": (2, ("'type'", "--set KEY=VALUE")),
    "export {model} --to gguf --out {out} --set lossless=perhaps": (1, ("lossless is 'perhaps'", "boolean")),
    "export {model} --to gguf --out {text}": (1, ("{text}", "is there already")),
    "export {folder} --to gguf --out {out}": (1, ("{folder}", "has no config.json")),
    "check {model} --target llamacpp": (1, ("'llamacpp'", "did you mean 'llama.cpp'?")),
    "check {model}": (2, ("needs --target NAME", "--help")),
    "check {model} --target llama.cpp --tensor-parallel 0": (2, ("--tensor-parallel is '0'", "1")),
    "demo --out {text}": (1, ("--out {text}", "is a file", "folder")),
}


@pytest.fixture
def places(llama: Path, text: Path, tmp_path: Path) -> dict[str, str]:
    """What stands for the names in braces."""
    given = tmp_path / "given"
    (given / "folder").mkdir(parents=True)
    (given / "grd.yaml").write_text("grd: {kind: uniform, bits: 4}\n")
    (given / "later.yaml").write_text("grid: {kind: uniform, bits: 4}\nsparsity: {kind: wanda}\n")
    (given / "featherweight.json").write_text(json.dumps({"format_version": 1, "recipe": {"name": "rtn-4"}}))
    return {
        "model": str(llama),
        "text": str(text),
        "out": str(tmp_path / "out"),
        "folder": str(given / "folder"),
        "grd": str(given / "grd.yaml"),
        "later": str(given / "later.yaml"),
        "report": str(given / "featherweight.json"),
    }


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(line: str, places: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    before = sorted(tmp_path.rglob("*"))
    code, fragments = MISTAKES[line]
    done = feather_here(*[word.format(**places) for word in line.split(" ")])
    assert done.code == code, done
    lines = [one for one in done.errors.splitlines() if one.startswith("error: ")]
    assert len(lines) == 1, done.errors
    assert lines[0] == done.errors.splitlines()[-1]
    assert "Traceback" not in done.errors
    for fragment in fragments:
        assert fragment.format(**places) in lines[0], lines[0]
    assert done.output == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_no_sentence_is_a_page(places: dict[str, str]) -> None:
    """What is known is listed where it is short."""
    for line in ("compress {model} --out {out} --recipe nothing-like-it", "methods nothing-like-it"):
        said = feather_here(*[word.format(**places) for word in line.split(" ")]).sentence()
        assert len(said) < 200, said
        assert "feather methods" in said


@pytest.mark.parametrize("changes", ["grid.bits=3", {"grid.bits": 3}, 3])
def test_changes_in_python_are_a_list(llama: Path, tmp_path: Path, changes: Any) -> None:
    import featherweight

    with pytest.raises(featherweight.RecipeError) as caught:
        featherweight.compress(llama, "rtn-4", tmp_path / "out", changes=changes)
    assert "changes" in str(caught.value)
    assert "['grid.bits=3']" in str(caught.value)
    with pytest.raises(featherweight.RecipeError, match=r"\['grid\.bits=3'\]"):
        featherweight.load_recipe("rtn-4", changes)
