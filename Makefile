# make demo            the whole path on synthetic sound: synthesise, fine-tune, classify, draw
# make test            lint, types and tests
# make test-slow       the tests that take minutes
# make docs            builds the documentation into site/
# make coverage        the tests, with a report of the lines they reach in build/coverage/
# make lowest          regenerates constraints-lowest.txt from setup.cfg
# make release-check   everything a release needs, except the upload
# All set up .venv first, once. PYTHON=python3.12 chooses another interpreter,
# CONSTRAINTS=constraints-lowest.txt the oldest packages that setup.cfg allows.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A process per processor, test file by test file; each takes up to 2 GB of memory.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
VERSION := $(shell sed -n 's/^version = //p' setup.cfg)

.PHONY: demo test lint unit test-slow docs coverage wheel release-check release-state lowest clean

demo: $(READY)
	$(BIN)/python -m scripts.tour

test: lint unit

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

coverage: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) --cov --cov-report=term --cov-report=html

wheel: $(READY)
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --outdir dist
	rm -rf build/wheel
	$(PIP) install --quiet --no-deps --target build/wheel dist/*.whl
	cd build/wheel && ../../$(BIN)/python -m ast_scripts.classify --help >/dev/null

release-check: release-state test test-slow docs wheel
	@echo "$(VERSION) is ready: git tag v$(VERSION), push the tag, upload dist/."

release-state:
	@test -z "$$(git status --porcelain)" || { echo "Commit first: the tree is not clean."; exit 1; }
	@grep -q '^## \[$(VERSION)\] - [0-9-]*$$' CHANGELOG.md \
	    || { echo "CHANGELOG.md has no '## [$(VERSION)] - DATE'."; exit 1; }
	@grep -q '^version: $(VERSION)$$' CITATION.cff \
	    || { echo "CITATION.cff does not have setup.cfg's version ($(VERSION))."; exit 1; }
	@! git rev-parse -q --verify refs/tags/v$(VERSION) >/dev/null \
	    || { echo "v$(VERSION) is already tagged: raise the version in setup.cfg."; exit 1; }

# Without CUDA's packages: a CPU build of torch does not need them.
lowest: $(READY)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) uv
	$(BIN)/uv pip compile --quiet --no-header --no-annotate --python-version 3.10 \
	    --resolution lowest-direct --all-extras setup.cfg \
	    -o build/lowest.txt
	(echo "# The oldest packages that setup.cfg allows, on Python 3.10: make lowest."; \
	    grep -vE '^(nvidia|triton|cuda)' build/lowest.txt; grep '^\(pip\|uv\)==' constraints.txt) \
	    > constraints-lowest.txt

# On Linux, the registry's torch brings gigabytes of CUDA. If pip would install that one and there is
# no GPU, use uv instead, which knows where to find PyTorch's CPU builds. (Not grep -q: pip prints a
# traceback when its reader leaves early.)
$(READY): setup.cfg pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV): this takes a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) pip
	@if ! $(BIN)/python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null \
	    && $(PIP) install --quiet --dry-run --report - $(TORCH) | grep '"name": "nvidia' >/dev/null; then \
	    $(PIP) install --quiet --constraint $(CONSTRAINTS) uv \
	    && $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu $(TORCH) \
	    || echo "No CPU build of torch available: installing the one with CUDA."; \
	fi
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[demo,detection,dev,docs,export,train]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs site *.egg-info
