# `make demo` and `make test` set up what they need. Ray is started by the environment's own Python,
# never through a launcher that would rebuild the environment in every worker.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Another build of torch: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu (or …/cu130)
TORCH_INDEX ?=
ONLY   ?=
# Of each kind, a multiple of three: one window after the other.
KILLS  ?= 21
# Tests in so many processes, file by file, in the order in which they were collected: one more than
# two cores, since a test that starts Ray waits half of the time.
TESTERS ?= 3
PARALLEL := --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder
# A third of what is installed, compiled when it is imported, if ever.
UNUSED := '/(tests|transformers/models)/'
# Processes that train the demo model together: cores on a CPU, 1 on a GPU.
PROCESSES ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-ci chaos soak check format docs bench quality train-demo clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Create .venv and install everything; others do it when needed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py gc2ray/models/layers/cpu_attention.c
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "pip>=25.1"
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[demo]" --group dev
	$(PY) -m compileall -qq -j 0 -x $(UNUSED) $(VENV)/lib || true  # pip would on one core; some files are for others
	@touch $@

demo: setup ## Run a whole job with the demo model on this machine
	$(PY) -m gc2ray demo

test: setup ## Run the tests
	$(PY) -m pytest -m "not slow" $(PARALLEL)

test-all: setup ## Run the tests that are too slow for `make test`, or run alone
	$(PY) -m pytest -m "slow and not alone" $(PARALLEL)
	$(PY) -m pytest -m "slow and alone" tests/faults

test-ci: setup ## Run the tests of both in one go, except for those that run alone
	$(PY) -m pytest -m "not alone" $(PARALLEL)

chaos: setup ## Kill workers, drivers, nodes and stores, KILLS=21 of each
	$(PY) -m pytest tests/faults/test_chaos.py --kills $(KILLS)

soak: setup ## Answer 100,000 rows while KILLS=66 workers are killed
	$(PY) -m pytest tests/faults/test_soak.py --rows 100000 --seconds 660 --kills $(if $(filter file,$(origin KILLS)),66,$(KILLS))

check: setup docs ## Lint, format check, strict types, documentation
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## Format the code and fix what the linter can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup ## Build the documentation into site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

bench: setup ## Measure; ONLY=name runs one of them, THREADS=n sets torch
	$(PY) -m jobs.bench $(if $(ONLY),--only $(ONLY)) $(if $(THREADS),--threads $(THREADS))

quality: setup ## Measure accuracy against tokens, MODEL=smolvlm of one model; rewrites docs/quality*
	$(PY) -m jobs.quality $(if $(MODEL),--model $(MODEL))

train-demo: setup ## Train a demo model again, into demo-training/ (hours); FAMILY=smolvlm for the second
	$(PY) -m jobs.train_demo demo-training --processes $(PROCESSES) $(if $(FAMILY),--family $(FAMILY))

clean: ## Remove everything that make made
	rm -rf $(VENV) demo-output build site *.egg-info gc2ray/models/layers/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
