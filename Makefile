# Every target does its own set-up; on a fresh machine only Python >= 3.11, pip and make are needed.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# what is imported is compiled then, and kept: compiling all that is installed takes minutes
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help train test check format wheel wheel-check screenshots mutants shape clean demo-sites docs

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PY) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

train: $(VENV)/.run  ## train the default model; ARGS="--rounds 5" passes options on
	$(PY) train.py $(ARGS)

test: $(VENV)/.dev  ## run every test
	$(PY) -m pytest

check: $(VENV)/.dev  ## format, lint, types, layers, the site, then the tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(MAKE) docs
	$(MAKE) test

docs: $(VENV)/.dev  ## the documentation site, into build/docs; a warning is an error
	$(PY) -m sphinx -W --keep-going -n -q -j auto -d build/doctrees -b html docs build/docs

format: $(VENV)/.dev  ## put the code into shape
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(PY) -m build --wheel

screenshots: $(VENV)/.dev  ## photograph TensorBoard on real runs (needs chromium, chromium-driver)
	$(PY) tools/screenshots.py

wheel-check: wheel  ## install the wheel in an empty environment and train from another folder
	rm -rf dist/check && $(PYTHON) -m venv dist/check
	dist/check/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/fedtorch-*.whl
	mkdir -p dist/check/elsewhere
	cd dist/check/elsewhere && ../bin/fedtorch models && ../bin/fedtorch train --rounds 2

mutants: $(VENV)/.dev  ## change the package in 300 places, one at a time: do the tests notice? ARGS="--seed 2"
	test -f build/mutants/map.json || $(PY) tools/mutate.py map
	$(PY) tools/mutate.py run $(ARGS)

shape: $(VENV)/.dev  ## how tidy the house is: figures beside their aims, and what each room imports
	$(PY) tools/shape.py

clean:  ## remove the environment and what was built
	rm -rf $(VENV) dist build

demo-sites: $(VENV)/.dev  ## two sites and a server on this machine, over TLS
	$(PY) examples/two_sites.py $(ARGS)
