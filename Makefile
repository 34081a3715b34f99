# Every target builds what it needs; all of them are quick when nothing has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNE_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEVICE ?= cuda
MINUTES ?= 12
OUT ?= gpu_results
GPU_ARGS ?=

.PHONY: help install tune test test-fast test-all lint bench gpu docs clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

# Two steps, so that who tunes does not wait for what only the tests import.
install: $(VENV)/.tests  ## the package and what its tests need, in .venv

PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing hsa-compile, PyTorch and what else it runs on into $(VENV). This happens once and takes minutes."
	$(PIP_INSTALL) .
	touch $@

$(VENV)/.tests: $(VENV)/.runtime
	@echo "Installing what the tests, the linters and the documentation need into $(VENV). This happens once."
	$(PIP_INSTALL) '.[test]'
	touch $@

tune: $(VENV)/.runtime  ## detect the device, tune the default problem, print the result
	$(BIN)/hsa-compile tune $(TUNE_ARGS)

test: install lint  ## lint, types, and the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: install  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow and not exhaustive' $(PYTEST_ARGS)

test-all: install lint  ## the same as test, and the exhaustive tests
	$(BIN)/python -m pytest -m '' $(PYTEST_ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs are kept in .benchmarks; --benchmark-compare has nothing to read before the first.
bench: install  ## the benchmarks with their ratios, and this commit against the last run that was saved
	$(BIN)/python -m pytest benchmarks -n 0 --benchmark-enable --benchmark-only --benchmark-disable-gc -s \
		--benchmark-autosave --benchmark-group-by=fullname --benchmark-sort=name --benchmark-columns=median,min,rounds \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) $(BENCH_ARGS)

gpu: $(VENV)/.runtime  ## on a GPU: check all kernels, tune, race, run the commands; MINUTES=12 OUT=gpu_results DEVICE=cuda
	$(BIN)/python benchmarks/gpu.py --device $(DEVICE) --minutes $(MINUTES) --out $(OUT) $(GPU_ARGS)

docs: install  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove .venv and build products
	rm -rf $(VENV) build dist site *.egg-info
