# make run     run every numbered notebook and renew its outputs, figures and results   (ARGS="3 --jobs 1")
# make test    unit tests, doctests, every notebook against its stored output, guards, the browser test
# make lab     JupyterLab on chapter 1
# make bench   the quantizers beside their peers
# make clean   remove the environment and the caches (runs/ stays, it holds your own runs; so do fetched networks)
#
# HTP=0        leave out onnxruntime-qnn, which comes under Qualcomm's AI Stack License
# TORCH_INDEX  one more package index; https://download.pytorch.org/whl/cpu has the small CPU build of torch for Linux
# PYTHON       the Python that makes the environment (3.11 or newer)

PYTHON ?= python3
# Once left out, the backend stays out: only HTP=1 brings it (and its licence) back.
HTP ?= $(if $(wildcard .venv/.ready-without-htp),0,1)
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
LEFT_OUT := $(if $(filter 0,$(HTP)),/^onnxruntime-qnn==/d)
STAMP := $(VENV)/.ready-$(if $(filter 0,$(HTP)),without,with)-htp
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

ifeq ($(HTP),0)
export QTOOLS_HTP = 0
endif

# The stamp holds the folder's path: an environment that was moved, or whose Python went away, is stale too.
ifneq ($(shell $(PY) -c 1 2>/dev/null && cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

.PHONY: run test lab bench clean env FORCE
.DEFAULT_GOAL := run

run: env
	@$(VENV)/bin/qtools run $(ARGS)

test: env
	@$(PY) -m pytest $(ARGS)

lab: env
	@$(VENV)/bin/jupyter lab $(ARGS) notebooks/01_linear_quantization.ipynb

bench: env
	@$(PY) -m tests.benchmarks $(ARGS)

env: $(STAMP)

# Stamps go first and come last, and .making stays behind an interrupted run: the next one then starts afresh.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1): try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) from requirements.txt (a few minutes the first time; about 2.5 GB) ..."
	@rm -f $(VENV)/.ready-*
	@if [ -e $(VENV)/.making ] || ! $(PIP) --version >/dev/null 2>&1 || \
	  [ "$$(cat $(VENV)/.folder 2>/dev/null || pwd -P)" != "$$(pwd -P)" ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.making
	@pwd -P > $(VENV)/.folder
	@sed '$(LEFT_OUT)' requirements.txt > $(VENV)/requirements.txt
	@$(PIP) install --quiet $(INDEX) -r $(VENV)/requirements.txt || { \
	  echo "The packages could not be installed. If it is onnxruntime-qnn (no wheel here; on Linux it needs glibc 2.35): make HTP=0 run"; exit 1; }
	@if [ '$(HTP)' = 0 ]; then $(PIP) uninstall --quiet --yes onnxruntime-qnn 2>/dev/null || true; fi
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.making
	@echo '$(CURDIR)' > $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .qtools-staging-*
	find . -name __pycache__ -prune -exec rm -rf {} +

FORCE:
