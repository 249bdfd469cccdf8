# `make demo` and `make test` work on a fresh machine: both make the environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
CUSTOMER := 01104905
# GPU=1 adds the CUDA libraries; an environment that has them keeps them.
GPU ?= $(wildcard $(VENV)/.installed-gpu)
SUFFIX := $(if $(filter-out 0,$(GPU)),-gpu)
LOCK := requirements$(SUFFIX).lock
INSTALLED := $(VENV)/.installed$(SUFFIX)

.PHONY: help env lock demo docs test test-long test-cluster soak check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

env: $(INSTALLED)  ## make .venv from the lock, with the console script `twotower` in it; GPU=1: with CUDA

$(INSTALLED): $(LOCK) setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed, found $$($(PYTHON) --version). Name one: make env PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Making $(VENV) from $(LOCK) (about two minutes the first time) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check
	@touch $@
	@echo "Made $(VENV); the command is $(BIN)/twotower."

COMPILE = uv pip compile setup.py --extra all --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --generate-hashes --no-header --quiet

lock:  ## resolve both locks again from setup.py (needs uv on the PATH)
	$(COMPILE) -o requirements.lock
	$(COMPILE) --extra gpu --constraint requirements.lock -o requirements-gpu.lock
	sed -i '1i # The tested set. Made by `make lock`; installed by `make env`.' requirements.lock
	sed -i '1i # The same with CUDA. Made by `make lock`; installed by `make env GPU=1`.' requirements-gpu.lock

demo: env  ## the whole path on real data: prepare, train, evaluate, export, query
	@test -f demo/products.csv || $(BIN)/python docs/demo_products.py demo/products.csv
	@$(BIN)/twotower run --config docs/demo.yaml --workdir $(DEMO)
	@echo; echo "Ten products that customer $(CUSTOMER) did not buy yet, beside what the customer bought, by class and price:"
	@$(BIN)/twotower query $(CUSTOMER) --models $(DEMO)/models --name ta_feng --k 10 --exclude_seen
	@echo "make demo: done; everything lies in $(DEMO)/."

docs: env  ## the pages as a site in site/; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir site
	@echo "make docs: open site/index.html, or serve it: python -m http.server --directory site"

test: env check  ## lint, types and all quick tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not soak and not cluster"
	@echo "make test: lint, types and tests passed."

test-long: env  ## what takes longer: many processes, real data
	@$(BIN)/python -m pytest -m "long"

test-cluster: env  ## the Beam jobs on Flink and Spark clusters of processes; needs Java 17 and Maven
	@for engine in flink spark; do test -f build/cluster/$$engine/complete || { \
	  mvn --batch-mode --quiet --file tests/pipeline/cluster/pom.xml --activate-profiles $$engine \
	    dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/build/cluster/$$engine/jars && \
	  touch build/cluster/$$engine/complete; } || exit 1; done
	@$(BIN)/python -m pytest -m cluster

soak: env  ## an hour of attacks, kills, restarts and repeated runs; needs an idle machine
	@$(BIN)/python -m pytest -m soak -s

check: env  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove what the targets made
	rm -rf $(VENV) $(DEMO) build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
