# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
# Independent attacks, for tests only; torchattacks pins an old requests that it hardly uses, hence without dependencies.
ORACLES := torchattacks==3.5.1 pyautoattack==0.2.0
# Closed forms, axioms, codecs, layers and documents: nothing starts Ray or MLflow, and nothing trains a fleet.
FAST := tests/aggregation tests/attacks/test_pgd.py tests/attacks/test_suite.py tests/data/test_partition.py \
	tests/federation/layer_game tests/federation/test_batches.py tests/federation/test_optim.py \
	tests/metrics/test_certificates.py tests/metrics/test_predictions.py tests/storage/test_jsonl.py \
	tests/test_architecture.py tests/test_docs.py tests/transport/test_codecs.py
define REQUIRE_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-fast test-slow notebooks test-gpu witness check format docs pages fuzz chaos bench gpu-proof \
	gpu-proof-reduced sizing ledger ledger-smoke dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with everything the project needs

# Compiled once here: a process that compiles what it imports from source starts three times slower, and a run has several.
$(READY): pyproject.toml constraints.txt
	$(REQUIRE_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps $(ORACLES)
	@touch $@

demo: $(READY) ## run Sylva, both phases, on the embedded digits (about 3 minutes on 2 cores)
	$(BIN)/sylva-ray run configs/digits.yaml

test: $(READY) ## run the tests (under 8 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m 'not long and not slow' --numprocesses auto --maxprocesses 4 --dist loadgroup

test-long: $(READY) ## run the tests of whole runs, which take a few seconds each (as long again)
	$(BIN)/python -m pytest -q -m 'long and not slow' --numprocesses auto --maxprocesses 4 --dist loadgroup

test-fast: $(READY) ## run the tests of the inner loop: mathematics and structure; none starts Ray or trains
	$(BIN)/python -m pytest -q -m 'not long and not slow' $(FAST)

test-slow: $(READY) ## run the tests that kill processes or train for longer
	$(BIN)/python -m pytest -q -m slow

notebooks: $(READY) ## run the notebooks in examples/
	$(BIN)/python -m pytest -q tests/test_notebooks.py

test-gpu: $(READY) ## run the tests that need a GPU; without one they are skipped
	$(BIN)/python -m pytest -q -m gpu tests/gpu

fuzz: $(READY) ## feed every reader with wrong files and settings for 30 minutes
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q tests/fuzz

chaos: $(READY) ## kill 50 runs in every way and resume them (about half an hour)
	$(BIN)/python scripts/chaos.py

witness: $(READY) ## somebody else's attack on exported adapters, in a process that imports nothing of ours
	$(BIN)/python -m pytest -q tests/test_witness.py -k 'not pyautoattack'

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site needs neither torch nor this package installed (it reads the sources), so it has a small environment of its own.
$(DOCS_READY): pyproject.toml constraints.txt
	$(REQUIRE_PYTHON)
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $(DOCS)/requirements.txt
	@touch $@

docs: $(DOCS_READY) ## build the documentation in site/, with every link looked up
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

AXE := build/axe/node_modules/axe-core/axe.min.js
$(AXE):
	mkdir -p build/axe && npm install --silent --no-audit --no-fund --prefix build/axe axe-core@4

pages: $(READY) $(if $(shell command -v npm),$(AXE)) ## build an example of every page in build/pages, and look at each in Chromium
	PYTHONPATH=. $(BIN)/python scripts/example_pages.py build/pages --check $(if $(shell command -v npm),--axe $(AXE))

bench: $(READY) ## measure a step by precision and kernel, and a round through Ray against a bare loop
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/round_overhead.py

gpu-proof: $(READY) ## prove on one GPU that everything runs, is right, and how fast it is (8 minutes)
	$(BIN)/python benchmarks/gpu_proof.py

gpu-proof-reduced: $(READY) ## run the code of the proof on one core of the CPU (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_proof.py --device cpu --reduced

ledger-smoke: $(READY) ## run every method of the ledger once, tiny (under 10 minutes)
	$(BIN)/python benchmarks/methods/run.py --scale smoke --regime robust-0.3 --out runs/ledger-smoke --results runs/ledger-smoke/results

ledger: $(READY) ## fill benchmarks/methods/results with what is missing (many hours on 2 cores) and write its table
	$(BIN)/python benchmarks/methods/run.py
	$(BIN)/python benchmarks/methods/table.py

sizing: $(READY) ## write the tables of docs/sizing.md from the code that foretells runs
	$(BIN)/python scripts/sizing_docs.py

dist: $(READY) ## the wheel and its constraints in dist/, which cluster.yaml carries to its nodes
	rm -rf dist
	$(BIN)/uv build --quiet --wheel --out-dir dist
	cp constraints.txt dist/

clean: ## remove both environments, the site and caches (runs/ stays)
	rm -rf $(VENV) $(DOCS) build site .pytest_cache .ruff_cache .mypy_cache .hypothesis
