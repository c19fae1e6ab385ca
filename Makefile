PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the packages first, each verified by its hash; then the project itself, without dependencies
PACKAGES := --require-hashes -r requirements-dev.txt
PROJECT := --no-deps --no-build-isolation -e .
LOCK := .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --group build --custom-compile-command 'make lock'
# most tests wait for a server or a process
PYTEST := $(BIN)/python -m pytest --numprocesses 6 --dist worksteal
# paths and options for pytest, such as TESTS=tests/web
TESTS ?=
# trust the certificates that the machine trusts, as pip does
export UV_SYSTEM_CERTS ?= true
# keep compiled modules, as every process that a test starts would compile them anew
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock wheels picture run test bench faults lint check clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(STAMP) ## Make .venv (or VENV) and install everything into it

# With uv if it is installed (it also finds or downloads a Python), else with venv and pip. Python is started from
# another directory, because here pyenv would accept only the version in .python-version
$(STAMP): pyproject.toml requirements-dev.txt
	@echo "Installing into $(VENV), this takes a minute the first time"
	@if command -v uv >/dev/null; then \
		{ test -x $(BIN)/python || uv venv --quiet --python $(if $(filter python3,$(PYTHON)),'>=3.11',$(PYTHON)) $(VENV); } && \
		uv pip install --quiet --python $(BIN)/python $(PACKAGES) && \
		uv pip install --quiet --python $(BIN)/python $(PROJECT); \
	else \
		{ cd / && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
			{ echo "This needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }; } && \
		$(PYTHON) -m venv $(CURDIR)/$(VENV) && cd $(CURDIR) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PACKAGES) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PROJECT); \
	fi
	@touch $@

lock: ## Update requirements*.txt from pyproject.toml; UPGRADE=--upgrade takes newer versions
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	@$(LOCK) $(UPGRADE) --output-file requirements.txt pyproject.toml
	@$(LOCK) $(UPGRADE) --all-extras --constraints requirements.txt --output-file requirements-dev.txt pyproject.toml

wheels: setup ## List the wheel of every package for each Python and platform; ten minutes
	@$(BIN)/python -m tests.platform.wheels

picture: setup ## Make docs/console.png from the samples, with the chromium of this machine
	@$(BIN)/python -m tests.docs.picture

run: setup ## Run the whole service on this machine; the first time with sample deliveries
	@$(BIN)/clerk-sync dev $(if $(wildcard .data/sample-user),,--demo)

test: setup ## Run the tests; they start their own servers
	@$(PYTEST) $(TESTS)

bench: setup ## Measure speed, lag and memory, compared with common alternatives; a quarter of an hour
	@$(BIN)/python -m tests.bench $(BENCH)

faults: setup ## Inject faults and compare the tables with the model; 50 minutes
	@$(BIN)/python -m tests.faults $(FAULTS)

lint: setup ## Check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Run everything that must pass before a change is merged: lint and test

clean: ## Remove .venv*, builds and caches, but not the data in .data
	rm -rf .venv .venv-* build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
