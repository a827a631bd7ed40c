# make setup | train | test | lint | bench | board
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOG := $(VENV).log
# NVIDIA's GPUs, counted once, when first asked for.
GPUS = $(eval GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU '))$(GPUS)
# Two ranks on a CPU; with GPUs the largest power of two, which divides the batch.
RANKS ?= $(shell n=$(GPUS); [ $$n -gt 0 ] || n=2; r=1; while [ $$((2 * r)) -le $$n ]; do r=$$((2 * r)); done; echo $$r)
# Without it the deepspeed launcher warns that it found no GPU. (The ranks choose their device themselves.)
ON_CPU = $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu )
ARGS ?=

.PHONY: setup train test lint bench board

setup: $(VENV)/.ready

# $(call stage,WHAT,COMMAND): says what, runs the command out of sight, and shows all that it printed if it fails.
define stage
@echo "setup $(1)"
@{ $(2); } >$(LOG) 2>&1 || { code=$$?; cat $(LOG); echo "setup: this failed; the same command tries again"; exit $$code; } >&2
endef
PIP = $(BIN)/python -m pip install --no-input --disable-pip-version-check --constraint constraints.txt

# The torch of constraints.txt comes first and alone, so that nothing below can pull in another build. An environment that
# an interrupted set-up left without a working pip is made anew.
$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "setup: $(PYTHON) is missing \
	or older than Python 3.11; install it, or name another, for example PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) cannot make virtual environments; install \
	its venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(call stage,1/3: virtual environment in $(VENV) (about 5 s),\
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version || $(PYTHON) -m venv --clear $(VENV))
	$(call stage,2/3: torch (about a minute; several with its libraries for GPUs),$(PIP) torch setuptools)
	$(call stage,3/3: DeepSpeed and the other packages of setup.py (about a minute),$(PIP) --editable '.[dev]')
	@touch $@

train: setup
	@echo "train: $(RANKS) rank(s); the run's first line comes in about 15 s"
	$(ON_CPU)$(BIN)/deepspeed --quiet --num_gpus $(RANKS) trainer/run.py --ds_config ds_configs/zero2.json $(ARGS)

# Side by side, see tests/README.md. ARGS="-m quick": two minutes at most; ARGS="-n 0": one test after the other.
test: setup
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python tools/bench.py $(ARGS)

board: setup
	$(BIN)/tensorboard --logdir runs
