# make train : set up and run the main job on the embedded data
# make test  : set up and run lint, types, doctests and the test suite
# make lint  : ruff, mypy, and the contracts on which package may import which
# make suite : doctests and the test suite; `make test` runs the two side by side, mypy being a single process
# make slow  : the tests that take minutes
# make docs  : the documentation site, into build/site; no network once its tools are installed
# make release-check: sdist and wheel, checked, installed into a clean environment and tried there
# make oldest: the test suite with the oldest versions that pyproject.toml allows, in an environment of its own
# VENV=/some/where puts the virtual environment elsewhere; ARGS="..." is handed to recipes/train.py

VENV ?= .venv
OLDEST ?= .venv-oldest
CLEAN ?= build/release-venv
PYTHON ?= python3
ARGS ?= etf
PY = $(VENV)/bin/python

.PHONY: train test lint suite slow docs release-check oldest clean

train: export OMP_NUM_THREADS ?= 1
train: $(VENV)/.train
	$(PY) recipes/train.py $(ARGS)

test: $(VENV)/.dev
	$(MAKE) -j 2 lint suite

suite: export OMP_NUM_THREADS = 1
suite: $(VENV)/.dev
	$(PY) -m pytest -n 2 -q

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

slow: export OMP_NUM_THREADS = 1
slow: $(VENV)/.dev
	$(PY) -m pytest -m slow -q

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(PY) -m mkdocs build --strict

release-check: $(VENV)/.release
	rm -rf build/dist $(CLEAN)
	$(PY) -m build --outdir build/dist
	$(PY) -m twine check --strict build/dist/*
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet build/dist/*.whl
	$(CLEAN)/bin/python -I .ci/smoke.py $$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ncreg/__init__.py)

# Old matplotlib and torch call what has been deprecated since: pyparsing's names, vmap in gradcheck, SequentialLR's epoch.
oldest: export OMP_NUM_THREADS = 1
oldest: $(OLDEST)/.oldest
	$(OLDEST)/bin/python -m pytest -n 2 -q -W ignore::pyparsing.warnings.PyparsingDeprecationWarning \
		-W ignore::FutureWarning:torch.autograd.gradcheck \
		-W "ignore:The epoch parameter in:UserWarning:torch.optim.lr_scheduler"

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(PY)
	@echo "installing ncreg, torch, torchvision and timm into $(VENV): 6 GB, some minutes"
	$(PY) -m pip install --quiet -e ".[recipes,robust]"
	touch $@

# compileall does what pip would, but on all cores, without what is hardly imported; some packages hold files for other
# versions of Python.
$(VENV)/.dev: pyproject.toml | $(PY)
	@echo "installing ncreg and all that its tests need into $(VENV): 7 GB, some minutes"
	$(PY) -m pip install --quiet --no-compile -e ".[recipes,robust,data,export,lightning,hf,docs,dev]"
	$(PY) -m compileall -qq -j 0 -x '/(tests?|testing|transformers/models)/' $(VENV)/lib || true
	touch $@

$(VENV)/.docs: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[docs]"
	touch $@

$(VENV)/.release: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[release]"
	touch $@

$(OLDEST)/.oldest: pyproject.toml .ci/oldest.txt
	python3.11 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c .ci/oldest.txt -e ".[recipes,robust,data,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
