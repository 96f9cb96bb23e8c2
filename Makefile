# Every target sets up its own virtual environment first; nothing is needed but Python >= 3.10 and make.
# Variables: PYTHON, WORKERS (test processes), ARGS (passed on), PIP_ARGS (e.g. --extra-index-url ...).

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 10) and print("$(p)")' 2>/dev/null)))
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

# The Triton of that torch has an interpreter that NumPy 2.4 breaks.
OLDEST ?= torch==2.9.0 transformers==5.5.0 'numpy<2.4'
NEWEST ?= torch transformers

.PHONY: help setup demo test lint format bench compat compat-oldest compat-newest clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     read a 32k-token document with full, window and MS-SWIFT attention"
	@echo "make test     run the tests"
	@echo "make lint     ruff and mypy"
	@echo "make bench    time attention against PyTorch's SDPA"
	@echo "make compat   run the tests on the oldest and the newest torch and Transformers"
	@echo "make clean    remove the environments and every cache"

$(READY): pyproject.toml constraints.txt $(wildcard src/longswift/core/compiled/csrc/*)
	@test -n "$(PYTHON)" || { echo "Python: expected >= 3.10 on the PATH, found none." \
		"Install it or run: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv: expected" \
		"'$(PYTHON) -m venv' to work. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	$(BIN)/longswift build --optional
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/longswift demo $(ARGS)

test: $(READY)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	$(BIN)/longswift bench attention $(ARGS)

compat: compat-oldest compat-newest

compat-oldest compat-newest: compat-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) \
		$(if $(filter oldest,$*),$(OLDEST),--upgrade $(NEWEST)) -e '.[test]'
	.venv-$*/bin/longswift build --optional
	.venv-$*/bin/longswift info
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n $(WORKERS) $(ARGS)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find src -name '*.egg-info' -prune -exec rm -rf {} +
