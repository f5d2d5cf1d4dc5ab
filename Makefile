# `make demo` and `make test` work from a clean clone with Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test test-fast lint format docs gpu-check release-check kernels-wheel clean

help:
	@echo "make setup   install into .venv, as the other targets do first"
	@echo "make demo    the main job on handwritten digits (minutes)"
	@echo "make test    check style, imports and types, then run the whole test suite"
	@echo "make test-fast   the tests of ops, modules and kernels that take no longer than seconds"
	@echo "make format  apply the style"
	@echo "make docs    build docs/ into docs/_build/html"
	@echo "make gpu-check   what only an NVIDIA GPU can show, with this machine's own JAX (8 minutes)"
	@echo "make release-check   build the wheel and the sdist, look into them, install and run each (minutes)"
	@echo "make kernels-wheel   compile the kernels of shipped models and the paper's, and build their wheel (a quarter of an hour)"

setup: $(VENV)/.installed

# Each is installed again only when pyproject.toml changes; the tests need more than the demo.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[train,plot]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/shiftaddvit demo

# One file a worker, so that what a file sets up is set up once; in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

# The inner loop: ops, modules and what is quick beside them, without the kernels of whole blocks.
FAST := --ignore=tests/nn/test_fused_block.py tests/ops tests/nn tests/inputs tests/costs/test_energy.py tests/kernels/test_linear_kernels.py \
	tests/kernels/test_code_kernels.py tests/test_docs.py tests/test_files.py tests/test_names.py
test-fast: $(VENV)/.installed-test
	$(PYTEST) -m 'not slow and not all_architectures' $(FAST)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

# A warning is an error; -E reads every docstring again, whatever was built before. Notebooks run once, and again
# when their code changes; DOCS_NOTEBOOKS=off leaves their outputs out.
docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -E -b html docs docs/_build/html
	@echo "written to docs/_build/html/index.html"

# The machine's Python and its JAX for CUDA 13, not .venv; WHEELS is a folder of what they lack.
gpu-check:
	$(PYTHON) tests/gpu_check.py --output gpu-check $(if $(WHEELS),--wheels $(WHEELS))

$(VENV)/.installed-release: $(VENV)/.installed
	$(PIP) --editable '.[release]'
	touch $@

# Each is installed into an environment of its own, with the core's dependencies alone, and run from a folder
# where there is nothing to import.
release-check: $(VENV)/.installed-release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear dist/venv; \
		dist/venv/bin/python -m pip install --quiet --disable-pip-version-check $$file; \
		(cd dist && venv/bin/shiftaddvit --version && venv/bin/shiftaddvit models pvt_v2_nano); \
	done
	rm -rf dist/venv
	@echo "dist/ holds what can be released"

# What is compiled stays in the cache, so that a stopped run goes on where it was. THREADS=2 is a quarter of it.
kernels-wheel: $(VENV)/.installed-test $(VENV)/.installed-release
	$(BIN)/python packaging/compiled_kernels/compile_models.py $(if $(THREADS),--threads $(THREADS))
	$(BIN)/python -m build --wheel --outdir dist packaging/compiled_kernels
	$(BIN)/twine check --strict dist/shiftaddvit_jax_kernels-*.whl
	$(BIN)/check-wheel-contents --config packaging/compiled_kernels/pyproject.toml dist/shiftaddvit_jax_kernels-*.whl

clean:
	rm -rf $(VENV) dist runs docs/_build docs/notebooks
