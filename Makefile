# Two commands for a fresh clone: `make quickstart` and `make test`. Each sets itself up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint test-fast test-all clean

quickstart: $(STAMP)  ## the whole way on the embedded data, in minutes; interrupt and repeat as you like
	$(BIN)/clip-rd-edge quickstart

test: $(STAMP) lint test-fast  ## what CI runs: style, types, layers, tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-fast: $(STAMP)
	$(BIN)/pytest -m "not slow"

test-all: $(STAMP)  ## the slow tests, too
	$(BIN)/pytest

# pip and not uv: uv would fetch the CUDA build of torch, gigabytes that a CPU has no use for.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("clip-rd-edge needs Python 3.10 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[train,emoji,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist build
