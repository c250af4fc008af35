# make demo   the whole way on a synthetic log: cluster, train, compare, export, recommend
# make test   the tests
# make lint   format, lint and types
# make docs   the documentation, into site/
# make gpu-check   parity, speed and memory on a GPU, at most 8 minutes; installs nothing
# Each makes .venv, installs what it needs into it once, and runs. PYTHON=python3.12 make demo takes another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := .install.log
DEMO := demo

# Compiled modules are kept: tests start many programs, each of which would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint docs gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/graphhash demo $(DEMO)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 3

lint: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Needs PyTorch, NumPy, SciPy, Numba and PyArrow. GPU_CHECK="--json FILE" passes options.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pipeline.bench.gpu $(GPU_CHECK)

clean:
	rm -rf $(VENV) $(DEMO) $(LOG) site

# pip's output goes to the log; its end is shown when something fails.
define install
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e $(1) >>$(LOG) 2>&1 \
	    || { tail -n 20 $(LOG) >&2; echo "The installation failed; all of its output is in $(LOG)." >&2; exit 1; }
	@touch $@
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "GraphHash needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." >&2; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(LOG) 2>&1 || { cat $(LOG) >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing GraphHash into $(VENV) (once, about 2 minutes and 3 GB) ..."
	$(call install,".[all]")

$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.installed
	@echo "Installing what 'make $*' needs into $(VENV) ..."
	$(call install,".[$*]")
