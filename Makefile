# Every target makes the environment first if it is missing. VENV=DIR puts it elsewhere, PYTHON=... picks the
# interpreter that it is made with, PIP_ARGS=... is passed to pip, ARGS=... to the program of a target.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
FIXTURE ?= tests/fixtures/released_step
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.jepa_kit_clone
export VENV WORKERS PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow test-gpu docs notebooks lint format torture mutate parity bench clean fuzz

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# The stamp names the installed clone: an environment of two clones is switched to the one in use.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): setup.py pyproject.toml
	dev/make_venv.sh "$(VENV)" "$(PYTHON)"

venv: $(STAMP) ## make the environment: jepa_kit from this clone, and developer tools

quickstart: $(STAMP) ## make shards of synthetic scenes, pretrain and evaluate a ViT, and draw pictures, in output/quickstart
	$(RUN) projects/ijepa/quickstart.py $(ARGS)

test: lint ## run lint, types and the quick tests
	dev/test.sh quick $(ARGS)

test-slow: $(STAMP) ## run the tests that take minutes
	dev/test.sh slow $(ARGS)

# Installs nothing if PYTHON has torch and pytest: machines with a GPU often have no network.
test-gpu: ## run the tests that need a CUDA device
	@[ -x "$(RUN)" ] || $(PYTHON) -c 'import pytest, torch' 2>/dev/null || $(MAKE) venv
	PYTHON="$(PYTHON)" dev/test.sh gpu $(ARGS)

docs: $(STAMP) ## build the documentation site in build/site, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

notebooks: $(STAMP) ## run the notebooks, and store what they show
	$(RUN) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

lint: $(STAMP) ## run ruff (rules and format), mypy and the words of dev/words.txt, like the pre-commit hooks
	dev/lint.sh all

format: $(STAMP) ## fix and format with ruff
	dev/lint.sh fix

torture: $(STAMP) ## compare a run that is killed 20 times and interrupted 4 times with one that is not (ARGS="--processes 2 --kills 4" for torchrun)
	$(RUN) dev/torture.py $(ARGS)

mutate: $(STAMP) ## make small faults in a copy of the code, which the tests must find; writes dev/mutants.md (half an hour)
	$(RUN) dev/mutate.py $(ARGS)

fuzz: $(STAMP) ## open 2,000 damaged configs, checkpoints, weights and data, which must be rejected or be intact
	$(RUN) dev/fuzz.py $(ARGS)

parity: $(STAMP) ## compare with numbers of the released I-JEPA code (FIXTURE=...)
	$(RUN) projects/ijepa/check_parity.py $(FIXTURE) $(ARGS)

bench: $(STAMP) ## compare a training step with plain code; results go into benchmarks/results/
	$(RUN) benchmarks/bench_step.py $(ARGS)

clean: ## remove caches and build folders; keep the environment and output/
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find jepa_kit tools projects tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
