# Two commands do everything on a fresh machine: `make study` and `make test`.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# notebooks' kernels and DVC's commands must find the environment's python first
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONDONTWRITEBYTECODE := 1
export DVC_NO_ANALYTICS := 1

.PHONY: help setup study thesis tables test faults verify audit lint fmt lock readme clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## make the environment .venv from requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "kdstudy needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): a few minutes and 6 GB, once"
	@if command -v uv > /dev/null; then \
	  uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --require-hashes -r requirements.lock && \
	  uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation -e . ; \
	else \
	  $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock && \
	  $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . ; \
	fi
	@touch $@

study: $(READY) ## the quick profile: teachers, students, tables and report on a CPU, in minutes
	@dvc --wait-for-lock repro report@quick
	@echo "report: $(CURDIR)/reports/quick/report.html"

thesis: $(READY) ## the thesis profile: CIFAR-10 and CIFAR-100, many GPU hours; finished runs are never repeated
	@dvc --wait-for-lock repro report@thesis
	@echo "report: $(CURDIR)/reports/thesis/report.html"

tables: $(READY) ## tables and report of the thesis profile from the records at hand, no training
	@dvc --wait-for-lock repro --single-item --force tables@thesis speed@thesis report@thesis
	@echo "report: $(CURDIR)/reports/thesis/report.html"

test: $(READY) ## all tests
	@python -m pytest -q -n auto --dist loadfile

faults: $(READY) ## kill the quick profile 100 times and break it in every other way; reports/faults says what came of it
	@python -m tests.faults --kills 100 --work .kdstudy/faults --out reports/faults

verify: $(READY) ## check all results on record against records and tables
	@python -m kdstudy verify

audit: $(READY) ## known vulnerabilities of what is pinned, secrets in tracked files; needs a network
	@uvx pip-audit -r requirements.lock --require-hashes --disable-pip --no-deps --strict --progress-spinner off
	@git ls-files -z -- . ':!reports' | xargs -0 uvx --from detect-secrets detect-secrets-hook --no-verify \
	  --exclude-lines '^def test_|"[0-9a-f]{64}"'

lint: $(READY) ## style of code and notebooks
	@ruff check .
	@ruff format --check .
	@python -m kdstudy format --check

fmt: $(READY) ## bring code and notebooks into their canonical form
	@ruff check --fix --quiet .
	@ruff format --quiet .
	@python -m kdstudy format

lock: $(READY) ## resolve requirements.lock anew from pyproject.toml
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-annotate --no-header --quiet -o requirements.lock

readme: $(READY) ## put the quick profile's table and picture into README.md
	@python -m kdstudy readme

clean: ## remove what the quick profile made; records of finished runs in .kdstudy stay
	@rm -rf runs/quick reports/quick data/digits.npz data/digits.json
