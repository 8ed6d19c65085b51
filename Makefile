# One command each; `make test` and `make demo` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.vflow-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Where it is forbidden to write bytecode, every process that a test or a benchmark starts would compile torch and
# transformers anew: ten seconds each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup test test-long lint format docs serve demo bench device-check fidelity demo-model demo-eval image-check clean

help: ## show these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## create the virtual environment (once, and again when what is installed changes)

# torch goes first and pinned: left to the resolver it may bring gigabytes of CUDA libraries. Which index pip takes it
# from is pip's own business (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). Nothing is compiled ahead
# (--no-compile), which saves time: most modules are never imported, and Python compiles those that are.
$(READY): pyproject.toml constraints.txt client/pyproject.toml client/setup.py $(wildcard proto/*/*/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "VFlow needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt torch
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable ./client --editable '.[dev]'
	@touch $@

test: lint ## lint, type-check and run all tests but the long ones
	$(BIN)/python -m pytest -m "not long"

test-long: setup ## run the long tests
	$(BIN)/python -m pytest -m long

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'Look at it: $(BIN)/python -m http.server --directory build/site'

serve: setup ## run the service with the embedded model in the foreground
	$(BIN)/vflow serve

demo: setup ## start the service, talk about a picture, show what was saved (IMAGE=path for one of yours)
	$(BIN)/python -m benchmarks.demo $(if $(IMAGE),--image '$(IMAGE)')

bench: setup ## measure speed, capacity and memory (VLLM=http://host:port to compare with a vLLM server of the same model)
	$(BIN)/python -m benchmarks.conversation --repeats 1 --json build/bench/conversation.json $(if $(VLLM),--vllm '$(VLLM)')
	$(BIN)/python -m benchmarks.capacity --json build/bench/capacity.json
	$(BIN)/python -m benchmarks.scoring --runs 1 --json build/bench/scoring.json
	$(BIN)/python -m benchmarks.geometry --runs 1 --json build/bench/geometry.json
	$(BIN)/python -m benchmarks.fidelity --pictures 24 --retention 0.25 0.1 --json build/bench/fidelity.json

device-check: setup ## check a GPU within MINUTES (8): tests, exactness, and speed in the shapes of published models
	$(BIN)/python -m benchmarks.device_check --minutes $(or $(MINUTES),8) --json build/device-check.json

fidelity: setup ## ask 2,000 questions of VFlowOpt, its rivals and itself without its parts (an hour and more on two cores)
	$(BIN)/python -m benchmarks.fidelity --pictures 430 --json build/fidelity/rivals.json --plot build/fidelity/rivals.svg
	$(BIN)/python -m benchmarks.fidelity --pictures 430 --retention 0.25 0.1 --compare ablations --json build/fidelity/ablations.json
	$(BIN)/python -m benchmarks.fidelity --pictures 430 --retention 0.1 0.05 --compare choices --json build/fidelity/choices.json
	$(BIN)/python -m benchmarks.video --clips 150 --json build/fidelity/video.json

demo-model: setup ## train the embedded model anew
	$(BIN)/python -m demo_model.train

demo-eval: setup ## evaluate the embedded model on held-out pictures
	$(BIN)/python -m demo_model.evaluate

image-check: ## build the container image without Docker and hold a conversation with it (root, buildah, debootstrap)
	deploy/image-check.sh

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist client/dist client/vflow_client/v1 client/build *.egg-info client/*.egg-info
