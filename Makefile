PYTHON ?= python3
BIN := .venv/bin
# make test COVERAGE="--cov --cov-fail-under=85", as CI has it: counting lines takes half as long again.
COVERAGE ?=

.PHONY: setup demo test test-faults lint
setup: .venv/.ready
demo: setup
	$(BIN)/python -m embedded.demo
test: .venv/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=20 $(COVERAGE)
test-faults: .venv/.ready-test
	$(BIN)/python tests/faults/run_all.py
lint: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	-$(BIN)/pip-audit --local --progress-spinner off  # offline it says so, and lint goes on

.venv/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@
.venv/.ready-test: .venv/.ready tests/requirements.txt tests/package-lock.json
	$(BIN)/python -m pip install -q -r tests/requirements.txt
	if command -v npm >/dev/null; then npm ci --prefix tests --no-audit --no-fund --silent; fi  # the glTF validator, axe-core
	touch $@
