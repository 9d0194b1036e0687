# Every target makes the environment first where it is missing. VENV=DIR puts it elsewhere, PYTHON=... picks the
# interpreter that it is made with, PIP_ARGS=... goes to pip, ARGS=... to the program that a target runs.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
FIXTURE ?= tests/fixtures/released_step
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.jepa_kit_clone
export VENV WORKERS PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-slow test-gpu lint format torture mutate parity bench clean fuzz

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# The stamp names the clone that was installed: an environment shared by two clones is pointed at the one in use.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): setup.py pyproject.toml
	dev/make_venv.sh "$(VENV)" "$(PYTHON)"

venv: $(STAMP) ## the environment: jepa_kit from this clone, and the tools of a developer

quickstart: $(STAMP) ## shards of synthetic scenes, a pretrained ViT, its evaluation and pictures, in output/quickstart
	$(RUN) projects/ijepa/quickstart.py $(ARGS)

test: lint ## lint, types and the quick tests
	dev/test.sh quick $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes
	dev/test.sh slow $(ARGS)

# Installs nothing if PYTHON has torch and pytest: machines with a GPU often have no network.
test-gpu: ## the tests that need a CUDA device
	@[ -x "$(RUN)" ] || $(PYTHON) -c 'import pytest, torch' 2>/dev/null || $(MAKE) venv
	PYTHON="$(PYTHON)" dev/test.sh gpu $(ARGS)

lint: $(STAMP) ## ruff (rules and format), mypy and the words of dev/words.txt, as the pre-commit hooks run them
	dev/lint.sh all

format: $(STAMP) ## lets ruff mend and format what it can
	dev/lint.sh fix

torture: $(STAMP) ## a run that is killed 20 times and interrupted 4 times, against one that is not (ARGS="--processes 2 --kills 4" for torchrun)
	$(RUN) dev/torture.py $(ARGS)

mutate: $(STAMP) ## small faults in a copy of the code, which the tests must find; writes dev/mutants.md (half an hour)
	$(RUN) dev/mutate.py $(ARGS)

fuzz: $(STAMP) ## 2,000 damaged configs, checkpoints, weights and data, each of which must be refused or be unharmed
	$(RUN) dev/fuzz.py $(ARGS)

parity: $(STAMP) ## this toolkit against numbers of the released I-JEPA code (FIXTURE=...)
	$(RUN) projects/ijepa/check_parity.py $(FIXTURE) $(ARGS)

bench: $(STAMP) ## a training step against plain code; results go into benchmarks/results/
	$(RUN) benchmarks/bench_step.py $(ARGS)

clean: ## removes caches and build folders; keeps the environment and output/
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find jepa_kit tools projects tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
