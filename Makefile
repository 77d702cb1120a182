# Every task of the project, from a bare machine: `make demo` draws, `make test` tests, `make lint` checks style.
# A target that has nothing to do is quick: stamp files in .venv remember what is installed and built.

PYTHON ?= python3
BLIP3O_CUDA ?= auto
export BLIP3O_CUDA
export PIP_DISABLE_PIP_VERSION_CHECK = 1

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/runtime.installed
DEVELOPMENT := $(VENV)/development.installed
EXHAUSTIVE := $(VENV)/exhaustive.installed
BUILT := $(VENV)/built-$(BLIP3O_CUDA)
NATIVE := $(shell find csrc -type f)
CPP := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

.DELETE_ON_ERROR:
.PHONY: help demo build test exhaustive test-all coverage gpu lint count docs format clean

# Workers of the suite, each on one thread of its own: three for 2 cores, as one of them often waits for a process
# that it started. What Python compiles is kept, whatever the environment says.
JOBS ?= 3
COVERAGE ?=
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	$(if $(COVERAGE),--cov --cov-append --cov-report=)

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(BUILT) ## Install, build, then draw an image and edit it and another drawing into out/.
	$(BIN)/blip3o-rt generate "a large red circle on a blue background" --seed 7 --out out/image.png
	$(BIN)/blip3o-rt edit "make the circle green" out/image.png --seed 7 --out out/edit.png
	$(BIN)/blip3o-rt edit "make the square blue" examples/shapes/drawn_with_cairo.png --seed 7 --out out/edit-of-a-drawing.png

build: $(BUILT) ## Install and build; BLIP3O_CUDA=auto|on|off says whether with CUDA.

test: $(BUILT) $(DEVELOPMENT) ## Run every test but the exhaustive ones, on 2 cores.
	$(PYTEST) -m "not exhaustive"

exhaustive: JOBS := 2 # these need more memory
exhaustive: $(BUILT) $(EXHAUSTIVE) ## Run the tests that `make test` leaves out.
	$(PYTEST) -m exhaustive

test-all: test exhaustive ## Run every test.

coverage: $(DEVELOPMENT) ## Run every test, and print which share of each file they reach.
	$(BIN)/python -m coverage erase
	$(MAKE) test-all COVERAGE=1
	$(BIN)/python -m coverage report

# Packages are installed only where this Python lacks some: a machine may have no network.
gpu: ## On a GPU: build, check and measure in eight minutes; DRY_RUN=1 only checks, GPU_OPTIONS=... .
	@set -e; python=$(PYTHON); if ! $$python -m benchmarks.gpu --ready; then \
	  $(MAKE) $(RUNTIME) $(DEVELOPMENT); python=$(BIN)/python; fi; \
	$$python -m benchmarks.gpu $(GPU_OPTIONS) $(if $(DRY_RUN),--dry-run)

lint: $(DEVELOPMENT) ## Check style, types, the format of Python and C++, and the Dockerfile.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))
	$(BIN)/hadolint deploy/Dockerfile

count: ## Print the size of the code, its import cycles and forbidden imports; fails over a limit.
	$(PYTHON) scripts/count.py

docs: $(DEVELOPMENT) ## Build the site of docs/ and the docstrings into out/site; fails at a broken link.
	$(BIN)/python -m mkdocs build --strict --quiet

format: $(DEVELOPMENT) ## Rewrite Python and C++ in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean: ## Remove the environment and everything built.
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	rm -f blip3o_rt/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

$(DEVELOPMENT): requirements-dev.txt $(RUNTIME)
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

$(EXHAUSTIVE): requirements-exhaustive.txt $(DEVELOPMENT)
	$(BIN)/python -m pip install -r requirements-exhaustive.txt
	touch $@

# The pinned build tools are used as they are (no isolated second copy of them), and dependencies are not looked up
# again. One stamp per value of BLIP3O_CUDA: changing it builds again.
$(BUILT): pyproject.toml setup.py CMakeLists.txt $(NATIVE) $(RUNTIME)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	rm -f $(VENV)/built-*
	touch $@
