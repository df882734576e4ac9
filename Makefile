# Every command makes its own environment in .venv and needs only Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/* csrc/*.py)
# The CUDA kernels take minutes to compile: here they are built only for a torch that can run them (cuda-check builds all).
HAS_CUDA = $(shell $(BIN)/python -c 'import torch; print(int(torch.version.cuda is not None))')

.PHONY: demo test test-libraries scale-demo fuzz bench sanitize compilers cuda-check lint format docs info clean

demo: $(VENV)/.built
	$(BIN)/writesae demo

# The CUDA kernels too, compiled for the CPU. A file of tests a core at a time, on four at most; threads that wait for one
# another sleep, since the cores are shared.
test: $(VENV)/.built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --twin $$($(BIN)/python scripts/build_twin.py 2> /dev/null) tests

# What a model takes part in: with flash-linear-attention, with mamba-ssm, with the tools of docs/bridges.md, and under every
# other release of transformers that is supported, and the newest; each installed beside the environment. LIBRARIES="fla"
# runs some.
LIBRARIES ?= fla mamba-ssm bridges transformer-lens transformers
test-libraries: $(VENV)/.built
	$(BIN)/python scripts/test_libraries.py $(LIBRARIES)

# A Ray cluster of three nodes on this machine fills a store, one of them killed midway; then verified, compared and merged.
scale-demo: $(VENV)/.built
	$(BIN)/python scripts/scale_demo.py

# Random and hostile inputs for so many minutes; what is found can be seen again from its seed.
MINUTES ?= 1
SEED ?= 0
fuzz: $(VENV)/.built
	$(BIN)/python scripts/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# Everything, about 20 minutes; interrupted, it goes on where it was.
bench: $(VENV)/.built
	$(BIN)/writesae bench

# The kernels' own C++ checks under the address and undefined-behaviour sanitizers, on the twin that cuda-check tests; needs
# cmake.
sanitize: $(VENV)/.built
	$(BIN)/python scripts/build_twin.py --sanitize
	cmake -S . -B build/sanitize -DWRITESAE_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DWRITESAE_TWIN=$(CURDIR)/build/twin-sanitize
	cmake --build build/sanitize -j2
	ctest --test-dir build/sanitize --output-on-failure

# The kernels' C++ checks on 64-bit ARM, under an emulator, and by clang; Debian's qemu-user, g++-aarch64-linux-gnu, clang.
compilers: $(VENV)/.built
	$(BIN)/python scripts/check_compilers.py

# What can be proven of the CUDA kernels without a GPU: they compile and link for every architecture, within registers and
# shared memory; their host twin passes the operators' tests, also under sanitizers. Needs nvcc.
cuda-check: $(VENV)/.built
	$(BIN)/python scripts/cuda_check.py

lint: $(VENV)/.built
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files csrc | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

# Lays the sources out as `make lint` wants them.
format: $(VENV)/.built
	$(BIN)/ruff format .
	git ls-files csrc | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

# The notebooks, run, and the documentation as a site, in build/docs; a warning is an error. To see it while writing:
# .venv/bin/mkdocs serve
docs: $(VENV)/.built
	$(PIP) install -q -c constraints.txt mkdocs mkdocs-material "mkdocstrings[python]" nbclient nbformat ipykernel
	$(BIN)/python scripts/run_notebooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

info: $(VENV)/.built
	$(BIN)/writesae info

clean:
	rm -rf build dist *.egg-info $(VENV) writesae/*.so

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "writesae needs Python >= 3.10; $(PYTHON) is older: make PYTHON=/path/to/python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: the extension compiles against the installed one, so the build is not isolated from it.
$(VENV)/.installed: $(VENV)/.created constraints.txt pyproject.toml
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt setuptools wheel ninja
	$(PIP) install -q -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	WRITESAE_CUDA=$${WRITESAE_CUDA-$$([ $(HAS_CUDA) = 1 ] && command -v nvcc > /dev/null && echo 1 || echo 0)} \
	  $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@
