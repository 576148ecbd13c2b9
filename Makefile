# Needs Python >= 3.10 and nothing else: the targets install what they use into .venv, once.
PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
CONSTRAINTS :=
BIN := $(VENV)/bin
SETUP := setup.cfg setup.py pyproject.toml

export TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_FORCE_GPU_ALLOW_GROWTH ?= true
export MPLBACKEND ?= Agg
export KERAS_BACKEND = tensorflow

.PHONY: demo test test-fast test-oldest lint types format

demo: $(VENV)/examples.stamp
	mkdir -p out
	$(BIN)/python examples/digits.py

# One thread for each worker: two workers with many threads each only get in each other's way.
test test-fast: export OMP_NUM_THREADS ?= 1
test test-fast: export TF_NUM_INTRAOP_THREADS ?= 1
test test-fast: export TF_NUM_INTEROP_THREADS ?= 2

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

# Against the lowest versions that setup.cfg admits. They want Python 3.10 to 3.12:
# make test-oldest PYTHON=python3.11
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=tests/oldest.txt

lint: $(VENV)/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/test.stamp
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A stamp is the name of an extra, installed.
$(VENV)/%.stamp: $(SETUP) $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable ".[$*]"
	touch $@
