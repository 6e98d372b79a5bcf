# make train : set up and run the main job on the embedded data
# make test  : set up and run lint, types, doctests and the test suite
# VENV=/some/where puts the virtual environment elsewhere; ARGS="..." is handed to recipes/train.py

VENV ?= .venv
PYTHON ?= python3
ARGS ?= etf
PY = $(VENV)/bin/python

.PHONY: train test lint slow clean

train: export OMP_NUM_THREADS ?= 1
train: $(VENV)/.train
	$(PY) recipes/train.py $(ARGS)

test: export OMP_NUM_THREADS = 1
test: lint
	$(PY) -m pytest -n 2 -q

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

slow: export OMP_NUM_THREADS = 1
slow: $(VENV)/.dev
	$(PY) -m pytest -m slow -q

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[recipes,robust]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[recipes,robust,data,dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
