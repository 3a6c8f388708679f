"""`feather generate` and `feather chat` through the native decoder."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import featherweight
from featherweight.cli.main import main
from featherweight.model.decoder.model import NativeModel
from models import make_tiny

REFERENCE = Path(featherweight.__file__).parent / "assets" / "reference"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit):
        main(list(arguments))
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_both_engines_write_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "She said that", "--max-tokens", "40", "--temperature", "0", "--dtype", "float32")
    written = [
        run(capsys, "generate", str(REFERENCE), *options, "--engine", engine)[0]
        for engine in ("native", "transformers")
    ]
    assert written[0] == written[1]
    assert len(written[0]) > 60


def test_the_seed_decides(capsys: pytest.CaptureFixture[str]) -> None:
    def write(seed: int) -> str:
        options = ("--prompt", "It was", "--max-tokens", "12", "--seed", str(seed), "--engine", "native")
        return run(capsys, "generate", str(REFERENCE), *options)[0]

    assert write(1) == write(1)
    assert write(1) != write(2)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_penalty_and_least_share(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*options: str) -> str:
        always = ("--prompt", "She said that", "--max-tokens", "40", "--dtype", "float32", "--engine", engine)
        return run(capsys, "generate", str(REFERENCE), *always, *options)[0]

    likeliest = write("--temperature", "0")
    assert write("--temperature", "1.5", "--top-k", "0", "--min-p", "1") == likeliest  # nothing else has its share
    assert write("--temperature", "1.5", "--top-k", "0", "--min-p", "0") != likeliest
    penalised = write("--temperature", "0", "--repetition-penalty", "1.8")
    assert penalised != likeliest
    assert len(set(penalised.split())) > len(set(likeliest.split()))


def test_both_engines_penalise_alike(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "She said that", "--max-tokens", "40", "--temperature", "0", "--repetition-penalty", "1.3")
    written = {
        run(capsys, "generate", str(REFERENCE), *options, "--dtype", "float32", "--engine", engine)[0]
        for engine in ("native", "transformers")
    }
    assert len(written) == 1


def test_the_folder_s_penalty_counts_until_another_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(REFERENCE, tmp_path / "model"))
    found = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(found | {"repetition_penalty": 1.8}))

    def write(model: Path, *options: str) -> str:
        always = ("--prompt", "She said that", "--max-tokens", "30", "--temperature", "0", "--engine", "native")
        return run(capsys, "generate", str(model), *always, *options)[0]

    assert write(folder) == write(REFERENCE, "--repetition-penalty", "1.8")
    assert write(folder, "--repetition-penalty", "1") == write(REFERENCE) != write(folder)


def test_keys_and_values_in_eight_bits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = NativeModel.open

    def spy(*arguments: Any, **named: Any) -> NativeModel:
        opened.append(original(*arguments, **named))
        return opened[-1]

    monkeypatch.setattr(NativeModel, "open", spy)
    options = ("--prompt", "She said that", "--max-tokens", "8", "--temperature", "0", "--kv-cache")
    for cache, expected in (("int8", "int8"), ("auto", "float16")):
        assert run(capsys, "generate", str(REFERENCE), *options, cache)[0].startswith("She said that")
        assert opened[-1].kv_cache == expected


def test_transformers_is_not_imported() -> None:
    program = (
        "import sys\nfrom featherweight.cli.main import main\n"
        f"try: main(['generate', {str(REFERENCE)!r}, '--prompt', 'It was', '--max-tokens', '4'])\n"
        "except SystemExit: pass\n"
        "assert 'transformers' not in sys.modules\nprint('not imported')"
    )
    source = str(Path(featherweight.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment(source))
    assert "not imported" in done.stdout, done.stderr


def _environment(source: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def test_other_families_go_through_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny("gpt2", tmp_path, tokenizer=True)
    options = ("generate", str(folder), "--prompt", "ab", "--max-tokens", "3")
    output, errors = run(capsys, *options)
    assert output.startswith("ab")
    assert "gpt2" in errors
    assert "transformers runs it instead" in errors
    output, errors = run(capsys, *options, "--engine", "native")
    assert errors.startswith("error: the native decoder does not know the model type 'gpt2'")
    assert output == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--engine", "fast"), "--engine is 'fast'"),
        (("--engine", "native", "--dtype", "bfloat16"), "not in bfloat16"),
        (("--kv-cache", "int4"), "--kv-cache is 'int4', expected one of auto, float16, int8"),
        (("--kv-cache", "int8", "--engine", "transformers"), "--kv-cache int8 is the native decoder's"),
    ],
)
def test_options_that_cannot_be(options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, errors = run(capsys, "generate", str(REFERENCE), "--prompt", "a", *options)
    assert errors.startswith("error: ")
    assert words in errors


def test_a_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    _, errors = run(capsys, "generate", str(REFERENCE), "--prompt", "word " * 3000, "--engine", "native")
    assert "do not fit the context of 2048" in errors


def test_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(REFERENCE, tmp_path / "model"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nAnd then?\n"))  # an empty line is no turn
    output, errors = run(capsys, "chat", str(folder), "--max-tokens", "6", "--temperature", "0", "--engine", "native")
    assert output.count("model: ") == 2
    assert "no chat template" not in errors
