# make demo    the demonstration, into demo_out/ (report.html)
# make test    the test suite; `make test TESTS=tests/cli` runs a part
# make lint    ruff; make types: mypy --strict; make format: lets ruff rewrite files
# make clean   removes everything that was made here, .venv too
#
# Each of them creates .venv and installs what it needs first. Needs: Python 3.11 or newer with pip, a C++ compiler.
# PYTHON=/path/to/python chooses the interpreter; PIP_ARGS goes to every `pip install`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?=
PIP_ARGS ?=
TESTS ?=
PYTEST_ARGS ?=

# The test processes, at most four (each may take 2 GB); each computes on one thread, so that they do not fight over cores.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))

venv_python := .venv/bin/python
pip_install := $(venv_python) -m pip install --no-input --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
requirements := pyproject.toml setup.py constraints.txt

.PHONY: help demo test lint types format clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: .venv/.installed-demo
	$(venv_python) examples/demo.py --out demo_out

# Comparisons of wall times first and alone, the others side by side. No such test (pytest's exit code 5) is fine.
test: .venv/.installed-dev
	@rc=0; $(venv_python) -m pytest -m timing $(PYTEST_ARGS) $(TESTS) || rc=$$?; [ $$rc = 0 ] || [ $$rc = 5 ] || exit $$rc
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(venv_python) -m pytest -m "not timing" -n $(WORKERS) $(PYTEST_ARGS) $(TESTS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# mypy does not see that an editable install maps kernels/ to bcos_rt.kernels. So it is shown a tree of links in which
# they stand where they are installed; the links lead to the files being edited.
types: .venv/.installed-dev
	@rm -rf build/typed
	@mkdir -p build/typed/bcos_rt
	@for entry in bcos_rt/*; do ln -s "../../../$$entry" "build/typed/$$entry"; done
	@ln -s ../../../kernels ../../../export build/typed/bcos_rt/
	cd build/typed && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

clean:
	rm -rf .venv build dist demo_out .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without Debian's python3-venv there is no ensurepip: the environment is then made bare, and pip put in by python3-pip.
.venv/.created:
	@python=""; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "bcos-rt needs Python 3.11 or newer$(if $(PYTHON), and PYTHON=$(PYTHON) is none), found: $$(python3 --version 2>&1 || true)." >&2; \
	  echo "On Debian: apt-get install python3 python3-pip python3-venv; or name one: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "Creating .venv with $$("$$python" --version)"; \
	rm -rf .venv; \
	if ! "$$python" -m venv .venv >/dev/null 2>&1; then \
	  rm -rf .venv; \
	  "$$python" -m venv --without-pip .venv; \
	  "$$python" -m pip --python $(venv_python) install --no-input pip || { \
	    rm -rf .venv; echo "No pip for Python. On Debian: apt-get install python3-pip python3-venv" >&2; exit 1; }; \
	fi
	@touch $@

.venv/.installed-demo: .venv/.created $(requirements)
	$(pip_install) setuptools
	$(pip_install) --no-build-isolation -e '.[demo]'
	@touch $@

.venv/.installed-dev: .venv/.created $(requirements)
	$(pip_install) setuptools
	$(pip_install) --no-build-isolation -e '.[dev]'
	@touch $@
