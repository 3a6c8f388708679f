"""The self-check at first use: which wrong libraries it finds, and what runs instead."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from operand_samples import needs_native

from featherweight.errors import FeatherError
from featherweight.model.decoder import native as decoder
from featherweight.model.decoder.architectures import UnsupportedModelError
from featherweight.model.products import dispatch
from featherweight.model.products import structs as c
from featherweight.native import library

pytestmark = needs_native


@pytest.fixture
def native() -> Iterator[library.NativeLibrary]:
    """The library, as if nothing had been checked or chosen yet; everything as it was afterwards."""
    chosen = os.environ.pop("FEATHERWEIGHT_ISA", None)
    cached = (dispatch._trusted, dispatch._say_lower, dispatch._say_none, library._trusted, library._load)
    for function in cached:
        function.cache_clear()
    found = library.get()
    assert found is not None
    found.select_isa("auto")
    yield found
    for function in cached:
        function.cache_clear()
    found.select_isa(chosen or "auto")
    if chosen is not None:
        os.environ["FEATHERWEIGHT_ISA"] = chosen
    dispatch.ready()  # other tests count calls


@pytest.fixture
def spoil(native: library.NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Double what layers give for so many tokens, in some instruction sets."""

    def by(tokens: int, *isas: str) -> None:
        right = c.needed().linear_apply

        def wrong(layer: int, *arguments: int) -> int:
            status = right(layer, *arguments)
            _, _, count, _, out, size, *_ = arguments  # x with its size, tokens and stride, out with its size
            if count == tokens and native.product_isa in isas:
                results = (ctypes.c_float * size).from_address(out)
                results[:] = [2 * value for value in results]
            return status

        monkeypatch.setattr(c.needed(), "linear_apply", wrong)

    return by


def test_a_right_library_passes_without_a_word(native: library.NativeLibrary) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for isa in native.isas():
            native.select_isa(isa)
            assert dispatch.ready()
            assert native.product_isa == isa or native.isa == isa


@pytest.mark.parametrize("tokens", dispatch.TOKENS)
def test_wrong_results_of_any_number_of_tokens_are_found(
    native: library.NativeLibrary, spoil: Callable[..., None], tokens: int
) -> None:
    """With every instruction set: PyTorch takes over, the native decoder says no, and one warning says why."""
    spoil(tokens, *library.ISAS)
    before = native.isa, native.product_isa
    with pytest.warns(RuntimeWarning, match="are wrong on this processor, with every instruction set") as told:
        assert not dispatch.ready()
    assert len(told) == 1
    assert (native.isa, native.product_isa) == before  # the solvers are right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.ready()
        with pytest.raises(UnsupportedModelError, match="wrong on this processor"):
            decoder.functions()


@pytest.mark.parametrize("tokens", dispatch.TOKENS)
def test_the_next_lower_instruction_set_takes_over(
    native: library.NativeLibrary, spoil: Callable[..., None], tokens: int
) -> None:
    best, *lower = native.isas()
    if not lower:
        pytest.skip("there is only one instruction set here")
    spoil(tokens, best)
    with pytest.warns(RuntimeWarning, match=f"uses {lower[0]} instructions: .* with {best} are wrong") as told:
        assert dispatch.ready()
    assert len(told) == 1
    assert native.product_isa == lower[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.ready()
        assert decoder.functions() is not None


BROKEN = r"""
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
struct linear { int64_t rows, cols, terms; void *term, *bias; };
const char* fw_product_isa(void);
int32_t fw_linear_apply(const struct linear* l, const float* x, int64_t x_count, int64_t tokens, int64_t stride,
                        float* out, int64_t out_count, int64_t out_stride, int32_t precision, int32_t threads) {
  int32_t (*real)(const void*, const float*, int64_t, int64_t, int64_t, float*, int64_t, int64_t, int32_t, int32_t) =
      dlsym(dlopen(REAL, RTLD_NOW), "fw_linear_apply");
  int32_t status = real(l, x, x_count, tokens, stride, out, out_count, out_stride, precision, threads);
  const char* only = getenv("BROKEN_ISA");
  if (tokens == 1 && (!only || !strcmp(only, fw_product_isa())))
    for (int64_t r = 0; r < l->rows; ++r) out[r] *= 2;
  return status;
}
"""
"""A library that is the real one but for what it gives for one token."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_library_that_doubles_one_token(
    native: library.NativeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, source, real = tmp_path / "broken.so", tmp_path / "broken.c", native.path.resolve()
    source.write_text(BROKEN)
    link = [str(real), f"-Wl,-rpath,{real.parent}"]
    made = subprocess.run(["cc", "-shared", "-fPIC", f'-DREAL="{real}"', str(source), "-o", str(broken), *link, "-ldl"],
                          capture_output=True, timeout=60)  # fmt: skip
    if made.returncode:
        pytest.skip("this compiler makes no such library")
    monkeypatch.setenv("FEATHERWEIGHT_NATIVE", str(broken))
    best, *lower = native.isas()
    if lower:
        monkeypatch.setenv("BROKEN_ISA", best)
        with pytest.warns(RuntimeWarning, match=f"uses {lower[0]} instructions: .*broken.so with {best} are wrong"):
            assert dispatch.ready()
        native.select_isa("auto")
        dispatch._trusted.cache_clear()
    monkeypatch.delenv("BROKEN_ISA", raising=False)
    with pytest.warns(RuntimeWarning, match="with every instruction set"):
        assert not dispatch.ready()
    with pytest.raises(UnsupportedModelError, match="wrong on this processor"):
        decoder.functions()


def test_each_instruction_set_has_a_check_of_its_own(native: library.NativeLibrary, spoil: Callable[..., None]) -> None:
    """A verdict about one says nothing about another that is chosen later."""
    isas = native.isas()
    if len(isas) < 3:
        pytest.skip("there are too few instruction sets here")
    assert dispatch.ready()
    spoil(1, isas[1])
    native.select_isa(isas[1])
    with pytest.warns(RuntimeWarning, match=f"with {isas[1]} are wrong"):
        assert dispatch.ready()
    assert native.product_isa == isas[2]


def test_wrong_solvers_take_the_next_lower_instruction_set(
    native: library.NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    solvers = list(dict.fromkeys(_solver_isas(native)))
    if len(solvers) < 2:
        pytest.skip("the solvers have only one instruction set here")
    right = library.NativeLibrary.unpack_trits

    def wrong(self: library.NativeLibrary, packed: torch.Tensor, count: int, packing: str) -> torch.Tensor:
        return right(self, packed, count, packing) * (0 if self.isa == solvers[0] else 1)

    monkeypatch.setattr(library.NativeLibrary, "unpack_trits", wrong)
    library._load.cache_clear()
    library._trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"uses {solvers[1]} instructions instead of {solvers[0]}"):
        found = library.get()
    assert found is not None
    assert found.isa == solvers[1]


def _solver_isas(native: library.NativeLibrary) -> Iterator[str]:
    for isa in native.isas():
        native.select_isa(isa)
        yield native.isa
    native.select_isa("auto")


def test_the_environment_chooses(native: library.NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in (*native.isas(), "auto"):
        library._load.cache_clear()
        monkeypatch.setenv("FEATHERWEIGHT_ISA", isa)
        found = library.get()
        assert found is not None
        assert isa in ("auto", found.product_isa, found.isa)
        assert dispatch.ready()


def test_the_environment_names_what_is_not_there(
    native: library.NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = next(isa for isa in library.ISAS if isa not in native.isas())
    before = native.isa, native.product_isa
    for name, words in (("sse9", "which is no instruction set"), (lacking, "does not have")):
        library._load.cache_clear()
        monkeypatch.setenv("FEATHERWEIGHT_ISA", name)
        with pytest.raises(
            FeatherError, match=f"FEATHERWEIGHT_ISA is '{name}', .*{words}.*: choose auto or .*baseline"
        ):
            library.get()
        assert (native.isa, native.product_isa) == before
