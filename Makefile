# make demo | test | evaluate | check | fix | clean. The first call on a fresh machine makes the virtual environment.
#
#   PYTHON=python3.12       the interpreter that the environment is made from (3.11 or newer)
#   VENV=/somewhere/venv    where the environment lives
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    look for torch there too; its build 2.13.0+cpu goes before 2.13.0
#   JOBS=2                  processes that share the tests
#   ARGS="key=value ..."    overrides for demo and evaluate, options for pytest in test

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
LAUNCH := CUDA_VISIBLE_DEVICES= $(BIN)/accelerate launch --config_file configs/accelerate/cpu_2proc.yaml
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test evaluate check fix clean install
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(LAUNCH) scripts/train.py resume=auto $(ARGS)

evaluate: $(STAMP)
	$(LAUNCH) scripts/evaluate.py run=outputs/demo $(ARGS)

test: $(STAMP)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --project pyproject.toml --pythonpath $(BIN)/python
	$(BIN)/lint-imports

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

# torch alone first: its build is then settled, whatever the rest asks for.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	touch $@

# Caches and builds only: outputs/ and the environment stay.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
