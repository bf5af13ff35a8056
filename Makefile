# `make` alone lists what there is. The versions stand in constraints.txt.

VENV  ?= .venv
CLIENTS ?= .venv-clients
# Empty: as the settings say (TRANSFORMER_HOST and TRANSFORMER_PORT, .env).
HOST  ?=
PORT  ?=
DATA  ?= data
RUNS  ?= runs
SIZE  ?= cpu
ARGS  ?=
FUZZ_EXAMPLES ?= 200
# Extra package index to take torch from. Empty: pip's own default, which on Linux is a build that carries the
# CUDA libraries (gigabytes). A machine without a GPU does better with PyTorch's own index of CPU builds.
TORCH_INDEX ?=

PY        := $(VENV)/bin/python
PIP       := $(PY) -m pip --disable-pip-version-check --no-input
# glibc: freed memory stays mapped, in large pages. A training step on a CPU takes a tenth less; others ignore it.
PAGES     := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000
TRAIN     := $(PAGES) $(PY) -m model.training
RECIPES   := model/training/recipes
FROM      = --data "$(DATA)" --tokenizer "$(RUNS)/tokenizer"
# A second part is a run of its own: it reads other packs and goes on from other weights.
PART      = $(if $(filter cpu gpu own,$(SIZE)),,-$(SIZE))
CODE      := $(wildcard app model tests benchmarks)
PINS      := pyproject.toml constraints.txt
FOR_SERVE := $(VENV)/.installed-serve
FOR_TRAIN := $(VENV)/.installed-train
FOR_DEV   := $(VENV)/.installed-dev
FOR_CLIENTS := $(CLIENTS)/.installed
FOR_SUPPLY := $(VENV)/.installed-supply
FOR_BENCH := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

.PHONY: help serve test check format bench-gpu peers \
	train-tokenizer train-masked train-causal train-translate evaluate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  HOST=... PORT=... ARGS=... go to the program; training reads DATA=$(DATA) and"
	@echo "  a recipe of SIZE=$(SIZE), and writes under RUNS=$(RUNS)."
	@echo "  PYTHON=/path/to/python3 chooses the interpreter, TORCH_INDEX=<url> where torch comes from."

# exec: the server takes the place of the shell, so a SIGTERM that make passes on reaches it and it drains.
serve: $(FOR_SERVE) ## start the service, on HOST and PORT where given
	@exec $(PY) -m app $(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)") $(ARGS)

# A process for each core; a file's tests stay together, because they share what takes long to begin.
test: $(FOR_DEV) $(FOR_CLIENTS) ## run the tests (ARGS="-k name"; "-n 0": in one process)
	CLIENTS="$(CLIENTS)" $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

fuzz: $(FOR_DEV) ## send thousands of good and bad requests (FUZZ_EXAMPLES of each operation)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest tests/app/test_fuzz.py --timeout 3600 $(ARGS)

check: $(FOR_DEV) ## lint, format check, strict types
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy $(CODE)

format: $(FOR_DEV) ## put the code in its one format
	$(PY) -m ruff check --fix-only $(CODE)
	$(PY) -m ruff format $(CODE)

bench-gpu: ## what a GPU reaches, beside the peers that are installed: some minutes (PY=python for another interpreter)
	$(PY) -m benchmarks.roofline --device cuda
	$(PY) -m benchmarks.decode --device cuda --tasks generate --weights shipped --sequences 1 64 --no-compile
	$(PY) -m benchmarks.decode --device cuda --tasks translate --weights shapes shipped --sequences 1 32 --no-compile

peers: $(FOR_BENCH) ## install what the benchmarks compare with (docs/performance.md)

train-tokenizer: $(FOR_TRAIN) ## train the shared tokenizer on the packs in DATA, but for back-*
	$(TRAIN) tokenizer --pairs $(filter-out $(DATA)/back-%,$(wildcard $(DATA)/*.tsv $(DATA)/*.tsv.xz)) \
	    --documents $(wildcard $(DATA)/*.txt $(DATA)/*.txt.xz) --out "$(RUNS)/tokenizer" $(ARGS)

train-masked: $(FOR_TRAIN) ## train the masked model and its next-sentence head
	$(TRAIN) masked --recipe $(RECIPES)/masked-$(SIZE).toml --run "$(RUNS)/masked$(PART)" $(FROM) $(ARGS)

train-causal: $(FOR_TRAIN) ## train the generation model
	$(TRAIN) causal --recipe $(RECIPES)/causal-$(SIZE).toml --run "$(RUNS)/causal$(PART)" $(FROM) $(ARGS)

train-translate: $(FOR_TRAIN) ## train the translator, both directions in one model
	$(TRAIN) translate --recipe $(RECIPES)/translate-$(SIZE).toml --run "$(RUNS)/translate$(PART)" $(FROM) $(ARGS)

evaluate: $(FOR_TRAIN) ## measure a model and write its card (ARGS=...)
	$(TRAIN) evaluate $(ARGS)

# For every platform, from the index that everybody has, whatever pip is set to on this machine.
requirements: $(FOR_SUPPLY) ## pin what the image installs, with its hashes, into requirements.txt
	$(VENV)/bin/uv pip compile pyproject.toml --constraints constraints.txt --no-config \
	    --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
	    --custom-compile-command "make requirements" --output-file requirements.txt

audit: $(FOR_SUPPLY) ## look up known vulnerabilities of what the image installs
	$(PY) -m pip_audit --requirement requirements.txt --require-hashes --disable-pip --strict $(ARGS)

clean: ## remove the virtual environment and every cache
	rm -rf "$(VENV)" "$(CLIENTS)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +

# --- installation -----------------------------------------------------------------------------

$(VENV)/pyvenv.cfg:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$($$python --version)"; \
	        exec $$python -m venv "$(VENV)"; \
	    fi; \
	done; \
	echo "Python 3.11 or later is needed; $(or $(PYTHON),python3) is" \
	    "$$($(or $(PYTHON),python3) --version 2>/dev/null || echo 'not there')." >&2; \
	echo "Install a newer one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

# torch first and alone: asked for together with others, a resolver may choose another build of it.
$(VENV)/.installed-%: $(PINS) | $(VENV)/pyvenv.cfg
	@echo "installing the versions of constraints.txt$(if $(EXTRAS), with $(EXTRAS)) (minutes the first time)"
	@$(PIP) install --quiet $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") \
	    "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install --quiet -c constraints.txt setuptools
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.$(EXTRAS)'
	@touch $@

# Older versions of the clients, apart from everything else. Nothing is resolved: the file has all that they need.
$(FOR_CLIENTS): tests/clients/older.txt | $(FOR_DEV)
	@echo "installing older clients into $(CLIENTS)"
	@$(PY) -m venv --clear --without-pip "$(CLIENTS)"
	@$(PIP) --python "$(CLIENTS)/bin/python" install --quiet --no-deps --no-compile -r $<
	@touch $@

$(FOR_TRAIN): EXTRAS = [train]
$(FOR_DEV): EXTRAS = [dev]
$(FOR_SUPPLY): EXTRAS = [supply]
$(FOR_BENCH): EXTRAS = [bench]
