# Two commands set everything up: `make demo` and `make test`. Both make .venv on their first call.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# A machine without a GPU wants exactly this version: others bring several gigabytes of CUDA packages.
TORCH ?= torch==2.13.0

.PHONY: demo test lint benchmark clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --out demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks.storage --work benchmarks/work

# torch first, by version: installed with the package it would be resolved to the newest build.
$(VENV)/installed: pyproject.toml examples/shapes/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev,eval]" -r examples/shapes/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
