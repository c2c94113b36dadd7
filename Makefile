# The commands of the README and of CI. `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: venv demo test test-all lint format docs bench clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); PyTorch is large, this takes a few minutes the first time"
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/dualprune demo

test: venv
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv
	$(INSTALL) -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: venv
	@for script in $(filter-out benchmarks/publish.py benchmarks/figures.py benchmarks/draw_patterns.py benchmarks/layerwise.py benchmarks/loaders.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
