# make demo        the whole path on made-up sound: synthesise, fine-tune, classify, draw
# make test        lint, types and tests
# make test-slow   the tests that take minutes
# Each sets up .venv first, once. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-slow clean

demo: $(READY)
	$(BIN)/python -m scripts.tour

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# On Linux the registry's torch brings gigabytes of CUDA. Where pip would take that one and there is
# no GPU to use it, uv, which knows where PyTorch keeps its CPU builds, is asked first.
$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): this takes some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt pip
	@if ! $(BIN)/python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null \
	    && $(PIP) install --quiet --dry-run --report - $(TORCH) | grep -q '"name": "nvidia'; then \
	    $(PIP) install --quiet --constraint constraints.txt uv \
	    && $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu $(TORCH) \
	    || echo "No CPU build of torch to be had: installing the one with CUDA."; \
	fi
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev,export,train]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
