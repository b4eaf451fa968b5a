# make demo   fine-tune a small model in 4 bits, a few minutes          make lint    style, types, import rules
# make test   what CI and newcomers run, minutes                        make slow    the long tests, tens of minutes
# make proof  the measurements behind the README's figures, by hand     make docs    the pages made from code and results
#
# Everything goes into .venv. PYTHON picks the interpreter that makes it (3.10 or newer). TORCH_INDEX, if set, is the
# package index that PyTorch is taken from, for instance PyTorch's own index of CPU builds, which are far smaller.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help demo test slow proof lint docs clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "smidgen needs Python 3.10 or newer, found $$($(PYTHON) --version); name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch first and by itself: only it is taken from TORCH_INDEX.
.venv/.installed-torch: constraints.txt | .venv/bin/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@touch $@

.venv/.installed-run: pyproject.toml constraints.txt hatch_build.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.py) .venv/.installed-torch
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt hatch_build.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.py) .venv/.installed-torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/.installed-run

demo: .venv/.installed-run
	.venv/bin/smidgen demo

lint: .venv/.installed-dev
	.venv/bin/ruff check $(wildcard src tests tools benchmarks)
	.venv/bin/pyright
	.venv/bin/lint-imports

test: lint
	.venv/bin/python -m pytest -m "not slow"

slow: .venv/.installed-dev
	.venv/bin/python -m pytest -m slow

proof: .venv/.installed-dev
	SMIDGEN_ALL_FAULTS=1 .venv/bin/python -m pytest -m slow tests/e2e/test_faults.py
	SMIDGEN_HOSTILE_FILES=20000 .venv/bin/python -m pytest -m slow tests/e2e/test_hostile_files.py
	@for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do echo "$$script"; .venv/bin/python "$$script" || exit 1; done

docs: .venv/.installed-dev
	.venv/bin/python tools/make_cli_docs.py
	.venv/bin/python tools/make_performance_docs.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
