# One command per chore. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
# with torch's default, threads that wait for each other spin, and a busy machine gets many times slower
export OMP_WAIT_POLICY ?= passive
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all bench proven docs lint types format clean

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard src/monkeyjump/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,report,dev]'
	touch $@

install: $(VENV)/installed  ## make the virtual environment and install everything into it

demo: install  ## the main job on real input: train, evaluate, save, reload, generate
	$(BIN)/monkeyjump demo

test: install  ## the fast tests (at most about 10 minutes)
	$(PYTEST)

test-all: install  ## the fast and the slow tests
	$(PYTEST) -m 'slow or not slow'

bench: install  ## the figures of docs/performance.md, on an idle machine (about 20 minutes)
	BIN=$(BIN) benchmarks/performance.sh

proven: install  ## rewrite the registry behind `monkeyjump methods --routed` from the marks of the tests
	$(BIN)/python -m pytest --collect-only --write-proven >/dev/null

docs: install  ## rewrite docs/api.md from the docstrings and the commands
	$(BIN)/python docs/generate_api.py

lint: install  ## style and common mistakes
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: install  ## static types
	$(BIN)/mypy

format: install  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:  ## remove the virtual environment, caches and compiled kernels
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/monkeyjump/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12
