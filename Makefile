# make demo: the whole pipeline on a tiny task. make test: environment and all CPU tests.
# Both make .venv first, and are quick the second time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help env system demo demo-clean test check format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.ready  ## the Python environment in .venv, from the committed lock

# --no-deps: the lock is complete, and some packages' metadata contradict each other (pyproject says which).
$(VENV)/.ready: .ci/lock-cpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q "$$(grep -E '^uv==' .ci/lock-cpu.txt)"
	$(VENV)/bin/pip install -q --no-deps -r .ci/lock-cpu.txt
	$(VENV)/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

lock:  ## resolve pyproject.toml again into the committed lock
	$(VENV)/bin/uv pip compile pyproject.toml --python-version 3.11 --extra cpu --extra dev \
	  --no-annotate --no-header -q -o .ci/lock-cpu.txt

check: env  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: env  ## ruff fixes what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: env  ## unit, distributed and end-to-end tests on CPU
	$(PY) -m pytest tests
