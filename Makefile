# For a fresh clone: `make install`, `make quickstart` and `make test`. Each sets itself up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One more than cores, as tests wait for processes that they start. A worker runs tests in their order, which share
# fixtures, and then takes over from others.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(8, 1 + (os.cpu_count() or 1)))')
# Where compiled code may not be kept, as in some containers, each of the many processes of the tests compiles it anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install quickstart test lint style types script-types docs test-fast test-all dist lock test-latest test-lowest clean

install: $(STAMP)  ## the environment .venv, for training, exporting and the built-in data

quickstart: $(STAMP)  ## the whole way on the built-in data, in minutes; interrupt and repeat as you like
	$(BIN)/clip-rd-edge quickstart

test: $(STAMP)  ## what CI runs: style, types, layers, the user guide, tests
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

docs: $(STAMP)  ## the user guide, into site/; a broken link or an undocumented public name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # without --quiet, which would hide its warnings from --strict

test-fast: $(STAMP)
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-all: $(STAMP)  ## the slow tests, too
	$(BIN)/pytest

# TAG=v0.1.0: what may not be published under this tag is refused.
dist: $(STAMP)  ## a release: both archives, each checked in clean environments, and their bill of materials (CycloneDX)
	$(PIP_INSTALL) --constraint $(VERSIONS) build twine
	$(BIN)/python packaging/release.py -o dist $(if $(TAG),--final '$(TAG)')
	$(BIN)/python packaging/everyday.py -o dist
	$(BIN)/python packaging/licences.py --sbom dist/clip-rd-edge.cdx.json

# What this installs stands in the lock, so that an upload to the index changes nothing here. PyPI's torch for Linux brings
# gigabytes of CUDA. Without an NVIDIA GPU, as far as `nvidia-smi` shows, its build for CPUs of the same version comes
# first, from PyTorch's own index; where that cannot be reached, pip goes on with PyPI's.
LOCK ?= requirements.lock
VERSIONS := $(VENV)/versions.txt
ifeq ($(shell uname -s) $(shell command -v nvidia-smi 2>/dev/null),Linux )
CPU_TORCH := --extra-index-url https://download.pytorch.org/whl/cpu torch torchvision
endif

# pip and not uv, which would take the CUDA build whatever the index. Without compiling all modules of all packages, which
# takes as long as the rest: Python compiles those that are used when they are first imported.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile

$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("clip-rd-edge needs Python 3.10 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^\([a-z0-9].*==.*\) \\$$/\1/p' $(LOCK) > $(VERSIONS)
	$(PIP_INSTALL) --constraint $(VERSIONS) --upgrade pip
ifdef CPU_TORCH
	@$(BIN)/python -c 'import urllib.request as r; r.urlopen("https://download.pytorch.org/whl/cpu", timeout=10)' \
		2>/dev/null || echo "PyTorch's index of CPU builds cannot be reached: PyPI's comes with CUDA, 6 GB" >&2
	$(PIP_INSTALL) --retries 0 --no-deps --constraint $(VERSIONS) $(CPU_TORCH)
endif
	case "$$($(BIN)/python -m pip freeze)" in *torch==*+cpu*) end=CUDA ;; *) end=Release ;; esac; \
		sed "/^# $$end:/,\$$d" $(LOCK) > $(VENV)/requirements.txt
	@$(PIP_INSTALL) --no-deps --require-hashes --build-constraint $(VERSIONS) -r $(VENV)/requirements.txt || { \
		echo 'If a package has no files for this Python yet, try an older one: make clean, and make PYTHON=python3.13' >&2; \
		exit 1; }
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	touch $(STAMP)

# UPGRADE=1: the newest of everything; else versions that still fit pyproject.toml stay.
lock: $(STAMP)  ## requirements.lock and the table of licences, after a change of pyproject.toml
	$(PIP_INSTALL) --constraint $(VERSIONS) uv
	$(BIN)/python packaging/lock.py $(if $(UPGRADE),--upgrade)

# What the lock keeps from everybody else: whoever looks after the bounds of pyproject.toml runs these.
test-latest test-lowest: test-%: $(STAMP)  ## the newest of everything; the lowest versions that users may have
	$(PIP_INSTALL) --constraint $(VERSIONS) uv
	$(BIN)/python packaging/lock.py --$* -o build/$*.lock
	$(MAKE) --no-print-directory -k VENV=$(VENV)-$* LOCK=build/$*.lock test-fast $(if $(filter latest,$*),lint docs)

clean:
	rm -rf $(VENV) $(VENV)-latest $(VENV)-lowest site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache dist build
