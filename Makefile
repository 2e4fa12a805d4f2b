# make help says what there is. Needs root, git, make and Python 3.11 or newer on Debian 12 or 13; installs the rest.
PROVINCE ?= daklak
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export LC_ALL := C.UTF-8

.DEFAULT_GOAL := help
.PHONY: help lab lab-status lab-down test soak lint unit docs

help: ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

# The virtual environment, from the pinned requirements; made anew when they change.
$(BIN)/.made: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-venv; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

lab: $(BIN)/.made ## a province's mail service on this machine (PROVINCE=daklak)
	@$(BIN)/python lab/lab.py up --province $(PROVINCE)

lab-status: $(BIN)/.made ## is it healthy?
	@$(BIN)/python lab/lab.py status

lab-down: $(BIN)/.made ## stop it and remove it wholly
	@$(BIN)/python lab/lab.py down

test: $(BIN)/.made ## every check that CI runs, on hosts of its own
	@$(BIN)/python tests/prove.py

soak: $(BIN)/.made ## the long campaigns: every province whole, 50 killed runs, every fault, every guarded setting broken
	@$(BIN)/python tests/campaigns.py

bench-%: $(BIN)/.made ## one benchmark: lab, delivery, directory, filters, replication, backup
	@$(BIN)/python bench/$*.py

lint: $(BIN)/.made ## ruff, mypy, yamllint, ansible-lint, generated docs
	@$(BIN)/python tests/prove.py --only lint

unit: $(BIN)/.made ## unit tests
	@$(BIN)/python tests/prove.py --only unit

docs: $(BIN)/.made ## roles' READMEs and docs/compliance.md, from their sources
	@$(BIN)/python docs/generate.py
