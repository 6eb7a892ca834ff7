# `make demo` and `make test` do all the set-up they need; nothing has to be run before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.vigos-ready
# What a set-up depends on: change one and the next command installs again.
INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/*)

.PHONY: help setup demo test test-fast test-newest test-oldest newcomer wheel lint format docs bench gpu-check gpu-wheels clean
help:
	@echo "make demo       set up and run the built-in post-training job"
	@echo "make test       set up, lint and run every test"
	@echo "make test-fast  the tests a developer runs all day"
	@echo "make test-newest, make test-oldest   the same with the newest and the oldest supported versions"
	@echo "make newcomer   what a new user does, from the demo to a wheel in an empty environment"
	@echo "make wheel      a source archive and a wheel for each Python that is found, in dist/"
	@echo "make setup | lint | format | docs | bench | gpu-check | clean"

setup: $(STAMP)
$(STAMP): $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vigos needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/vigos demo $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Environments of their own; the index's newest versions, and those that pyproject.toml names as the oldest. By uv:
# pip tries versions one by one, and does not know the oldest.
test-newest: RESOLUTION := highest
test-oldest: RESOLUTION := lowest-direct
test-newest test-oldest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip install --quiet --upgrade --python .venv-$*/bin/python --resolution $(RESOLUTION) --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "not slow" -n 2 --dist worksteal $(ARGS)

newcomer: $(STAMP)
	tests/newcomer.sh $(ARGS)

# The wheels are built from the archive, which so proves to be whole. Of pyenv's versions all are tried.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; print(build_sdist("dist"))'
	versions=$$(pyenv versions --bare 2>/dev/null | paste -sd:); [ -z "$$versions" ] || export PYENV_VERSION=$$versions; \
	for python in python3.11 python3.12 python3.13; do \
	  $$python -c '' 2>/dev/null || { echo "no $$python here: no wheel for it (uv python install brings one)"; continue; }; \
	  VIGOS_BUILD=require $$python -m pip wheel --quiet --no-deps --wheel-dir dist dist/vigos-*.tar.gz || exit 1; \
	done; ls dist

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# The documentation site, in site/; without a network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,bench]'
	for name in divergence precision dropins logits_rows prefix_tree train_step generate async_rollout plots pages; do $(BIN)/python bench/$$name.py || exit 1; done

# On the GPU machine, with its own Python: no network, no installs.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(ARGS)

# The peers of the comparison, for a GPU machine with Python 3.12, beside what its own Python holds.
gpu-wheels: $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --dest build/wheels \
	  trl==1.16.0 liger-kernel==0.8.5 datasets dill multiprocess

clean:
	rm -rf build *.egg-info vigos/_C*.so .pytest_cache .ruff_cache .mypy_cache
