"""`feather generate` and `feather chat` through the native decoder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight
from featherweight.cli.main import main
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
    said = iter(["Hello", "And then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    output, errors = run(capsys, "chat", str(folder), "--max-tokens", "6", "--temperature", "0", "--engine", "native")
    assert output.count("model: ") == 2
    assert "no chat template" not in errors
