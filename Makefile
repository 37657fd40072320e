# make train   a fresh machine: installs into .venv and pretrains a small hybrid-KSA model on the CPU, end to end
# make test    a fresh machine: installs into .venv and runs the test suite
# make check   lint, types and the fast tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The exact versions this project is tested with, torch among them. On a GPU host, or with a torch of your own, see the
# README's "Install".
PINS   := requirements/pins.txt

.PHONY: train test check install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS) torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[dev]'
	touch $@

train: install
	$(BIN)/python -m train

test: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow and not slurm and not browser"

clean:
	rm -rf $(VENV) .cache runs
