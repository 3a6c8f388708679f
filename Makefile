# Everything a person or CI does. A fresh clone needs Python >= 3.10 and, for the native kernels, a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/featherweight/kernels/native/*)
THREADS ?= 2

.PHONY: demo test lint bench sanitize docs lock clean

# Set-up: a virtual environment with the locked versions, then the package itself, editable, kernels compiled.
$(STAMP): pyproject.toml requirements.lock $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit("featherweight needs Python >= 3.10") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/feather demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/ptqtp_solver.py --threads $(THREADS) --json bench-out/ptqtp_solver.json
	$(BIN)/python benchmarks/compress_synthetic.py --shape 1.1b --threads $(THREADS) --json bench-out/compress_1.1b.json
	$(BIN)/python benchmarks/kill_and_resume.py --json bench-out/kill_and_resume.json

# The kernels' own tests under the address and undefined-behaviour sanitizers, without Python.
sanitize:
	cmake -S . -B build/sanitize -DFEATHERWEIGHT_SANITIZE=ON -DFEATHERWEIGHT_NATIVE_TESTS=ON
	cmake --build build/sanitize --parallel $(THREADS)
	ctest --test-dir build/sanitize --output-on-failure

docs: $(STAMP)
	$(BIN)/python scripts/make_docs.py

# Versions for every supported Python in one file, by markers; see the head of the file about torch.
lock:
	$(BIN)/python scripts/make_lock.py

clean:
	rm -rf $(VENV) build demo-out bench-out
