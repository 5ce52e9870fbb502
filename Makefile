# Everything a developer does. `make` lists the targets; each makes its environment in .venv first.

PYTHON  ?= python3
VENV    ?= .venv
ARGS    ?=
NEWEST  ?=
TESTS   ?= tests
WORKERS ?= 2

# What `make lock` starts from: torch, and the triton that torch's own CUDA build asks for.
TORCH   ?= 2.13.0
TRITON  ?= 3.7.1

SHELL       := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build dist demo docs test test-newest compat peft-suite lint types format sanitize cuda examples bench bench-compare aot lock clean distclean

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.stamp
NATIVE  := $(VENV)/.native
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu)
INSTALL := pip --disable-pip-version-check install --quiet --no-compile

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	@echo "Making $(VENV): the package and the pinned versions of constraints.txt. PyTorch is large: this takes a minute or more."
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: make PYTHON=python3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@began=$$SECONDS; ADALORA_FAST_STRICT_BUILD=0 $(BIN)/python -m $(INSTALL) -c constraints.txt -e '.[demo,experiments,quantized,cluster,dev,docs]'; \
	  echo "$(VENV) is ready after $$((SECONDS - began)) s: $$($(BIN)/python -c 'import sys, torch; print("Python", sys.version.split()[0], "and PyTorch", torch.__version__)')"
	@touch $@

venv: $(STAMP) ## make the development environment

# Against the PyTorch that was just installed; without a C++ compiler this says so and goes on.
$(NATIVE): $(STAMP) setup.py $(SOURCES)
	@echo "Building the C++ kernels of csrc/ (once, and again when they change)."
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

build: $(NATIVE) ## build the C++ kernels, where there is a compiler

# The wheel of this platform, with the kernels in it or not at all; from the source distribution, which is made first.
dist: $(STAMP) ## make dist/: the source distribution, and the wheel with the C++ kernels (docs/native.md)
	ADALORA_FAST_STRICT_BUILD=1 $(BIN)/python -m build --no-isolation

demo: $(NATIVE) ## fine-tune a small encoder with every score, on this machine (ARGS="--fast" for a short one)
	$(BIN)/adalora-fast demo $(ARGS)

# Without --quiet, under which MkDocs does not count the warnings that --strict is about.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP) ## build docs/ as a site into site/; a broken link fails
	$(BIN)/mkdocs build --strict $(ARGS)
	@echo "Open site/index.html, or serve it (search needs that): python3 -m http.server -d site"

test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS ?= 1
test: $(NATIVE) ## run the tests (TESTS=tests/ops for some, ARGS="-x -k word" for pytest, WORKERS=2 processes)
	$(BIN)/python -m pytest -q -n $(WORKERS) $(TESTS) $(ARGS)

# By hand and not in CI: what is newest changes without a change here. The bounds of pyproject.toml are checked first.
test-newest: export HF_HUB_OFFLINE = 1
test-newest: export OMP_NUM_THREADS ?= 1
test-newest: $(NATIVE) ## run the tests on the newest versions of everything (NEWEST="torch==2.13.0" keeps some)
	$(BIN)/python -m tests.helpers.bounds $(NEWEST)
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m $(INSTALL) --upgrade --upgrade-strategy eager $(NEWEST) -e '.[demo,experiments,quantized,cluster,dev]'
	$(VENV)-newest/bin/python -m pytest -q -n $(WORKERS) $(TESTS) $(ARGS)

# Not in continuous integration: an environment per version of PyTorch takes gigabytes.
compat: export HF_HUB_OFFLINE = 1
compat: export OMP_NUM_THREADS ?= 1
compat: ## run the tests that another PyTorch can break, in an environment of its own (TORCH=2.11.0)
	$(PYTHON) -m tests.helpers.compat --torch $(TORCH) $(ARGS)

# PEFT's source distribution carries its tests; they and what they import come from the package index, once.
peft-suite: export OMP_NUM_THREADS ?= 1
peft-suite: $(NATIVE) ## run PEFT's own tests of AdaLoRA, on its models and on fused ones (about 5 minutes)
	$(BIN)/python -m tests.peft_suite --folder $(VENV)/peft-suite --workers $(WORKERS)

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

types: $(STAMP) ## check the types of the rooms that pyproject.toml names under [tool.pyright]
	$(BIN)/pyright

format: $(STAMP) ## put style and format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The kernels know nothing of PyTorch, so that a small program can run all of them under the sanitizers.
sanitize: ## run the C++ kernels under the address, undefined-behaviour and thread sanitizers
	@place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; \
	for kind in address,undefined thread; do \
	  echo "-fsanitize=$$kind"; \
	  $(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -fno-sanitize-recover=all -fsanitize=$$kind \
	    csrc/test/sanitize.cpp $(filter-out csrc/cpu/ops.cpp,$(wildcard csrc/cpu/*.cpp)) -pthread -o "$$place/check"; \
	  "$$place/check"; \
	done

cuda: $(STAMP) ## compile the CUDA sources for every GPU they are for, without one (needs nvcc)
	$(BIN)/python -m pytest -q -rs tests/ops/test_cuda_allocation.py -k compiles

examples: export HF_HUB_OFFLINE = 1
examples: $(NATIVE) ## run every example of examples/ (ARGS="-k trainer" for some)
	$(BIN)/python -m pytest -q tests/test_examples.py $(ARGS)

bench: $(NATIVE) ## run the CPU benchmarks (ARGS="--quick --only step importance" for some)
	$(BIN)/python -m benchmarks.op_counts
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-compare: $(STAMP) ## whether anything became slower: make bench-compare OLD=file NEW=file
	$(BIN)/adalora-fast bench compare $(OLD) $(NEW) $(ARGS)

aot: $(STAMP) ## compile every kernel for sm_80 and sm_90 (no GPU needed) and write what each needs
	@version=$$($(BIN)/python -c 'import triton; print(triton.__version__)'); folder=benchmarks/results/aot; \
	$(BIN)/python -m benchmarks.aot_bookkeeping --json $$folder/bookkeeping-triton-$$version.json; \
	$(BIN)/python -m benchmarks.aot_adapter --offered --json $$folder/adapter-triton-$$version.json

# A fresh environment, frozen. Dropped: local version suffixes (+cpu) and the CUDA libraries, which torch pins itself.
lock: ## resolve every dependency afresh into constraints.txt
	@place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; \
	$(PYTHON) -m venv "$$place/venv"; \
	"$$place/venv/bin/python" -m $(INSTALL) torch==$(TORCH) triton==$(TRITON) -e '.[demo,experiments,quantized,cluster,dev,docs]'; \
	"$$place/venv/bin/python" -m pip check; \
	{ echo "# Every dependency of adalora-fast[demo,experiments,quantized,cluster,dev,docs], pinned. Made by \`make lock\`; do not edit."; \
	  echo "# triton is the version that torch's CUDA build asks for; its CPU build takes any."; \
	  "$$place/venv/bin/python" -m pip freeze --all --exclude-editable --exclude pip \
	    | sed 's/+[^ ]*$$//' | grep -vE '^(nvidia|cuda)-'; } > "$$place/constraints.txt"; \
	cp "$$place/constraints.txt" constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## remove caches and builds
	rm -rf adalora_fast/*.so $(NATIVE) build dist site .benchmarks .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf $(VENV) .venv-*
