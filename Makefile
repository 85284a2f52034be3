# The commands of the README, and what they need: `make demo`, `make test`, `make lint`. A demo of
# files besides: `make demo-files`.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUNS ?= runs

.PHONY: demo demo-files test test-all lint site release check clean

demo: $(VENV)/.run
	$(VENV)/bin/python -m distill_jax.main --mode=study \
	  --config=configs/studies/demo.py --workdir=$(RUNS)/demo

demo-files: $(VENV)/.run  # a teacher that is an ONNX file, on the files of installed packages
	$(PIP) -e '.[export]'
	$(PIP) --no-deps magika==1.0.3
	$(VENV)/bin/python -m distill_jax.main --mode=study \
	  --config=configs/studies/file_types.py:small --workdir=$(RUNS)/file_types_small

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup tests

test-all: $(VENV)/.test  # compiled as programs are, which the fast suite is not
	XLA_FLAGS= $(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "slow or not slow" tests

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

site: $(VENV)/.docs  # warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	$(VENV)/bin/python tools/check_links.py build/site

release: $(VENV)/bin/python  # builds wheel and sdist, and tries both in fresh environments
	$(VENV)/bin/python tools/release.py --out=dist

check: lint test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.py constraints.txt | $(VENV)/bin/python
	@echo "installing distill_jax into $(VENV) ..."
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.lint: $(VENV)/.run
	$(PIP) -e '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
