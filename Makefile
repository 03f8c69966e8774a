# Every target makes what it needs, in an environment of its own: VENV=/elsewhere puts that somewhere else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces, got "$(VENV)")
endif

.PHONY: help demo readme test test-ci test-all test-arviz lint types docs bench clean

help:  ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo  ## train on MNIST (or digits), print the table, write figures and report.json to results/
	$(BIN)/python examples/mnist_svi.py --output-dir results

readme: $(VENV)/.demo  ## run the demo on MNIST, and write its picture and numbers into README.md
	$(BIN)/python docs/readme.py

test: $(VENV)/.test  ## run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-ci: test  ## run the tests, with the slow ones of resuming, ranks and examples: what .ci/run runs
	$(PYTEST) -m slow tests/test_resume.py tests/test_ranks*.py tests/test_examples.py

test-all: $(VENV)/.test  ## run all tests; those on real MNIST need PVAE_DATA to name its folder
	$(PYTEST)

test-arviz: $(VENV)/.test  ## test what ArviZ reads; PYTHON=python3.13 VENV=.venv-arviz1 gets ArviZ 1.x, Python 3.11 gets 0.x
	$(PYTEST) tests/test_io_arviz.py tests/test_estimates.py
	$(PYTEST) tests/test_examples.py -k bayesian_workflow

lint: $(VENV)/.dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## build the site into docs/_build/html, running its tutorials
	$(BIN)/python -m sphinx -W --keep-going -j auto -b html docs docs/_build/html

bench: $(VENV)/.bench  ## measure training and evidence beside Pyro, estimators and families side by side
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/evidence.py
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/default_call.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/burda2015.py

clean:  ## remove what the targets made
	rm -rf $(VENV) results docs/_build docs/jupyter_execute .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("pvae needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages; it is renewed when the project's requirements change.
$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.test $(VENV)/.docs $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(BIN)/python pyproject.toml
	$(PIP) -e .[$*]
	touch $@
