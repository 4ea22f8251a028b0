# `make test` is what continuous integration runs; `make help` lists the rest.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --constraint constraints.txt
RECIPE := $(if $(filter cross,$(TEACHER)),quickstart_cross,quickstart)

.DEFAULT_GOAL := help
.PHONY: help venv test lint format demo clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14
	@echo 'PYTHON=...    the Python (3.11 or later) to make the environment with, now $(PYTHON)'

venv: $(VENV)/.installed-dev  ## make .venv: the pinned versions of constraints.txt and this checkout

test demo: export HF_HUB_OFFLINE = 1
test demo: export TOKENIZERS_PARALLELISM = false

test: lint  ## check style and types, then run the whole test suite
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/.installed-demo  ## train a small student (TEACHER=cross: taught by a cross-encoder)
	$(BIN)/distill run $(RECIPE)

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last into a new environment: while it is missing, the environment is not complete.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not on the PATH. Install Python 3.11, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Distill needs 3.11 or later: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that nothing else decides which build of it is taken.
$(VENV)/.installed-%: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	@echo "Installing distill-search[$*] with the versions of constraints.txt: minutes the first time"
	@$(PIP) setuptools torch
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@
