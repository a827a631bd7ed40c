# make setup | train | test | lint | bench | board
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two ranks on a CPU; with GPUs the largest power of two, which divides the batch.
RANKS ?= $(shell n=$$(nvidia-smi --list-gpus 2>/dev/null | grep -c .); [ $$n -gt 0 ] || n=2; \
	r=1; while [ $$((2 * r)) -le $$n ]; do r=$$((2 * r)); done; echo $$r)
ARGS ?=

.PHONY: setup train test lint bench board

setup: $(VENV)/.ready

# The torch of constraints.txt comes first and alone, so that nothing below can pull in another build.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: setup
	$(BIN)/deepspeed --quiet --num_gpus $(RANKS) trainer/run.py --ds_config ds_configs/zero2.json $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python tools/bench.py $(ARGS)

board: setup
	$(BIN)/tensorboard --logdir runs
