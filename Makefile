# make demo    the demonstration, into demo_out/ (report.html)
# make test    the test suite; `make test TESTS=tests/cli` runs a part
# make cpp-sanitize runs the CPU kernels' C++ tests with the address and undefined-behaviour sanitizers
# make kernels holds every GPU kernel, for every target, to its rules, without a GPU; compiles what docs/kernels.json lacks
# make gpu     on a machine with a GPU: tests there and the benchmark, into bench/results/<gpu>; GPU_ARGS="--minutes 30"
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
GPU_ARGS ?=

# The test processes, at most four (each may take 2 GB); each computes on one thread, so that they do not fight over cores.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 4 ? 4 : n)))

venv_python := .venv/bin/python
pip_install := $(venv_python) -m pip install --no-input --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# pyproject.toml's build requirements, for installs without build isolation.
build_tools := setuptools pybind11 cmake ninja
requirements := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: help demo test test-kernels cpp-sanitize kernels gpu lint types format clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: .venv/.installed-demo
	$(venv_python) examples/demo.py --out demo_out

one_thread := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# Comparisons of wall times (tests/test_speed.py has them all) first and alone, the others side by side. No such test in
# TESTS (pytest's exit code 5) is fine.
# The GPU kernels' tests run in Triton's interpreter, which needs processes of its own. A process takes whole files: what
# their fixtures make is made once.
test: .venv/.installed-dev
	@rc=0; $(venv_python) -m pytest -m timing --ignore=tests/triton $(PYTEST_ARGS) $(or $(TESTS),tests/test_speed.py) || rc=$$?; [ $$rc = 0 ] || [ $$rc = 5 ] || exit $$rc
	$(one_thread) $(venv_python) -m pytest -m "not timing" --ignore=tests/triton -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(TESTS)
	$(if $(TESTS),,@$(MAKE) --no-print-directory test-kernels)

test-kernels: .venv/.installed-dev
	TRITON_INTERPRET=1 $(one_thread) $(venv_python) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) tests/triton

# CMake and ninja are the environment's own, put there for building the kernels.
cpp-sanitize: .venv/.installed-dev
	.venv/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DBCOS_RT_SANITIZE=ON
	.venv/bin/cmake --build build/sanitize
	build/sanitize/test_kernels

# Without --recorded everything is compiled (15 minutes). `python -m bcos_rt.kernels.static report` renews the record.
kernels: .venv/.installed-dev
	$(one_thread) $(venv_python) -m bcos_rt.kernels.static check --recorded docs/kernels.json

# `python -m bench.gpu` ends with 3 on a machine without a GPU (which make reports as its own 2).
gpu: .venv/.installed-dev
	@$(venv_python) -m bench.gpu --check
	@$(MAKE) --no-print-directory .venv/.installed-gpu .venv-onnx-gpu/.installed
	$(venv_python) -m bench.gpu --onnx-python .venv-onnx-gpu/bin/python $(GPU_ARGS)

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
	rm -rf .venv .venv-onnx-gpu build dist demo_out .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
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
	$(pip_install) $(build_tools)
	$(pip_install) --no-build-isolation -e '.[demo]'
	@touch $@

.venv/.installed-dev: .venv/.created $(requirements)
	$(pip_install) $(build_tools)
	$(pip_install) --no-build-isolation -e '.[dev]'
	@touch $@

# Without its dependencies (gigabytes of other kernels): its graphs need none of them.
.venv/.installed-gpu: .venv/.installed-dev
	$(pip_install) --no-deps nvidia-cudnn-frontend || echo "no nvidia-cudnn-frontend: its rows will say so"
	@touch $@

# An environment of its own, since onnxruntime-gpu breaks onnxruntime; CUDA's libraries come from .venv.
.venv-onnx-gpu/.installed: .venv/.created
	$(venv_python) -m venv --without-pip .venv-onnx-gpu
	$(venv_python) -m pip --python .venv-onnx-gpu/bin/python install --no-input -c constraints.txt $(PIP_ARGS) \
	  onnxruntime-gpu || echo "no onnxruntime-gpu: that stage will be skipped"
	@touch $@
