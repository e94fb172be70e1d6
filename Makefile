# Two commands for a newcomer: `make train` runs the main job on the data that travels with the package, `make test`
# checks everything. Both set up .venv first; nothing outside the checkout changes.
#   make train ARGS="lora.rank=8 trainer.max_updates=20"      make test ARGS="tests/config -q"
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The locks are complete and carry hashes, so dependencies of dependencies are already in them.
LOCKED := $(PIP) install --require-hashes --no-deps

.PHONY: train test check demo lock setup setup-dev setup-tpu simulator shellcheck browser clean

train: setup
	$(BIN)/python -m gemma4_tpu.train $(ARGS)

# The whole path on this CPU: train, merge, evaluate, serve, benchmark, report; ARGS are the training's.
demo: setup-dev simulator
	PYTHON=$(BIN)/python launch/demo.sh $(ARGS)

# COVERAGE=1 also measures which lines the tests reach, in child processes too, and fails under 85%; slower.
test: setup-dev simulator shellcheck browser
ifdef COVERAGE
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
else
	$(BIN)/python -m pytest $(ARGS)
endif

# What CI and the pre-commit hook run first: style, types, spelling; links, floors and pages of docs/.
check: setup-dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:xdist tests/test_floors.py tests/house/test_links.py \
	  tests/house/test_configuration.py::test_the_page_is_what_the_schema_says

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev
setup-tpu: $(VENV)/.tpu          # on a TPU VM: adds libtpu and access to gs://

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.python requirements/core.lock pyproject.toml
	@echo "Installing the locked dependencies into $(VENV) (about 1.5 GB, some minutes) …"
	$(LOCKED) -r requirements/core.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements/dev.lock requirements/torch.txt
	@echo "Installing the test tools …"
	$(LOCKED) -r requirements/dev.lock
	$(PIP) install -r requirements/torch.txt
	@touch $@

$(VENV)/.tpu: $(VENV)/.core requirements/tpu.lock
	$(LOCKED) -r requirements/tpu.lock
	@touch $@

# Tests simulate Verilog with Icarus Verilog.
simulator:
	@command -v iverilog > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get -qq update && apt-get -qq install -y iverilog; \
	  else \
	    echo "iverilog is missing; install it: sudo apt-get install iverilog  (macOS: brew install icarus-verilog)"; \
	    exit 1; \
	  fi; }

# Tests of launch/ check every rendered script; without shellcheck they say what they skip.
shellcheck:
	@command -v shellcheck > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get -qq update && apt-get -qq install -y shellcheck || echo "shellcheck could not be installed"; \
	  else \
	    echo "shellcheck is missing; install it: sudo apt-get install shellcheck  (macOS: brew install shellcheck)"; \
	  fi; }

# Tests open reports in it; without one they say what they skip.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium > /dev/null \
	      || echo "chromium could not be installed"; \
	  else \
	    echo "chromium is missing; install it: sudo apt-get install chromium  (macOS: brew install --cask chromium)"; \
	  fi; }

# Pins stay as they are unless pyproject.toml forbids them; ARGS=--upgrade takes the newest that it allows.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links --override requirements/no-torch.in $(ARGS) pyproject.toml requirements/build.in

lock: setup-dev
	$(COMPILE) --output-file requirements/core.lock
	$(COMPILE) --extra tpu --extra gcp --constraint requirements/core.lock --output-file requirements/tpu.lock
	$(COMPILE) --extra dev --constraint requirements/core.lock --output-file requirements/dev.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
