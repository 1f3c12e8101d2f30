# Everything runs in .venv, which is set up once and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
LINT_READY := $(VENV)/lint-ready
DOCS_READY := $(VENV)/docs-ready
# Two processes of one thread each; the tests of one file share a process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
FAST := tests/test_imports.py $(addprefix tests/,quantizers layers calibration recipe train models)

.PHONY: demo test test-fast prove lint docs setup clean

demo: $(READY)   ## nano SAM2 at 2 bits on generated videos: nearest integers, calibration, training
	mkdir -p runs
	OMP_NUM_THREADS=1 $(BIN)/python train.py recipes/demo_nearest.yaml > runs/demo_nearest.txt 2>&1 & nearest=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python train.py recipes/demo.yaml || exit 1; \
	wait $$nearest || { cat runs/demo_nearest.txt; exit 1; }
	$(BIN)/python -m qsam2 report runs/demo_nearest runs/demo --out runs/demo.html

test: $(READY)   ## the test suite, without the exhaustive runs: at most 10 minutes on two cores
	$(PYTEST)

test-fast: $(READY)   ## tensors and one small model: at most 90 seconds
	$(PYTEST) -m "not slow and not prove" $(FAST)

prove: $(READY)   ## the exhaustive runs: thousands of generated cases, every recipe carried out
	$(PYTEST) -m prove

lint: $(LINT_READY)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qsam2

docs: $(DOCS_READY)   ## the site of docs/, into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file docs/site/mkdocs.yml

setup: $(READY)   ## PyTorch, sam2 without its CUDA extension, this package

$(READY): pyproject.toml constraints.txt requirements-sam2.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] < (3, 13) else "qsam2 needs Python 3.10 to 3.12: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision setuptools wheel
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --require-hashes -r requirements-sam2.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt --config-settings editable_mode=compat -e ".[test]"
	touch $@

$(LINT_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[lint]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[docs]"
	touch $@

clean:   ## remove the environment
	rm -rf $(VENV)
