# Every target creates .venv when it is missing: make demo | student | test | test-slow | checks | nano | bench | ablate
PYTHON ?= python3
ARGS ?=
# Where torch comes from; empty for PyPI, whose torch brings 2 GB of CUDA. A machine without a GPU takes the CPU build, if
# its index can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu
IS_REACHED := $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2> /dev/null
TORCH_INDEX ?= $(shell command -v nvidia-smi > /dev/null || { $(IS_REACHED) && echo $(CPU_INDEX); })

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.installed

.PHONY: demo student test test-slow checks nano bench ablate
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/v4e demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

checks: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_house.py

# The tasks of the student's triplets, in turn: each as often as it is hard.
STUDENT_TASKS := add,replace,remove,recolour,replace,move,background,sketch,replace,remove,add,grayscale,recolour,$\
	remove,replace,sepia,move,add,background,night,remove,replace,recolour,sketch,snow

student: $(READY)
	$(BIN)/v4e demo output=runs/long recipe=configs/nano/video4edit_long.yaml triplets=8192 'tasks=[$(STUDENT_TASKS)]' \
		compute_ratio=2 per_task=36 'train=[zero_stage=1]' $(ARGS)

nano: $(READY)
	$(BIN)/python -m data_tools.nano $(ARGS)

bench: $(READY)
	$(BIN)/python -m data_tools.bench $(ARGS)

ablate: $(READY)
	$(BIN)/v4e ablate $(ARGS)

$(READY): constraints.txt constraints-app.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit("v4e needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(addprefix --index-url=,$(TORCH_INDEX)) $(shell grep '^torch==' constraints.txt)
	$(PIP) install -r constraints.txt
	$(PIP) install --no-deps -r constraints-app.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@
