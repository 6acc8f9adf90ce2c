# `make` alone lists the targets. `make run` and `make test` do all the set-up they need.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.PHONY: help install run walkthrough test test-all sim mutants soak nemesis crash-sweep ansible-full lint lint-types lint-ansible test-apart test-pure test-shared lab-prepared fix bench lab lab-expand lab-full lab-down lock clean test-packages

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(STAMP) ## Set up, and let Ansible take a cluster from nothing to three while a client writes
	@$(PYTHON) examples/ansible/run.py

walkthrough: $(STAMP) ## By hand, driven by itself: one node grows to three and survives a kill
	@$(PYTHON) examples/single-node-expansion/walkthrough.py

install: $(STAMP) ## Make .venv with dengine and everything that development needs

# Rebuilt when the dependencies change; the source itself is installed in place. The stamp is
# the last step, so an interrupted installation is simply done again.
$(STAMP): pyproject.toml
	@[ ! -L $(VENV) ] || { echo "$(VENV) is a link: it would be emptied where it points; remove it" >&2; exit 1; }
	@scripts/system-packages.sh python3-venv
	python3 -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[node,dev,ops]'
	@touch $@

lint: $(STAMP) ## ruff, mypy --strict, yamllint, ansible-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(MAKE) --no-print-directory -j 2 -O lint-types lint-ansible  # one core each

lint-types: $(STAMP)
	$(VENV)/bin/mypy --strict dengine

lint-ansible: $(STAMP)
	$(VENV)/bin/yamllint --strict .
	ANSIBLE_COLLECTIONS_PATH=ansible/collections PATH=$(VENV)/bin:$$PATH $(VENV)/bin/ansible-lint --offline --strict -q ansible inventories

fix: $(STAMP) ## Let ruff repair and format what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# These start machines, or are about how long clients wait, or record once for all tests of a file: one
# after the other. Beside them, on the other core, those that wait for nothing. All others share both
# cores, in three processes, for they wait a lot; one gets its next test when it has done the last, for
# some take very much longer.
APART  := tests/lab \
          $(patsubst %,tests/integration/test_%.py,example hostile joining_under_load outage snapshot_load walkthrough watch)
PURE   := tests/raft tests/simulation tests/mutants
SHARED := --maxschedchunk 1 -n

ROTATE :=
test: ROTATE := --rotate
test: test-all ## Install what the tests need and run them: of the slowest kinds half, by commit

test-all: lint test-packages ## The same, and all of those
	@scripts/system-packages.sh chromium-headless-shell fish zsh
	@$(MAKE) --no-print-directory -j 2 test-shared lab-prepared ROTATE=$(ROTATE)
	@$(MAKE) --no-print-directory -j 2 test-apart test-pure ROTATE=$(ROTATE)

test-shared: $(STAMP)
	$(PYTHON) -m pytest tests $(patsubst %,--ignore=%,$(APART) $(PURE)) -q $(SHARED) 3 $(ROTATE)

lab-prepared:  # where there can be no lab, its tests say so
	-@[ "$$(id -u)" != 0 ] || nice -n 10 scripts/lab prepare >/dev/null

test-apart: $(STAMP)
	$(PYTHON) -m pytest $(APART) -q $(ROTATE)

test-pure: $(STAMP)
	@mkdir -p build
	nice -n 19 $(PYTHON) -m pytest $(PURE) -q >build/test-pure.log 2>&1; ended=$$?; cat build/test-pure.log; exit $$ended

SEEDS ?= 1000
FROM  ?= 0

sim: $(STAMP) ## Simulated clusters under faults: make sim SEEDS=1000 FROM=0
	$(PYTHON) -m tests.simulation.run --seeds $(SEEDS) --from $(FROM)

RECORD ?=

mutants: $(STAMP) ## Defects put in on purpose: is every one found? RECORD=1 writes down how soon
	$(PYTHON) -m tests.mutants.run $(if $(RECORD),--record)

MINUTES ?= 10
SEED    ?=

nemesis: $(STAMP) test-packages ## Real nodes under faults, as root: make nemesis MINUTES=10 SEED=7 JOBS=2
	$(PYTHON) -m tests.nemesis.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

soak: $(STAMP) test-packages ## Simulator, mutants and nemesis in turn until told to stop; keeps books
	$(PYTHON) -m tests.soak

test-packages:
	@scripts/system-packages.sh e2fsprogs iproute2 nftables strace util-linux

crash-sweep: $(STAMP) test-packages ## A crash or an error at every step on disk of the snapshot paths; 100 000 increments (an hour)
	DENGINE_CRASH_SWEEP=1 $(PYTHON) -m pytest tests/raft/test_random.py tests/api/test_openapi.py tests/crash_sweep \
		$(patsubst %,tests/integration/test_%.py,crashes damage exactly_once locks secrets snapshot_writer) -v $(SHARED) 2

ansible-full: $(STAMP) ## The playbooks killed at every task, each check made to fail (hours)
	DENGINE_LAB_TESTS=1 $(PYTHON) -m pytest tests/ansible -v $(SHARED) 2

bench: $(STAMP) ## Compare with a bare aiohttp server and with etcd; prints and saves a table
	$(PYTHON) bench/run.py

lab: $(STAMP) ## Three machines with the addresses of inventories/vagrant, one voter on n1 with some data
	scripts/lab up
	@$(call in_lab,site.yml)
	scripts/lab exec $(PYTHON) -m examples.ansible.seed 10.88.0.11:9081 inventories/vagrant/.dengine/secrets.json

lab-expand: $(STAMP) ## One voter in the lab becomes three
	@$(call in_lab,expand.yml)

lab-full: ansible-full test-packages ## The playbooks here, and the tests on three booted machines of their own
	@scripts/system-packages.sh faketime
	DENGINE_LAB_TESTS=1 $(PYTHON) -m pytest tests/lab -v

lab-down: ## Remove the lab without a trace; only the cached box stays
	scripts/lab down
	rm -rf inventories/vagrant/.dengine

# A playbook on the lab, from inside its network. From there no index can be reached: what the
# machines get is built before, and found to be up to date.
in_lab = scripts/build-wheelhouse inventories/vagrant/.dengine/wheelhouse/cp311-$$(uname -m) --python 3.11 --arch $$(uname -m) && \
	scripts/lab exec $(VENV)/bin/ansible-playbook -i inventories/vagrant ansible/$(1)

lock: $(STAMP) ## Pin the newest dependencies for the release (with Python 3.11)
	$(PYTHON) scripts/build-wheelhouse --update-lock

clean: ## Remove the virtual environment, caches and build results
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
