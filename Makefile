# Two commands: `make pretrain` trains, grows, evaluates and reports the main job; `make test` runs every check.
# Both make the environment first: .venv, from the versions of constraints.txt. On a machine without a GPU,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make pretrain
# takes the small CPU build of torch. ARGS is passed on: make pretrain ARGS='seed=1', make test ARGS='tests/data -x'.
# Tests run in two processes, as those of the cluster mostly wait; ARGS='-n 0 ...' runs them in one.
# `make nightly` runs what is too long for every change: the exhaustive variants, marked slow.

RECIPE ?= emoji
ARGS ?=
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# A checkout that was moved or copied is installed again: the mark carries its path.
INSTALLED := $(VENV)/installed-$(shell pwd | cksum | cut -d ' ' -f 1)

.PHONY: pretrain test test-oldest suite nightly check format environment clean
.DELETE_ON_ERROR:

pretrain: $(INSTALLED)
	$(PY) -P -m treering.launch train $(RECIPE) $(ARGS)

test: check
	$(PYTEST) $(ARGS)

# The oldest versions that pyproject.toml allows, in an environment of their own; no Slurm, and what is slow stays away.
test-oldest:
	$(MAKE) suite VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt ARGS='--ignore=tests/cluster $(ARGS)'

suite: $(INSTALLED)
	$(PYTEST) $(ARGS)

nightly: check
	$(PYTEST) -m slow $(ARGS)

check: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	MYPYPATH=$(VENV)/checkout $(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

environment: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@if ! $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		if [ -z "$(PYTHON)" ]; then \
			echo "Treering needs Python 3.11 or newer with venv. Install it (Debian, Ubuntu: apt install python3 python3-venv;" >&2; \
			echo "Fedora: dnf install python3; macOS: brew install python), or name yours: make PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $(PYTHON)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@echo "installing the packages of $(CONSTRAINTS): some minutes the first time"
	@DS_BUILD_OPS=0 $(PY) -m pip install -qq -c $(CONSTRAINTS) -e '.[deepspeed,emoji,test]'
	@mkdir -p $(VENV)/checkout && ln -sfn "$(CURDIR)" $(VENV)/checkout/treering # where mypy finds the package by its name
	@rm -f $(VENV)/installed-* && touch $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
