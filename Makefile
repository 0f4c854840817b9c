# fp8: everything a newcomer or CI types. CMake describes the build; this file finds tools for it.
#
# VENV   folder of the virtual environment that is made and filled as needed (default .venv);
#        `VENV=` (empty) uses python3, cmake and ninja from PATH and installs nothing
# ARGS   passed on to the demo, the tests (pytest) or the benchmark

VENV ?= .venv
PYTHON ?= python3
CMAKE_ARGS ?=
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.SUFFIXES:

# --- tools -----------------------------------------------------------------------------------
ifeq ($(strip $(VENV)),)
BIN :=
PY := $(shell $(PYTHON) -c "import sys; print(sys.executable)")
INSTALLED :=
LINTERS :=
PACKAGES :=
MKDOCS :=
else
BIN := $(abspath $(VENV))/bin/
PY := $(BIN)python
export PATH := $(abspath $(VENV))/bin:$(PATH)
# Stamps are named after what they stand for: other requirements, another stamp.
INSTALLED := $(VENV)/.installed-$(shell sha256sum <requirements.txt | cut -c1-12)
LINTERS := $(VENV)/.linters-$(shell sha256sum <requirements-lint.txt | cut -c1-12)
# A folder of their own, which only test-compat sees: the other tests run without these packages.
SITE := build/compat-site
PACKAGES := $(SITE)/.installed-$(shell cat requirements.txt requirements-compat.txt | sha256sum | cut -c1-12)
# The same for MkDocs.
DOCS_SITE := build/docs-site
MKDOCS := $(DOCS_SITE)/.installed-$(shell sha256sum <requirements-docs.txt | cut -c1-12)
endif
export PATH := $(PATH):/usr/local/cuda/bin
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

CATCH2 := $(shell scripts/catch2.sh)
CONFIGURE := -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(PY) \
  -DFP8_BUILD_TESTS=$(if $(CATCH2),ON -DCATCH2_INCLUDE_DIR=$(CATCH2),OFF) \
  -DFP8_WERROR=$(if $(CI),ON,OFF) $(CMAKE_ARGS)
CONFIGURED := build/.configured-$(shell echo '$(CURDIR) $(CONFIGURE)' | sha256sum | cut -c1-12)

# Headers and FP8Config.cmake beside the libraries: fp8.cmake_prefix_path holds in a clone too.
DEVEL := $(BIN)cmake --install build --prefix python/fp8 --component devel >/dev/null

.PHONY: help build docs demo demo-moe demo-inference demo-lora loss-curves test test-gpu test-compat test-asan test-tsan test-faults wheel test-wheel test-sdist release sanitize fuzz soak sweep bench bench-check lint tidy format clean distclean _tests_built _catch2

help:  ## this list
	@echo "make TARGET [VENV=] [ARGS='...']    VENV= (empty): the machine's own Python, no installs"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | \
	  while IFS=$$'\t' read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

build: $(CONFIGURED)  ## the libraries, into python/fp8 (then PYTHONPATH=python works)
	@$(BIN)cmake --build build -j $$(scripts/jobs.sh) --target fp8_core fp8_torch _C
	@$(DEVEL)

demo: build  ## the main job: train with nn.Linear and with each FP8 recipe, and compare
	@$(PY) examples/train.py $(ARGS)

demo-moe: build  ## the same with a small Mixtral and Qwen3-MoE from transformers, and FP8 experts
	@$(PY) examples/train_moe.py $(ARGS)

demo-inference: build  ## generate with FP8 weights beside bf16; demo-lora: adapters over them
	@$(PY) examples/generate.py $(ARGS)

demo-lora: build $(PACKAGES)
	@PYTHONPATH="$$PYTHONPATH$(if $(SITE),:$(CURDIR)/$(SITE))" $(PY) examples/lora.py $(ARGS)

loss-curves: build  ## 300 steps of the demo: is FP8 within bf16's noise over three seeds?
	@$(PY) examples/loss_curves.py $(ARGS)

test: _catch2  ## every test that this machine can run
	@$(MAKE) --no-print-directory _tests_built
	@PYTHON=$(PY) CTEST=$(BIN)ctest PYTEST_ARGS='$(ARGS)' scripts/test.sh all

test-gpu: _tests_built  ## the tests that need a GPU; fails where there is none
	@PYTHON=$(PY) CTEST=$(BIN)ctest PYTEST_ARGS='$(ARGS)' scripts/test.sh gpu

test-compat: build $(PACKAGES)  ## models, trainers and tools of other packages, at pinned versions
	@PYTHONPATH="$$PYTHONPATH$(if $(SITE),:$(CURDIR)/$(SITE))" $(PY) -m pytest tests/compat $(ARGS)

test-asan: $(INSTALLED)  ## the host code's C++ tests under ASan and UBSan; test-tsan: TSan
	@$(call host_tests,asan,address$(comma)undefined)

# Threads share the plan cache.
test-tsan: $(INSTALLED)
	@$(call host_tests,tsan,thread)

test-faults: _catch2 $(INSTALLED)  ## deliberate faults, each of which must turn a test red: an hour
	@$(PY) tests/faults/run.py $(ARGS)

wheel: build  ## source distribution and wheel, into dist/
	@PYTHON=$(PY) CMAKE_ARGS='$(CMAKE_ARGS)' FP8_BUILD_DIR=$(CURDIR)/build scripts/wheel.sh

test-wheel: wheel  ## the wheel in a fresh environment (torch from pip or WHEEL_SITE); test-sdist: the source
	@PYTHON=$(PY) scripts/test_wheel.sh wheel

test-sdist: wheel
	@PYTHON=$(PY) scripts/test_wheel.sh sdist

release: build  ## wheel and sdist, made twice and compared, tried in fresh environments
	@PYTHON=$(PY) CMAKE_ARGS='$(CMAKE_ARGS)' PATH="$(PATH)" scripts/release.sh $(ARGS)

sanitize: build  ## compute-sanitizer over every op; needs a GPU
	@PYTHON=$(PY) scripts/sanitize.sh

fuzz: build  ## any operator, any input, against a reference: 3 minutes, on a GPU 5
	@$(PY) tests/fuzz/fuzz.py $(ARGS)

soak: build  ## thousands of steps in every recipe: memory, handles, losses; on a GPU 5 minutes
	@$(PY) tests/soak/soak.py $(ARGS)

# Where test-compat has installed its packages, peft makes the adapters.
sweep: build  ## every small model of transformers, fused, composed and bf16: minutes
	@PYTHONPATH="$$PYTHONPATH$(if $(SITE),:$(CURDIR)/$(SITE))" $(PY) tests/sweep/sweep.py $(ARGS)

bench: build  ## every benchmark, the tables of README.md and docs/, plots; needs a GPU, 12 minutes
	@status=0; PYTHON=$(PY) scripts/bench.sh $(ARGS) || status=$$?; [ $$status -ne 2 ] || exit 2; \
	  $(PY) benchmarks/report.py --readme --plots >/dev/null; exit $$status

bench-check: build  ## the same into build/bench-new; fails where a ratio is worse than committed
	@rm -rf build/bench-new
	@PYTHON=$(PY) scripts/bench.sh --output build/bench-new $(ARGS)
	@$(PY) benchmarks/report.py --results build/bench-new --check benchmarks/results

# Strict: a link or a heading that is not there is an error. Docstrings are read, nothing is imported.
docs: $(MKDOCS)  ## docs/ as a site with the API reference, into build/docs
	@PYTHONPATH=$(DOCS_SITE) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "docs: build/docs/index.html"

lint: $(INSTALLED) $(LINTERS)  ## format, style, types, layering, clang-tidy; format: mend it
	@scripts/lint.sh

tidy: build $(LINTERS)
	@scripts/tidy.sh all

format: $(INSTALLED) $(LINTERS)
	@scripts/lint.sh --fix

clean:  ## remove what was built; distclean: the virtual environment too
	rm -rf build dist python/*.egg-info python/fp8/{include,lib,share} python/fp8/_C*.so python/fp8/_build.py

distclean: clean
	rm -rf $(if $(strip $(VENV)),$(VENV))

# setarch -R: ThreadSanitizer stops where the kernel spreads addresses further than it knows.
comma := ,
define host_tests
$(BIN)cmake -S tests/cpp/host -B build/$(1) -G Ninja -DFP8_SANITIZE=$(2) \
  $(if $(CATCH2),-DCATCH2_INCLUDE_DIR=$(CATCH2)) >/dev/null
$(BIN)cmake --build build/$(1) -j $$(scripts/jobs.sh)
setarch -R $(BIN)ctest --test-dir build/$(1) --output-on-failure --no-tests=error
endef

# --- steps -----------------------------------------------------------------------------------
_catch2:
	@scripts/catch2.sh --install >/dev/null

_tests_built: $(CONFIGURED)
	@$(BIN)cmake --build build -j $$(scripts/jobs.sh)
	@$(DEVEL)

# CMake asks everything anew, as with --fresh, but objects stay: ninja compiles again what another
# command makes, or headers that changed. So `make test` after `make demo` only adds the tests.
$(CONFIGURED): $(INSTALLED) VERSION
	@rm -rf build/CMakeCache.txt build/CMakeFiles/[0-9]*
	$(BIN)cmake -S . -B build $(CONFIGURE)
	@rm -f build/.configured-* && touch $@

ifneq ($(strip $(VENV)),)
# Bytecode of what is imported is made then: of all of it, half a minute.
$(INSTALLED): | $(BIN)python
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@rm -f $(VENV)/.installed-* && touch $@

$(LINTERS): | $(INSTALLED)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-lint.txt
	@rm -f $(VENV)/.linters-* && touch $@

# Without what these packages depend on: requirements.txt has it, and its torch stays as it is.
$(PACKAGES): requirements-compat.txt | $(INSTALLED)
	@rm -rf $(SITE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(SITE) \
	  -r requirements-compat.txt
	@touch $@

$(MKDOCS): requirements-docs.txt | $(BIN)python
	@rm -rf $(DOCS_SITE)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $(DOCS_SITE) \
	  -r requirements-docs.txt
	@touch $@

$(BIN)python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: need Python 3.11 or newer, set PYTHON=... ($$($(PYTHON) --version 2>&1))" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: python3 -m venv failed. Type: sudo apt-get install -y python3-venv" >&2; exit 1; }
endif
