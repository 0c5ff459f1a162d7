# Two commands: `make demo` draws pictures, `make test` proves them. Both make .venv first.
# PIP_ARGS passes your own index options to pip, e.g. a CPU-only torch:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: demo test test-slow lint clean
demo: .venv/.installed
	$(BIN)/python -P -m fastsd.benchmarks.demo --out out

test: .venv/.installed lint
	$(BIN)/pytest -q -n 2 --dist loadfile

test-slow: .venv/.installed
	$(BIN)/pytest -q -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_ARGS) --constraint constraints.txt --editable '.[bench,dev]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
