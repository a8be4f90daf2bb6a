# For a fresh clone: `make install`, `make quickstart` and `make test`. Each sets itself up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One more than cores, as tests wait for processes that they start. A worker runs tests in their order, which share
# fixtures, and then takes over from others.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(8, 1 + (os.cpu_count() or 1)))')
DOCS_STAMP := $(VENV)/.docs-installed
# Where compiled code may not be kept, as in some containers, each of the many processes of the tests compiles it anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install quickstart test lint style types script-types docs test-fast test-all dist clean

install: $(STAMP)  ## the environment .venv, for training, exporting and the built-in data

quickstart: $(STAMP)  ## the whole way on the built-in data, in minutes; interrupt and repeat as you like
	$(BIN)/clip-rd-edge quickstart

test: $(DOCS_STAMP)  ## what CI runs: style, types, layers, the user guide, tests
	$(MAKE) --no-print-directory -j 2 lint docs
	$(MAKE) --no-print-directory test-fast

lint: style types script-types

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

script-types: $(STAMP)
	$(BIN)/mypy --config-file benchmarks/mypy.ini

docs: $(DOCS_STAMP)  ## the user guide, into site/; a broken link or an undocumented public name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # without --quiet, which would hide its warnings from --strict

test-fast: $(STAMP)
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-all: $(STAMP)  ## the slow tests, too
	$(BIN)/pytest

# TAG=v0.1.0: what may not be published under this tag is refused.
dist: $(STAMP)  ## a release: both archives, each checked in clean environments, and their bill of materials (CycloneDX)
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python packaging/release.py -o dist $(if $(TAG),--final '$(TAG)')
	$(BIN)/python packaging/everyday.py -o dist
	$(BIN)/python packaging/licences.py --sbom dist/clip-rd-edge.cdx.json

# PyPI's torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU, as far as `nvidia-smi` shows, its build for CPUs
# comes first, from PyTorch's own index; where that cannot be reached, pip goes on with PyPI's.
ifeq ($(shell uname -s) $(shell command -v nvidia-smi 2>/dev/null),Linux )
CPU_TORCH := --extra-index-url https://download.pytorch.org/whl/cpu torch torchvision
endif

# pip and not uv, which would take the CUDA build whatever the index. Without compiling all modules of all packages, which
# takes as long as the rest: Python compiles those that are used when they are first imported.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("clip-rd-edge needs Python 3.10 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
ifdef CPU_TORCH
	@$(BIN)/python -c 'import urllib.request as r; r.urlopen("https://download.pytorch.org/whl/cpu", timeout=10)' \
		2>/dev/null || echo "PyTorch's index of CPU builds cannot be reached: PyPI's comes with CUDA, 6 GB" >&2
	$(PIP_INSTALL) --retries 0 $(CPU_TORCH)
endif
	@echo "$(BIN)/python -m pip install -e '.[train,emoji,dev]'"
	@$(PIP_INSTALL) -e '.[train,emoji,dev]' || { \
		echo 'If a package has no files for this Python yet, try an older one: make clean, and make PYTHON=python3.13' >&2; \
		exit 1; }
	touch $(STAMP)

# Apart from the rest, so that the quickstart does not wait for it.
$(DOCS_STAMP): $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist build
