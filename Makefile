# Every target makes the environment it needs: only Python >= 3.10 and a package index have to be there.
# `make help` lists the targets. Settings, as in `make quickstart PYTHON=python3.12`:
#   VENV      where the environment lives (.venv)
#   PYTHON    the interpreter it is made from (python3)
#   UV        the uv to install with; `UV=` takes venv and pip even where uv is installed
#   ARGS      passed on to the quickstart, to pytest or to the benchmarks
#   BENCH     the benchmarks to run; named, their rows take their places among those that BENCH_JSON has already
#   BENCH_JSON  where they write what they measure (outputs/bench.json)
#   PARALLEL  how `make test` and `make coverage` share the work; for a part: make test ARGS=tests/functional

.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3
UV     ?= $(shell command -v uv 2>/dev/null)
ARGS   ?=
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.smn_peft-installed

BENCH_JSON ?= outputs/bench.json
BENCH    ?= $(sort $(wildcard tests/benchmarks/bench_*.py))
PARALLEL ?= -n auto --maxprocesses=4 --dist worksteal

PIP_INSTALL = "$(PY)" -m pip install -e ".[dev]"
ifneq ($(strip $(UV)),)
  CREATE  = "$(UV)" venv --seed --allow-existing --python '>=3.10' "$(VENV)"
  INSTALL = "$(UV)" pip install --python "$(PY)" -e ".[dev]" || $(PIP_INSTALL)
else
  CHECK   = import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else "error: smn_peft needs \
    Python 3.10 or newer, $(PYTHON) is %d.%d; name another, as in: make PYTHON=python3.12" % v)
  CREATE  = $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv "$(VENV)"
  INSTALL = $(PIP_INSTALL)
endif

.PHONY: help env quickstart test coverage test-slow bench bench-compare bench-save lint format dist clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

# The stamp lies inside the environment; a newer pyproject.toml may ask for other packages.
$(STAMP): pyproject.toml
	@test -x "$(PY)" || { $(CREATE); }
	@$(INSTALL)
	@touch "$@"

env: $(STAMP) ## Make or update the environment that the other targets use

quickstart: $(STAMP) ## Adapt a small model end to end and print the comparison table
	$(PY) examples/quickstart.py $(ARGS)

test: $(STAMP) ## Run the tests that take seconds, offline
	HF_HUB_OFFLINE=1 $(PY) -m pytest -m "not slow" $(PARALLEL) $(ARGS)

coverage: override ARGS += --cov=smn_peft --cov-report=term-missing:skip-covered --cov-fail-under=90
coverage: test ## Run them with coverage, in twice the time; below 90 % fails

test-slow: $(STAMP) ## Run the long tests; SMN_ASSETS names the folder of real weights and images
	$(PY) -m pytest -m slow $(ARGS)

bench: $(STAMP) ## Run every tests/benchmarks/bench_*.py, or those in BENCH="..."; writes BENCH_JSON
	@test -n "$(BENCH)" || { echo "error: no tests/benchmarks/bench_*.py to run" >&2; exit 1; }
	@$(if $(filter file,$(origin BENCH)),rm -f "$(BENCH_JSON)",:)
	@set -e; export BENCH_JSON="$(BENCH_JSON)"; \
	for script in $(BENCH); do echo "== $$script"; $(PY) $$script $(ARGS); done

bench-compare: $(STAMP) ## Say what the last `make bench` found worse or better than the baseline; worse fails
	$(PY) tests/benchmarks/comparison.py tests/benchmarks/baseline.json "$(BENCH_JSON)"

bench-save: $(STAMP) ## Make the last `make bench` the baseline, and render it into docs/benchmarks.md
	cp "$(BENCH_JSON)" tests/benchmarks/baseline.json
	$(PY) tests/benchmarks/page.py

lint: $(STAMP) ## Check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## Fix style and formatting in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

dist: $(STAMP) ## Build sdist and wheel, test the wheel in an empty environment (DIST_SHARE=1: with these packages)
	PY="$(PY)" DIST_SHARE="$(DIST_SHARE)" .ci/dist

clean: ## Remove build products and caches; the environment stays
	rm -rf build dist .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find smn_peft tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
