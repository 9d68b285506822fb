# One command each; `make` alone lists them. Recipes are plain sh and quote every path, so that spaces in it work.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup run show ui test check bench clean known-fleet dagster-home

VENV := .venv
BIN := $(VENV)/bin

FLEET ?= stores
PORT ?= 3000
PYTHON ?=
MANY_MODELS_DATA ?= .data

# A data folder is made absolute; an address such as s3://bucket/path stays, and Dagster's own state stays in .data.
ifneq ($(findstring ://,$(MANY_MODELS_DATA)),)
STATE := $(CURDIR)/.data
DATA := $(MANY_MODELS_DATA)
else
STATE := $(if $(filter /%,$(firstword $(MANY_MODELS_DATA))),,$(CURDIR)/)$(MANY_MODELS_DATA)
DATA := $(STATE)
endif

# `dg` compares the environment that it runs in with the active one.
# Executed in the shell's place, so that whatever ends make ends the command, and nothing is left behind.
IN_VENV := exec env PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" MANY_MODELS_DATA="$(DATA)"
DG := $(IN_VENV) dg

export MLFLOW_DISABLE_TELEMETRY := true
run ui check: export DAGSTER_HOME := $(STATE)/dagster
# Beta notices of Dagster about its own code: listing what could be scaffolded, selecting a group, merging definitions.
run ui check: export PYTHONWARNINGS := ignore:Class `SparkDeclarativePipelineScaffolder` is,ignore:Parameter `include_sources` of,ignore:Parameter `execution_type` of
run show known-fleet: export FLEET := $(FLEET)
run: export MANY_MODELS_GROUPS := $(GROUPS)
show: export MANY_MODELS_DATA := $(DATA)

# A launch setting reaches the process only when it is given.
ifneq ($(AS_OF),)
run: export MANY_MODELS_AS_OF := $(AS_OF)
endif
ifneq ($(LIMIT_GROUPS),)
run: export MANY_MODELS_LIMIT_GROUPS := $(LIMIT_GROUPS)
endif
ifneq ($(DRY_RUN),)
run: export MANY_MODELS_DRY_RUN := $(DRY_RUN)
endif
ifneq ($(RETRAIN),)
run: export MANY_MODELS_RETRAIN := $(RETRAIN)
endif

help: ## List the commands
	@echo "usage: make COMMAND [NAME=value ...]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-6s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/ready ## Install everything, pinned, into .venv; does nothing when that is done (PYTHON=: which Python)
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "Ready. Next: make run or make ui",:)

run: setup dagster-home ## Build a fleet, raw tables to predictions: FLEET=stores AS_OF= LIMIT_GROUPS= RETRAIN= GROUPS= DRY_RUN=
	@$(IN_VENV) many-models run "$$FLEET"

show: known-fleet setup ## Print one group's history: FLEET=stores GROUP=262 (its keys; none is the pooled group)
	@$(BIN)/many-models show "$$FLEET" $(GROUP)

ui: setup dagster-home ## Open the Dagster interface: PORT=3000
	@echo "Dagster will be at http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	@$(DG) dev --host 127.0.0.1 --port "$(PORT)"

test: setup ## Run the tests: ARGS= goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

check: setup dagster-home ## Lint, format, types, import direction, compose file, fleet definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	@if docker compose version > /dev/null 2>&1; then \
	  echo "docker compose config"; DAGSTER_DB_PASSWORD=checked MLFLOW_DB_PASSWORD=checked docker compose config --quiet; \
	else echo "docker compose config: not run, there is no docker compose here"; fi
	@echo "many-models check"; $(IN_VENV) many-models check
	@echo "dg check defs"; $(DG) check defs

bench: setup ## Measure one figure, or list them: NAME=
	@$(BIN)/python -m benchmarks $(NAME)

clean: ## Remove caches and the data in .data; with ALL=1 also .venv
	@echo "Removing caches and build results"
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	@if [ -e .data ]; then echo "Removing .data: tables, models, runs"; rm -rf .data; fi
	@if [ "$$(cd "$(STATE)" 2>/dev/null && pwd)" ]; then echo "Leaving $(STATE) as it is: remove it yourself if you mean to"; fi
ifneq ($(ALL),)
	@echo "Removing $(VENV)"
	@rm -rf $(VENV)
endif

known-fleet:
	@case "$$FLEET" in \
	  ''|*[!A-Za-z0-9_-]*) ;; \
	  *) if [ -f "pipeline/defs/$$FLEET/defs.yaml" ]; then exit 0; fi ;; \
	esac; \
	echo "There is no fleet '$$FLEET': pipeline/defs/$$FLEET/defs.yaml does not exist." >&2; \
	echo "Fleets that exist: $$(ls pipeline/defs/*/defs.yaml | cut -d / -f 3 | paste -s -d ' ' -). For example: make run FLEET=stores" >&2; \
	exit 2

# The same rule as in resources/profiles.py, before Dagster writes its databases beside such a folder.
dagster-home:
	@case "$$DAGSTER_HOME" in \
	  *\?*|*\\*|*%[0-9A-Fa-f][0-9A-Fa-f]*) \
	    echo "MANY_MODELS_DATA: the data root has ?, a backslash or an escape such as %20 in its path: $${DAGSTER_HOME%/dagster}" >&2; \
	    echo "SQLite or Delta addresses cannot hold that. Nothing was written; choose another folder." >&2; \
	    exit 2;; \
	esac
	@mkdir -p "$$DAGSTER_HOME"
	@cmp -s dagster.local.yaml "$$DAGSTER_HOME/dagster.yaml" || cp dagster.local.yaml "$$DAGSTER_HOME/dagster.yaml"

# Set-up in two steps, each with its stamp. The first installs the pinned packages: its stamp is a copy of the lock, made
# last, so that an interrupted set-up starts over, and a lock that is only touched costs nothing. The second installs the
# project itself and needs no network. The scripts in .venv hold absolute paths: a checkout that was moved starts over.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
UNREACHABLE := Could not install (see above). Set-up needs a package index once: check the network, or pip's settings, and repeat.

# A command that exists may still not run: pyenv leaves one behind for every Python that any of its versions has.
PYTHONS := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3)

ifneq ($(wildcard $(VENV)/ready),)
ifneq ($(shell cat $(VENV)/ready),$(CURDIR))
.PHONY: $(VENV)/requirements.lock
endif
endif

$(VENV)/requirements.lock: requirements.lock
	@set -eu; \
	if cmp -s requirements.lock $@ && [ "$$(cat $(VENV)/ready 2>/dev/null)" = "$(CURDIR)" ]; then touch $@; exit 0; fi; \
	python=; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11, 3.12 or 3.13 is needed, with its venv module. Tried:" $(PYTHONS) >&2; \
	  echo "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13) and repeat," >&2; \
	  echo "or say where one is: make setup PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "[1/4] Creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV); \
	echo "[2/4] Installing uv, the installer"; \
	awk '/^uv==/ { on = 1; print; next } /^[^ ]/ { on = 0 } on' requirements.lock > $(VENV)/uv.txt; \
	$(PIP) install --no-deps --require-hashes -r $(VENV)/uv.txt || { echo "$(UNREACHABLE)" >&2; exit 1; }; \
	echo "[3/4] Installing $$(grep -c '^[a-z0-9].*==' requirements.lock) pinned packages (a few minutes the first time)"; \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --require-hashes --compile-bytecode -r requirements.lock || { \
	  echo "      uv could not; trying pip, which may know another package index"; \
	  $(PIP) install --no-deps --require-hashes -r requirements.lock || { echo "$(UNREACHABLE)" >&2; exit 1; }; \
	}; \
	cp requirements.lock $@

$(VENV)/ready: $(VENV)/requirements.lock pyproject.toml
	@echo "[4/4] Installing the project itself (editable)"
	@$(PIP) install --no-index --no-deps --no-build-isolation --editable .
	@printf '%s' "$(CURDIR)" > $@
