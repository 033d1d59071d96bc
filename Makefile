# The main jobs of a clone. `make help` lists them.
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV   ?= .venv
# Seed of `make train`, and where its run lies.
SEED ?= 1
LOGS ?= logs
# Worker processes of pytest; 0 runs the tests in one process, which a debugger needs.
WORKERS ?= auto

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD_FILES := setup.cfg pyproject.toml constraints.txt

export PYGAME_HIDE_SUPPORT_PROMPT := 1

.PHONY: help train test check lint types docs bench bench-starts bench-growth bench-scaling bench-processes bench-learning bench-curves bench-experiments bench-faults host-suite clean distclean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

train: $(STAMP)-default  ## train on CartPole-v1 (100k steps), evaluate, write the learning curve and a video
	$(BIN)/sb3-clipvf train --env CartPole-v1 --seed $(SEED) -P -f $(LOGS)
	$(BIN)/sb3-clipvf report --env CartPole-v1 -f $(LOGS) --episodes 20

# One torch thread for each worker: more threads than cores are slow, and their number changes how sums are rounded.
# Each worker gets tests that follow each other, so that few run a file's fixtures again; one that has ended takes others.
test: $(STAMP)-test  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint types test docs  ## format, lint, types, tests, docs: what a change must pass

lint: $(STAMP)-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)-test
	$(BIN)/mypy

docs: $(STAMP)-test  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench: $(STAMP)-speed  ## measure the speed beside SB3 and SBX (over an hour; resumes if stopped)
	$(BIN)/python -m tests.bench speed

bench-growth: $(STAMP)-speed  ## measure how time and memory scale with each size (ten minutes; resumes if stopped)
	$(BIN)/python -m tests.bench growth

bench-scaling: $(STAMP)-test  ## measure training in one and two processes, and predict more (two minutes; resumes if stopped)
	$(BIN)/python -m tests.bench scaling

bench-processes: $(STAMP)-test  ## compare returns in one process and in two, with the same steps (resumes if stopped)
	$(BIN)/python -m tests.bench processes

bench-starts: $(STAMP)-speed  ## measure the time to the first update beside SB3 and SBX (minutes; resumes if stopped)
	$(BIN)/python -m tests.bench starts

bench-learning: $(STAMP)-learning  ## train with the packaged settings and SB3's PPO, and tabulate the returns (hours; resumes if stopped)
	$(BIN)/python -m tests.bench learning

bench-curves: $(STAMP)-curves  ## compare training curves of the engines (hours; resumes if stopped)
	$(BIN)/python -m tests.bench curves

bench-experiments: $(STAMP)-test  ## compare settings in many environments, on many seeds (hours; resumes if stopped)
	$(BIN)/python -m tests.bench experiments defaults --jobs 2

bench-faults: $(STAMP)-test  ## kill training runs, damage files, pass random arguments (resumes if stopped)
	$(BIN)/python -m tests.bench faults

host-suite: $(STAMP)-test  ## run Stable-Baselines3's own tests with ClipPPO in PPO's place
	$(BIN)/python tests/host_suite/run.py

clean:  ## remove build products and caches; keeps .venv and logs
	rm -rf build dist *.egg-info docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv too
	rm -rf $(VENV)

# A stamp stands for an installation; it is made again when the files that decide its contents change.
$(STAMP)-venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # keep one that works
	@touch $@

$(STAMP)-default: $(STAMP)-venv $(BUILD_FILES)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	$(PIP) -e .
	@touch $@

$(STAMP)-test: $(STAMP)-venv $(BUILD_FILES)
	@echo "Installing into $(VENV), with what the tests need (a few minutes the first time) ..."
	$(PIP) -e '.[dev,box2d,mujoco,atari,minigrid,envpool,ray]'
	@touch $@

$(STAMP)-learning: $(STAMP)-venv $(BUILD_FILES)
	@echo "Installing into $(VENV), with what the learning benchmark needs (a few minutes the first time) ..."
	$(PIP) -e '.[box2d,mujoco,envpool]'
	@touch $@

$(STAMP)-curves: $(STAMP)-venv $(BUILD_FILES)
	@echo "Installing into $(VENV), with what the curves benchmark needs (a few minutes the first time) ..."
	$(PIP) -e '.[box2d,mujoco]'
	@touch $@

$(STAMP)-speed: $(STAMP)-venv $(BUILD_FILES)
	@echo "Installing into $(VENV), with what the speed benchmark needs (a few minutes the first time) ..."
	$(PIP) -e '.[box2d,mujoco,atari,envpool,sbx]'
	@touch $@
