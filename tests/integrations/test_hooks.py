"""`import featherweight` is cheap and teaches transformers the format whenever transformers comes."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import featherweight
from featherweight.integrations import hooks
from featherweight.integrations.hooks import AfterImport


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_cheap() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "safetensors")
    code = "import sys, featherweight; featherweight.__version__, dir(featherweight)\n"
    assert python(code + f"print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


CHECK = (
    "from transformers.quantizers import auto\n"
    "assert auto.AUTO_QUANTIZER_MAPPING['featherweight'].__name__ == 'FeatherQuantizer'\n"
    "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['featherweight'].__name__ == 'FeatherConfig'\n"
)


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, featherweight",
        "import transformers.quantizers.auto\nimport featherweight",
        "import featherweight.integrations.transformers",
        "import featherweight, importlib\nimportlib.reload(featherweight)\n"
        "from transformers.quantizers import auto\nimportlib.reload(auto)",
    ],
)
def test_any_order_of_imports_registers(imports: str) -> None:
    assert "Warning" not in python(f"{imports}\n{CHECK}")


def test_installing_twice_adds_one_finder() -> None:
    hooks.install()
    importlib.reload(featherweight)
    assert sum(type(finder).__name__ == "AfterImport" for finder in sys.meta_path) == 1


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "watched_by_featherweight"
    (tmp_path / f"{name}.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield name
    sys.modules.pop(name, None)


def test_the_call_comes_after_execution_and_on_reload(watched: str) -> None:
    seen: list[int] = []
    sys.meta_path.insert(0, AfterImport(watched, lambda: seen.append(sys.modules[watched].value)))
    module = importlib.import_module(watched)
    assert seen == [1]
    importlib.reload(module)
    assert seen == [1, 1]
    assert importlib.util.find_spec(watched) is not None
    assert importlib.util.find_spec("no_such_module_anywhere") is None


def test_a_failing_registration_warns_and_does_not_break_the_import(
    watched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("broken")
    broken.register = lambda: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "featherweight.integrations.transformers", broken)
    sys.meta_path.insert(0, AfterImport(watched, hooks.register_or_warn))
    with pytest.warns(RuntimeWarning, match="could not register.*ZeroDivisionError"):
        assert importlib.import_module(watched).value == 1


def test_registering_twice_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.register_or_warn()
        hooks.register_or_warn()


def test_unknown_attributes_are_named() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = featherweight.nonsense
