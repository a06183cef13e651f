# Everything needed to try, test and check wavekv. `make demo` and `make test` need only make and Python >= 3.11.
#
# The environment made here, .venv, is the pinned CPU one (constraints.txt). On a machine with a GPU, install the torch
# build that fits your driver into an environment of your own, then `pip install -e '.[test]'` there.
#
# TORCH_INDEX names one more package index for the torch install alone. Where the default index carries the CUDA build of
# the pinned version, this gets the small CPU one: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
# a worker for each core, up to four: each takes more than 1 GB of memory
WORKERS := -n logical --maxprocesses 4 --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt
TORCH_PIN := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint type docs check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-7s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo  ## answer questions about a long text with an offloaded cache, on the CPU
	$(BIN)/wavekv demo

test: $(VENV)/.test  ## run the tests
	$(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev  ## mypy in strict mode
	$(BIN)/mypy

docs: $(VENV)/.dev  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint type test  ## all that a change must pass

clean:  ## remove the environment, caches and build outputs
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .numba_cache
	find wavekv tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One environment, three stamps: each adds its extras to the one before it.
$(VENV)/.demo: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "wavekv needs Python 3.11 or newer, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name a newer one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIN) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
