# make train   a fresh machine: installs into .venv and pretrains a small hybrid-KSA model on the CPU, end to end
# make test    a fresh machine: installs into .venv and runs the test suite
# make check   lint, types and the fast tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The exact versions this project is tested with, torch among them. On a GPU host, or with a torch of your own, see the
# README's "Install".
PINS   := requirements/pins.txt
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: train test check install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS) torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable .
	touch $@

$(VENV)/dev-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[dev]'
	touch $@

train: install
	$(BIN)/python -m train

# Three workers for two cores: many tests wait for processes they started. A file stays on one worker, with what it has set up; the
# longest files come first, as tests/conftest.py orders them.
test: $(VENV)/dev-installed
	$(PYTEST)

check: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow and not slurm and not browser"

clean:
	rm -rf $(VENV) .cache runs
