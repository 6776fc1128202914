# make demo    the main job on the embedded default model: record, plan, apply, save, reload, prove
# make test    the test suite
# make lint    ruff and mypy
# make bench   every benchmark in benchmarks/, with the defaults its page quotes
# Each target makes its own environment in .venv from constraints.txt; PYTHON=... picks the interpreter, WORKERS=2 tests on two cores.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 0

.PHONY: demo test lint bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/equipoise demo --out out/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	@for script in $(filter-out benchmarks/baselines.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
