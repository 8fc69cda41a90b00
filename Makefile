# make demo: the main job on the embedded default.   make test: all fast tests.
# Both set everything up in .venv the first time and nothing the second.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A file of tests for each core at a time; its modules' fixtures are made once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: setup demo test test-slow lint toy

setup: $(READY)
	@$(BIN)/python scripts/toy/demo_data.py

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	@bash scripts/demo.sh

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow --durations 15

toy: setup
	@bash scripts/toy/make.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
