# `make demo` runs the whole pipeline on a tiny task, `make test` all tests that need no GPU.
# Both make .venv first; nothing else is typed, and the second time is quick.
SHELL := /bin/bash
PYTHON ?= python3
# Megatron-Core 0.16 on Python 3.11 (.venv) and 0.19 on Python 3.12 (.venv-3.12): `make test PYTHON=python3.12`.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv$(if $(filter 3.12,$(VERSION)),-3.12)
LOCK := .ci/lock-cpu$(if $(filter 3.12,$(VERSION)),-3.12).txt
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install -q --no-deps --no-compile
UV := $(VENV)/bin/uv pip install -q --python $(PY) --no-deps
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # the tests start the package in some two hundred processes
MAKEFLAGS += -j3  # apt-get and Triton beside the Python environment

.PHONY: help env system triton-interpreter demo demo-clean study bench bench-gpu gpu-packages test test-unit docs check format lock

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.ready  ## the Python environment in .venv, from the committed lock

# --no-deps: the lock is complete, and the metadata of some packages contradict each other (pyproject.toml
# says which and why). uv takes a third of pip's time, but does not read pip's configuration, which knows where
# torch for a CPU is: pip brings torch meanwhile, and has the last word. Bytecode is written of what the
# programs import, in a third of the time that all 26,000 files would take.
$(VENV)/.ready: $(LOCK) pyproject.toml | $(VENV)/bin/uv
	$(PIP) $$(grep ^torch== $(LOCK)) & grep -v ^torch== $(LOCK) | $(UV) --no-config -r -; wait
	$(PIP) -r $(LOCK)
	$(UV) --no-build-isolation -e .
	$(PY) -W ignore -c "import vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker" > /dev/null & \
	$(PY) -W ignore -c "import lopd_megatron.parallel as p; p.prepare_megatron(); \
	  import lopd_megatron.train.setup, transformers.models.qwen3, matplotlib.pyplot, nemo_run"; wait
	touch $@

$(VENV)/bin/uv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep ^uv== $(LOCK))

lock: env  ## resolve pyproject.toml again into the committed lock
	$(VENV)/bin/uv pip compile pyproject.toml --python-version $(VERSION) --extra cpu --extra dev \
	  --no-annotate --no-header -q -o $(LOCK)

# Slurm for tests/slurm and a browser for the report's test. Without root or apt those tests skip and say so.
system:
	@tools/install_system_packages.sh

# vLLM's native token scoring needs Triton; on a CPU its interpreter does. Beside the environment and not in
# it: 1 GB, and torch behaves differently where it finds Triton.
triton-interpreter: $(VENV)/triton-interpreter

$(VENV)/triton-interpreter: | $(VENV)/bin/uv
	rm -rf $@.tmp
	# --no-config: pyproject.toml overrides Triton away for the environment itself.
	$(UV) --no-config --target $@.tmp triton==3.9.0 || $(PIP) --target $@.tmp triton==3.9.0
	mv $@.tmp $@

# Three processes for two cores, because Slurm, servers and the ranks of a world often wait (tests/conftest.py).
test: env system triton-interpreter  ## unit, distributed, end-to-end and Slurm tests on CPU
	$(PY) -m pytest -n 3 --only-known-skips tests

test-unit: env  ## what starts no process: in a minute, while you write
	$(PY) -m pytest -n 2 -q --no-processes tests/unit

docs: env  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

check: env  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: env  ## what ruff can mend by itself
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: env  ## the whole pipeline on a tiny task, about twelve minutes on two cores
	$(PY) tools/demo.py

demo-clean:  ## forget what the demo made
	rm -rf runs/demo

study: env  ## the comparison of docs/study.md: hours, resumable; STUDY=quick in a quarter of an hour
	$(PY) tools/study.py $(if $(filter quick,$(STUDY)),--quick)

bench: env  ## ratios against peers, as JSON in docs/benchmarks and tables in docs/performance.md
	$(PY) tools/bench/bench_peers.py --output docs/benchmarks/peers.json
	$(PY) tools/bench/bench_loss.py --output docs/benchmarks/loss.json
	$(PY) tools/bench/bench_data.py --folder runs/bench_data --output docs/benchmarks/data.json
	$(PY) tools/bench/bench_page.py

bench-gpu:  ## all that one GPU can show, in twelve minutes, into docs/benchmarks/gpu.json; needs no .venv
	$(PYTHON) tools/bench/bench_gpu.py

# For a GPU machine without a network that has torch: the rest, for its Python, beside the repository.
GPU_PYTHON ?= 3.12
gpu-packages:  ## what a bare GPU machine lacks for bench-gpu, into .gpu-packages (20 MB)
	$(PYTHON) -m pip install -q --no-deps --no-compile --target .gpu-packages --python-version $(GPU_PYTHON) --only-binary=:all: \
	  megatron-core==0.16.1 psutil pydantic pydantic-core annotated-types typing-inspection typing-extensions
