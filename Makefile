# Two commands are enough: `make demo` to see it, `make test` to trust it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VIEW   ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check lint format types imports clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# One install for users, one for developers; both pinned by constraints.txt (torch: the CPU build).
$(VENV)/.installed-all: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed-all

demo: $(VENV)/.installed-all ## record the bundled model, replay five policies, open the viewer (VIEW=0: no viewer)
	$(BIN)/kvtrace demo --out traces $(if $(filter 0,$(VIEW)),--no-view)

# A file's tests share what is expensive to make, so a file stays with one worker.
test: $(VENV)/.installed-dev ## everything the suite needs, then pytest on two cores
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(VENV)/.installed-dev ## the long tests too
	$(BIN)/python -m pytest

check: lint test ## what CI does: format, lint, types, import rules, tests

lint: format types imports ## everything of `check` but the tests

format: $(VENV)/.installed-dev ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev ## mypy, strict
	$(BIN)/mypy

imports: $(VENV)/.installed-dev ## who may import whom
	$(BIN)/lint-imports

clean: ## remove the environment and the caches, keep traces
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
