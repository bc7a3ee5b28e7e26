# Each target sets up what it needs in a fresh clone, in a virtual environment of its own.
#   make demo EXTRA=cuda     on a GPU (EXTRA=tpu on a TPU VM)
#   make test TESTS=tests-without-torch     skips what compares with PyTorch live
PYTHON ?= python3
EXTRA ?= cpu
TESTS ?= tests
VENV := .venv
RUN := $(VENV)/bin/python
# Files in the order of tests/conftest.py, each in one worker.
PYTEST := $(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo docs lint test test-all test-slow
.DELETE_ON_ERROR:

demo: $(VENV)/installed-$(EXTRA)
	@$(RUN) -m infer.demo

test: $(VENV)/installed-$(TESTS) # every guarantee at least once
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/installed-$(TESTS) # the rest
	$(PYTEST) -m slow

test-all: $(VENV)/installed-$(TESTS)
	$(PYTEST)

docs: $(VENV)/installed-docs # into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: $(VENV)/installed-$(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Not compiled to bytecode: Python does that for what is imported, which is less.
$(VENV)/installed-%: pyproject.toml setup.py | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --no-compile --editable '.[$*]'
	@touch $@
