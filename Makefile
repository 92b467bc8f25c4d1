# Needs Python 3.11 or newer, and make. Everything else is set up in .venv on first use.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: help demo test check bench
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## replay a bundled workload on throwaway servers; shows answers cached, joined and saved
	@$(BIN)/millpond demo

test: $(STAMP) ## run the tests, on real servers (ARGS="-k words" for some)
	@$(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

check: $(STAMP) ## check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(STAMP) ## run every benchmark and write benchmarks/results.json
	@$(BIN)/millpond bench all --out benchmarks/results.json

# Made anew when pyproject.toml changes; a directory left half made has no stamp and is completed.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "This needs Python 3.11 or newer with the venv module (Debian: apt install python3-venv);" \
		"name one with: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Setting up .venv with $(PYTHON) (once)"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
