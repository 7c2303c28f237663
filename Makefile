# make tutorial: run every notebook, from raw data to results.   make test: run every test.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
SHELL := bash
BIN := .venv/bin
READY := .venv/.ready
# Files of tests side by side, each on one thread; notebooks one after the other, on all.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests
NOTEBOOK_TESTS = $(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks

.PHONY: help tutorial seeds test test-fast lint format lab badges bench gpu mutate clean

help:
	@echo "make tutorial   run the notebooks in order into build/notebooks/ and print their results"
	@echo "make seeds      the same for seeds 0, 1, 2, and a table over them"
	@echo "make test       all tests, the whole notebooks included"
	@echo "make test-fast  most tests: without compiling kernels ahead, notebooks at the smallest sizes"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make badges REPO=owner/name   let every notebook open in Colab from there on GitHub"
	@echo "make bench      time the kernels beside a loop, vmap and torch.compile"
	@echo "make gpu        on a machine with a GPU: tests, benchmarks and notebooks, tables in build/gpu/"
	@echo "make mutate     leave out each move to a device in turn and see that a test turns red"
	@echo "make lint       check style;  make format  mends it"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; assert (3, 11) <= v < (3, 13), f"Python 3.11 or 3.12 is needed, found {v}: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

tutorial: $(READY)
	$(BIN)/python -m netspace_lite.tutorial $(NOTEBOOKS)

seeds: $(READY)  # the README's tables: every notebook for three seeds
	$(BIN)/python -m netspace_lite.tutorial --seeds=0,1,2 $(NOTEBOOKS)

test: $(READY)
	$(TESTS)
	$(NOTEBOOK_TESTS)

test-fast: $(READY)  # notebooks in the smoke preset, from nothing
	$(TESTS) --ignore tests/kernels/test_aot.py --ignore tests/test_notebooks_device.py
	rm -rf build/smoke-digits-seed0
	NETSPACE_PRESET=smoke NETSPACE_SEED=0 NETSPACE_DATA= $(NOTEBOOK_TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(READY)
	$(BIN)/jupyter lab notebooks

badges: $(READY)
	$(BIN)/python notebooks/badges.py $(REPO)

bench: $(READY)
	$(BIN)/python -m netspace_lite.kernels.bench

gpu: $(READY)  # a table of each: build/gpu/bench.txt, build/gpu/notebooks.txt
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu needs a GPU that PyTorch can use, and there is none.")'
	$(TESTS)
	mkdir -p build/gpu
	set -o pipefail; $(BIN)/python -m netspace_lite.kernels.bench --compile | tee build/gpu/bench.txt
	set -o pipefail; $(BIN)/python -m netspace_lite.tutorial | tee build/gpu/notebooks.txt

mutate: $(READY)
	$(BIN)/python tests/mutate_device.py

clean:
	rm -rf build
