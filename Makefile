# One entry for everything: `make demo` and `make test` set up what they need in .venv and re-use it afterwards.
#
#   make PYTHON=python3.12 test                                   choose the interpreter (3.11 or 3.12)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup    the small CPU build of torch
#
# Every recipe calls the programs of .venv by path, so no activated environment is needed or looked at.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test lint format demo clean

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing

# An interpreter named by the caller is taken or refused, never replaced; otherwise the first that fits is used.
ifdef PYTHON
CANDIDATES := $(PYTHON)
else
CANDIDATES := python3 python3.12 python3.11
endif

# Left out of `make test`: tests of many minutes, tests that need a GPU, and the nightly sizes of the others.
PYTEST_MARKS := not slow and not gpu and not nightly
PYTEST_ARGS ?=

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv and install the dependencies (again only when pyproject.toml has changed)

# A set-up that was interrupted leaves .installing behind, and the environment is then rebuilt from nothing: pip cannot
# repair a package whose files were half written.
$(INSTALLED): pyproject.toml
	@if [ -e $(INSTALLING) ] || { [ -e $(VENV) ] && ! $(PY) -c '' 2>/dev/null; }; then \
		echo "setup: $(VENV) is incomplete, building it again"; \
		rm -rf $(VENV); \
	fi; \
	if [ ! -e $(VENV) ]; then \
		found=""; \
		for candidate in $(CANDIDATES); do \
			if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
				found="$$candidate"; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "setup: Python 3.11 or 3.12 is needed, and none of these is one: $(CANDIDATES)" >&2; \
			echo "setup: install one, or name it: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),setup)" >&2; \
			exit 1; \
		fi; \
		echo "setup: creating $(VENV) with $$($$found --version)"; \
		mkdir -p $(VENV); touch $(INSTALLING); \
		"$$found" -m venv $(VENV) || { echo "setup: the venv module failed (Debian: apt install python3-venv)" >&2; exit 1; }; \
	fi; \
	touch $(INSTALLING); \
	echo "setup: installing the dependencies (about 4 minutes the first time)"; \
	$(PY) -m pip install --quiet --quiet --disable-pip-version-check --upgrade pip; \
	$(PY) -m pip install --quiet --quiet -e ".[test]"; \
	rm -f $(INSTALLING); \
	touch $(INSTALLED)

# Unit tests run side by side; the others share one Ray cluster, whose processes fill two cores by themselves.
test: setup lint  ## Everything that guards a change: lint, types, import rules, tests
	$(PY) -m pytest -m "$(PYTEST_MARKS)" -n logical --maxprocesses 4 --dist loadfile tests/unit $(PYTEST_ARGS)
	$(PY) -m pytest -m "$(PYTEST_MARKS)" tests/integration tests/chaos $(PYTEST_ARGS)

lint: setup  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup  ## From real mouse cells to a perturbation report, in runs/demo
	$(PY) tools/demo.py

clean:  ## Remove .venv and caches; results under runs/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -not -path './$(VENV)/*' -exec rm -rf {} +
