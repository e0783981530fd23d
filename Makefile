# `make demo` and `make test` need nothing but Python 3.11 or later; both install into .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# A worker that has nothing left to do takes half of what another still has.
PARALLEL := --numprocesses 2 --dist worksteal

.PHONY: help install demo why check test test-layer test-train test-service test-long test-gpu \
	format lock clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: .venv/.installed  ## make .venv and install syncbn with what its tests need

# The stamp comes last, so that an installation that was cut short is taken up again.
.venv/.installed: pyproject.toml .ci/constraints.txt $(wildcard syncbn/_native/*.cpp syncbn/_native/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## train on 2 processes, serve the model, query it
	$(BIN)/python scripts/demo.py

why: install  ## compute and draw what docs/why.md shows, in a quarter of an hour
	$(BIN)/python -m scripts.chapter

check: install  ## lint, format check, types, import directions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: check  ## what check does, and all tests but those of test-long
	$(PYTEST) $(PARALLEL)

test-layer: install  ## the tests of the layer alone
	$(PYTEST) $(PARALLEL) tests/syncbn tests/contracts --ignore tests/syncbn/train

test-train: install  ## the tests of training alone
	$(PYTEST) $(PARALLEL) tests/syncbn/train

test-service: install  ## the tests of the service alone
	$(PYTEST) $(PARALLEL) tests/service

# A file at a time in each worker, as tests of one share a cluster, a server or a trained model.
test-long: install  ## the tests that take long: variants, compiled models, a soak, kills
	$(PYTEST) --numprocesses 2 --dist loadfile -m long

# One after the other, because they share a GPU.
test-gpu: install  ## the tests that need a GPU; each skips without one
	$(PYTEST) -m cuda tests/gpu tests/syncbn/train

format: install  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: install  ## write the installed versions to .ci/constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable > .ci/constraints.txt

clean:  ## remove .venv and what tools left behind; runs/ stays
	rm -rf .venv dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
