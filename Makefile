# `make demo` and `make test` set everything up themselves; they need only Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the command needs is there; what development needs.
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test kernels quick fuzz lint bench docs clean

demo: $(RUNS)
	@echo "Measuring treecode, sortlsh and hyper against exact attention on 8,192 words of GloVe: about a minute."
	@$(BIN)/kdecore compare --out demo
	@echo "The same as a page: demo/compare.html"

# In a process for each core: libraries that start a thread for each core would wait for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal

test: $(READY)
	$(TESTS)

# All tests of kernels for devices, of which `make test` runs every fifth: for changes of these kernels, a quarter of an hour.
kernels: $(READY)
	TRITON_INTERPRET=1 $(TESTS) tests/interpreted
	NUMBA_ENABLE_CUDASIM=1 $(TESTS) tests/simulated
	$(BIN)/python -m tests.triton_compile
	$(BIN)/python -m tests.cuda_compile

# Every tenth test of each file.
quick: $(READY)
	$(TESTS) --quick

fuzz: $(READY)
	$(BIN)/pytest tests/test_fuzz.py --hypothesis-profile=fuzz

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench.run --out bench/results

docs: $(READY)
	$(INSTALL) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "kdecore needs Python 3.11 or newer; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

$(RUNS): pyproject.toml | $(BIN)/python
	@echo "Installing kdecore into $(VENV), with NumPy, Numba, Rich, Matplotlib and Plotly: half a minute."
# Python compiles what is imported; of Plotly that is little, and all of it takes as long as the rest.
	@$(INSTALL) --no-compile --editable '.[cli]'
	@touch $(RUNS)

$(READY): pyproject.toml constraints-dev.txt | $(BIN)/python
	@echo "Installing all that development needs into $(VENV), PyTorch among it: some minutes, and a few hundred megabytes."
	$(INSTALL) --constraint constraints-dev.txt --editable '.[dev]'
# Without torchvision, which timm asks for: a build of it fits one build of PyTorch, and any other breaks transformers too.
	$(INSTALL) --no-deps 'timm>=1.0.31'
	touch $(RUNS) $(READY)

clean:
	rm -rf $(VENV) demo site
