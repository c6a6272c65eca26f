# One environment, .venv at the root, made once and again when its inputs change.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_DIR ?= demo

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first and by its exact pin: a resolver that is free to choose takes the newest CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up the environment in .venv (a minute or two, once)"
	@$(PYTHON) -m venv .venv
	@echo "  installing torch"
	@$(BIN)/pip install -qq --disable-pip-version-check -r constraints.txt
	@echo "  installing tempovlm and what its experiments and tests need"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[experiments,dev]'
	@touch $@

demo: $(STAMP)  ## answer example pictures at three budgets; leaves demo/report.html
	@$(BIN)/python -m tempovlm.cli.main demo --output_dir $(DEMO_DIR)

lint: $(STAMP)  ## ruff, mypy and the import contracts
	@echo "ruff" && $(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@echo "mypy" && $(BIN)/mypy --no-error-summary
	@echo "import contracts" && $(BIN)/lint-imports --no-logo

test: lint  ## lint, then all tests that need no GPU, two at a time
	@echo "pytest" && $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

clean:  ## remove the environment, caches and the demo's output
	rm -rf .venv build dist demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
