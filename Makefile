# Two commands set everything up: `make demo` and `make test`. They make .venv on their first call.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
# A machine without a GPU wants exactly this version: others bring several gigabytes of CUDA packages.
TORCH ?= torch==2.13.0

.PHONY: demo test coverage wheel lint benchmark clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --out demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --durations=20

# Lines of the package that the suite runs, by file; on processors with and without GPUs the figure differs.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --cov

# The wheel as users install it, in an environment that sees the dependencies of $(VENV) but not the working tree.
wheel: $(VENV)/installed
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/clean
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$(build/clean/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth
	build/clean/bin/pip install --quiet --no-deps dist/*.whl
	cd build && clean/bin/python -c "import diffusers_bitsfusion as d; assert 'build/clean' in d.__file__, d.__file__"
	build/clean/bin/python examples/demo.py --out build/demo --steps 5

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

benchmark: $(VENV)/installed
	$(BIN)/python -m benchmarks.storage --work benchmarks/work

# torch first, by version: installed with the package it would be resolved to the newest build. pip would compile on
# one core; what does not compile is other packages' templates and tests.
$(VENV)/installed: pyproject.toml examples/shapes/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile -e ".[dev,eval,train,plot,app]" -r examples/shapes/requirements.txt
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) demo build dist *.egg-info
