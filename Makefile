# make install      everything into .venv, once
# make quickstart   digits -> shards -> two ranks -> evaluation, report -> export -> guided samples
# make test         the quick tests; needs no GPU
# make test-slow    whole runs, most of which are killed, starved or damaged and must recover
# make test-oldest  tests with the oldest versions that setup.cfg allows, on the oldest Python; downloads 3.4 GB, takes 6 GB
# make lint         ruff, as CI runs it

PYTHON ?= python3
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # most tests wait more than they compute

OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
OLDEST_TESTS := $(addprefix tests/,model test_diffusion.py test_loss.py test_version_0_1.py config checkpoint export \
	distributed/test_engine.py distributed/test_deepspeed_versions.py training/test_training.py training/test_elastic.py)

.PHONY: install quickstart test test-slow test-oldest lint

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

# The floors of setup.cfg, "name >=version" in a line, as pip's constraints "name==version".
$(OLDEST)/installed: setup.cfg pyproject.toml
	@echo "installing into $(OLDEST)"
	@$(OLDEST_PYTHON) -m venv $(OLDEST)
	@sed -nE 's/^ +([A-Za-z0-9-]+) >=([0-9.]+).*/\1==\2/p' setup.cfg > $(OLDEST)/floors.txt
	@$(OLDEST)/bin/pip install --disable-pip-version-check --constraint $(OLDEST)/floors.txt --editable ".[dev]" \
		> $(OLDEST)/install.log 2>&1 || { tail -n 20 $(OLDEST)/install.log; exit 1; }
	@touch $@

test-oldest: $(OLDEST)/installed
	@$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile $(OLDEST_TESTS)

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
