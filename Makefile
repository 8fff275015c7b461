# Two commands: `make smoke` and `make test`. Everything happens in .venv; delete it to start over.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 25 --durations-min 5
CONSTRAINTS := --constraint constraints.txt

FUZZ_MINUTES ?= 60

.PHONY: smoke test soak incidents check lint types contracts bench clean

smoke: $(VENV)/installed
	$(BIN)/kdconsole --headless smoke

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow"

soak: $(VENV)/installed-test
	$(PYTEST) -m slow
	$(BIN)/python tests/faults/harness.py --kills 200 --command-kills 20
	$(BIN)/python tests/faults/dispatch_soak.py --kills 200 --faults 1000
	$(BIN)/python tests/faults/fuzz_readers.py --minutes $(FUZZ_MINUTES)

incidents: $(VENV)/installed-test
	$(BIN)/python tests/incidents/gallery.py

check: lint types contracts

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

contracts: $(VENV)/installed-test
	$(BIN)/lint-imports

bench: $(VENV)/installed-bench
	$(BIN)/python bench/kd_loss.py
	$(BIN)/python bench/kd_step.py
	$(BIN)/python bench/step_choices.py
	$(BIN)/python bench/stored_teacher.py
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/projection.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/wait_policy.py
	$(BIN)/python bench/console.py
	$(BIN)/python bench/dispatch.py
	$(BIN)/python bench/evidence.py
	$(BIN)/python bench/generation.py
	$(BIN)/python bench/sandbox.py
	$(BIN)/python bench/apr.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is too old; expected Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install $(CONSTRAINTS) --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install $(CONSTRAINTS) --editable '.[test]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed-test
	$(PIP) install $(CONSTRAINTS) --editable '.[bench,test]'
	@touch $@
