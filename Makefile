# One environment, .venv at the root, made once and again when its inputs change.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean look-again

comma := ,
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Tried packages stay apart from the pinned ones: neither run may use what the other installed.
VENV := $(if $(CONSTRAINTS),.venv,.venv-newest)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

# Installed first, by exactly the pin of constraints.txt, whatever CONSTRAINTS is.
TORCH := $(shell grep '^torch==' constraints.txt)
# By the environment, and not by -c, because the build back end is installed by a pip of its own, which takes its
# versions from the first of these in older releases and from the second in newer ones. Set to nothing where nothing
# is pinned, so that a file that the caller's environment names stays in force.
# A C compiler is installed where there is none.
COMPILER := $(if $(shell command -v cc || command -v gcc || command -v clang),,$(comma)cpu)
PINS := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS))
NEWEST := $(if $(CONSTRAINTS),,--upgrade --upgrade-strategy eager)
INSTALL := $(PINS) $(BIN)/pip install -qq --disable-pip-version-check $(NEWEST)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What is newest changes without a file that says so.
look-again:

# torch comes first and by its exact version: a resolver that is free to choose takes the newest CUDA build.
$(STAMP): pyproject.toml Makefile $(or $(CONSTRAINTS),look-again)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up the environment in $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@echo "  installing torch"
	@$(INSTALL) $(TORCH)
	@echo "  installing tempovlm and what its experiments and tests need"
	@$(INSTALL) $(TORCH) -e '.[experiments,serve,dev$(COMPILER)]'
	@touch $@

demo: $(STAMP)  ## answer example pictures at three budgets; leaves demo/report.html
	@$(BIN)/python -m tempovlm.cli.main demo --output_dir $(DEMO_DIR) $(DEMO_FLAGS)

lint: $(STAMP)  ## ruff, mypy and the import contracts
	@echo "ruff" && $(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@echo "mypy" && $(BIN)/mypy --no-error-summary
	@echo "import contracts" && $(BIN)/lint-imports --no-logo

# One thread for each of the two workers: two workers of two threads each take a tenth longer on two cores.
test: lint  ## lint, then all tests that need no GPU, two at a time
	@echo "pytest" && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile $(PYTEST_FLAGS)

clean:  ## remove the environments, caches and the demo's output
	rm -rf .venv .venv-newest build dist demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
