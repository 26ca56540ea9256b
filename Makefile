# `make demo` and `make test` do everything from a bare clone. `make help` lists the rest.
SHELL := /bin/bash
VENV ?= .venv
# The first Python that runs and is new enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
# cuda on a machine with an NVIDIA GPU, cpu elsewhere.
EXTRA ?= $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
UV := $(VENV)/bin/uv
# pip reads PIP_FIND_LINKS by itself, uv does not. Without it the CPU torch comes from PyTorch's own index.
WHEELS = $(if $(PIP_FIND_LINKS),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend $(if $(filter cuda,$(EXTRA)),auto,cpu))
OVERRIDES = $(if $(filter cpu,$(EXTRA)),--override requirements/cpu-overrides.txt)
STAMP := $(VENV)/.installed-$(EXTRA)
# What tests use in addition to Python: the sandbox's isolator, a database for the Prefect server, a browser.
SYSTEM_PACKAGES := bubblewrap chromium fonts-dejavu-core postgresql
export HF_HUB_DISABLE_TELEMETRY = 1
# Empty: tests start many Python processes, and each starts faster with compiled modules.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install system demo test check lint types docs format lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(UV):
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none was found on PATH." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)." >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet -r requirements/uv.txt

$(STAMP): $(UV) pyproject.toml requirements/$(EXTRA).txt
	$(UV) pip sync --quiet --compile-bytecode --python $(VENV)/bin/python $(WHEELS) requirements/$(EXTRA).txt requirements/uv.txt
	$(UV) pip install --quiet --python $(VENV)/bin/python --no-deps --editable .
	@touch $@

install: $(STAMP) ## create the virtual environment with all dependencies

system: ## install the Debian packages that tests use
	@missing=$$(for name in $(SYSTEM_PACKAGES); do dpkg -s $$name >/dev/null 2>&1 || echo $$name; done); \
	if test -z "$$missing"; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "Not installed: $$missing. The tests that use them are skipped; a Debian root installs them by \`make system\`." >&2; fi

demo: $(STAMP) ## train a better policy from prompts in minutes, without downloads
	$(VENV)/bin/qrpo demo

test: $(STAMP) system ## the whole test suite
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(STAMP) lint types ## run lint, types and the fast tests
	$(VENV)/bin/python -m pytest -q -n 2 -m "not slow"

lint: $(STAMP) ## run ruff, the import contracts, the size budgets and the word list
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python .ci/size_budgets.py
	$(VENV)/bin/python .ci/words.py

types: $(STAMP) ## run mypy, strict, over the four packages
	$(VENV)/bin/mypy

docs: $(STAMP) ## build the documentation into ./site
	$(VENV)/bin/python -m mkdocs build --strict

format: $(STAMP) ## apply ruff's formatter and safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: $(UV) ## resolve pyproject.toml into requirements/
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade \
	  $(WHEELS) --override requirements/cpu-overrides.txt --extra cpu --extra dev pyproject.toml -o requirements/cpu.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade \
	  --extra cuda --extra dev pyproject.toml -o requirements/cuda.txt

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
