"""Both backends of the solver."""

from __future__ import annotations

import pytest

from featherweight.native import library


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and library.get() is None:
        pytest.skip("the native library is not built")
    return str(request.param)


@pytest.fixture
def native() -> library.NativeLibrary:
    found = library.get()
    if found is None:
        pytest.skip("the native library is not built")
    return found
