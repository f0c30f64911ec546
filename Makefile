# make install      everything into .venv, once
# make quickstart   digits -> shards -> two ranks -> evaluation, report -> export -> guided samples
# make test         the quick tests; needs no GPU
# make test-slow    whole runs, most of which are killed, starved or damaged and must recover
# make lint         ruff, as CI runs it

PYTHON ?= python3
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # most tests wait more than they compute

.PHONY: install quickstart test test-slow lint

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	@echo "installing into $(VENV) (some minutes the first time: torch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --disable-pip-version-check --editable ".[dev]" \
		> $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
	@touch $@

quickstart: install
	@trap : INT; $(VENV)/bin/python launch/quickstart.py || test $$? = 130  # it says what Ctrl-C left

test: install
	@$(PYTEST) -m "not slow"

test-slow: install
	@$(PYTEST) -m slow

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
