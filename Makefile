# The two commands that a fresh machine needs are `make demo` and `make test`; each makes its own environment first.
# Needed before: Python 3.11 or newer with pip, and a package index that pip can reach.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test check sim soak chaos golden fuzz format bench clean network-tools

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SEEDS ?= 200
MINUTES ?= 5
SCHEDULES ?= 20
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  ARGS='...' is handed to demo, bench and pytest; PYTHON=... chooses the interpreter of the environment."

venv: $(STAMP) ## make the environment in .venv with all pinned packages

demo: $(STAMP) ## three nodes train a model, lose a worker and their leader, and finish
	@$(BIN)/python -m distroml.demo $(ARGS)

test: check network-tools ## all checks, then all tests
	@$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## lint, format, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

sim: $(STAMP) ## SEEDS random fault schedules on simulated clusters, in virtual time
	@$(BIN)/python -m tests.sim --seeds $(SEEDS) --jobs 2 $(ARGS)

soak: $(STAMP) ## SCHEDULES random faults on real nodes; ARGS='--seed S' plays from that seed on
	@$(BIN)/python -m tests.soak --schedules $(SCHEDULES) $(ARGS)

chaos: $(STAMP) network-tools ## real nodes under faults: ARGS='run --seed 7 --duration 120', 'soak --hours 2', 'mutants'
	@$(BIN)/python -m chaos $(or $(ARGS),run)

golden: $(STAMP) ## play the protocol scripts; ARGS=--rewrite writes what happens into them
	@$(BIN)/python -m tests.golden $(ARGS)

fuzz: $(STAMP) ## MINUTES of hostile bytes for all that decodes; guided by coverage with the extra 'fuzz'
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

format: $(STAMP) ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## run benchmarks, such as ARGS='spine --quick'
	@$(BIN)/python -m bench $(ARGS)

clean: ## remove what runs and tools left (the environment stays)
	@rm -rf .demo .fuzz chaos-runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench-results build *.egg-info
	@find distroml tests bench chaos examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Faults of the network need these, and root; without them their tests are skipped and chaos leaves them out.
network-tools:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v ip && command -v tc && command -v nft; } >/dev/null; then \
	  echo "Installing iproute2 and nftables for the faults of the network ..."; \
	  { apt-get install -y -qq iproute2 nftables || { apt-get update -qq && apt-get install -y -qq iproute2 nftables; }; } >/dev/null 2>&1 \
	  || echo "iproute2 and nftables could not be installed: the tests that need them are skipped." >&2; \
	fi

# torch goes first: it is most of the work, and the rest then cannot pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "DistroML needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "Making $(VENV) with $$($(PYTHON) -V) ..."; \
	  $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	    echo "(no ensurepip here; trying the pip that is installed)"; \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) \
	    && $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet pip; \
	  } || { \
	    echo "'$(PYTHON) -m venv' could not make an environment with pip." >&2; \
	    echo "Debian and Ubuntu: apt install python3-venv python3-pip. Elsewhere: install Python with ensurepip, or make PYTHON=..." >&2; \
	    exit 1; }; }
	@echo "Installing the pinned packages into $(VENV) (torch is the large one) ..."
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e '.[digits,dev]'
	@touch $@
