# Two commands for a newcomer: `make up` and `make test`. Everything else is listed by `make help`.
#
# A fresh clone needs Python 3.11 or 3.12 with its venv module, a C++ compiler and make. Variables:
#   PYTHON           the interpreter to make .venv with
#   TORCH            the torch to install                              (torch==2.13.0)
#   TORCH_INDEX_URL  another index for torch alone, e.g. its CPU builds (pip's own)
#   EXTRAS           groups of pyproject.toml to install; dev,gpu with TORCH=torch==2.11.0 for GPUs (dev)
#   PYTEST_WORKERS   test processes                                    (2)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
EXTRAS ?= dev
PYTEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check

STAMPS := $(VENV)/.stamps
PROTOS := $(wildcard proto/nanodeploy/v1/*.proto)
CPP_FILES := $(shell find csrc -type f -regex '.*\.\(cpp\|h\|inl\|cu\|cuh\)' 2>/dev/null)
SAY := printf '\033[1m==> %s\033[0m\n'

.PHONY: help setup up test test-exact soak train-test-models lint format stubs native client-wheel bench docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

setup: $(STAMPS)/env $(STAMPS)/stubs $(STAMPS)/native ## Make .venv, install, generate stubs, build csrc/

up: setup ## Start a cluster with the demo model on this machine; Ctrl-C stops it
	@exec $(BIN)/nanodeploy up $(UP_FLAGS)

test: setup ## Run the test suite (about ten minutes on two cores)
	@$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not exact and not soak and not gpu" $(PYTEST_FLAGS)

test-exact: setup ## Run the full identity matrix, by hand
	@$(PY) -m pytest -m exact $(PYTEST_FLAGS)

soak: setup ## Run the long tests, by hand (10 minutes, or NANODEPLOY_SOAK_S seconds)
	@$(PY) -m pytest -m soak --timeout 0 -s $(PYTEST_FLAGS)

train-test-models: setup ## Train the small model of the speculation tests again (3 minutes); its result is committed
	@$(PY) tests/train_models.py

lint: setup ## Check style, types, import floors, contracts and C++ format
	@$(SAY) "ruff"; $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(SAY) "mypy"; $(BIN)/mypy
	@$(SAY) "import floors"; $(BIN)/lint-imports --no-cache
	@$(SAY) "buf"; $(BIN)/buf lint proto && clients/breaking.sh $(BIN)/buf
	@$(SAY) "clang-format"; $(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES),true)

format: setup ## Format Python and C++ in place
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	@$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES),true)

stubs: $(STAMPS)/stubs ## Generate nanodeploy/v1 from proto/

native: $(STAMPS)/native ## Build the native libraries of csrc/

client-wheel: setup ## Build and check nanodeploy-client, which holds nanodeploy.v1 alone
	@$(PY) clients/build.py dist

bench: setup ## Measure the running cluster; see `nanodeploy bench --help`
	@$(BIN)/nanodeploy bench $(BENCH_FLAGS)

docs: setup ## Write docs/configuration.md and docs/cli.md anew
	@PYTHONPATH=. $(PY) docs/generate.py

clean: ## Remove all that was built, and .venv
	rm -rf $(VENV) build dist nanodeploy/v1 .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f common/kernels/*.so common/kvtransfer/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} + ; rm -rf *.egg-info

# -- steps of setup; each runs again only when what it is made from changed -----------------------------------

$(STAMPS)/venv:
	@$(SAY) "Making .venv"
	@python=$$(deploy/find-python.sh "$(PYTHON)") && "$$python" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/env: pyproject.toml setup.py $(STAMPS)/venv
	@deploy/find-compiler.sh
	@$(SAY) "Installing $(TORCH)"
	@$(PIP) install "$(TORCH)" $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
	@$(SAY) "Installing NanoDeploy and its tools, building csrc/: a few minutes"
	@$(PIP) install -q $$($(PY) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'])")
	@$(PIP) install -q "$(TORCH)" --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(STAMPS)/stubs: $(PROTOS) $(STAMPS)/env
	@$(SAY) "Generating nanodeploy/v1"
	@$(PY) -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)
	@touch nanodeploy/v1/__init__.py
	@touch $@

$(STAMPS)/native: $(CPP_FILES) setup.py $(STAMPS)/env
	@$(SAY) "Building csrc/"
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

include deploy/compose.mk
include benchmarks/bench.mk
