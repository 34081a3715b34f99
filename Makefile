# Every target builds what it needs; all of them are quick when nothing has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TUNE_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help install tune test test-fast lint bench docs clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(VENV)/.installed  ## the package and what its tests need, in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

tune: install  ## detect the device, tune the default problem, print the result
	$(BIN)/hsa-compile tune $(TUNE_ARGS)

test: install lint  ## lint, types, and every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: install  ## the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs are kept in .benchmarks; --benchmark-compare has nothing to read before the first.
bench: install  ## the benchmarks with their ratios, and this commit against the last run that was saved
	$(BIN)/python -m pytest benchmarks -n 0 --benchmark-enable --benchmark-only --benchmark-disable-gc -s \
		--benchmark-autosave --benchmark-group-by=fullname --benchmark-sort=name --benchmark-columns=median,min,rounds \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) $(BENCH_ARGS)

docs: install  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove .venv and build products
	rm -rf $(VENV) build dist site *.egg-info
