# Needs make and Python 3.11 to 3.13 with its venv module; everything else goes into .venv.
# Another interpreter: make test PYTHON=python3.12. More test workers: make test WORKERS=8.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
WORLD_VENV := .venv-world
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

INSTALLED := $(VENV)/.installed
WORLD_INSTALLED := $(WORLD_VENV)/.installed

# Idle torch threads sleep instead of spinning: without it, two busy processes starve each other.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-world lint docs format nano bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(INSTALLED)  ## talk, learn and report with the bundled tiny model
	@$(VENV)/bin/ppg demo

test: $(INSTALLED)  ## all tests that need neither an accelerator nor a network
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses=$(WORKERS) --dist worksteal

test-fast: $(INSTALLED)  ## the same without the slow ones
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses=$(WORKERS) --dist worksteal \
		-m "not slow and not gpu and not network"

test-world: $(WORLD_INSTALLED)  ## one dialogue per domain with only numpy and gymnasium installed
	@PYTHONPATH=. $(WORLD_VENV)/bin/python -c "$$WORLD_STANDS_ALONE"

lint: $(INSTALLED)  ## ruff and mypy, changing nothing
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

docs: $(INSTALLED)  ## build the documentation site into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

format: $(INSTALLED)  ## let ruff fix and format
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

nano: $(INSTALLED)  ## make the bundled tiny language model again
	@$(VENV)/bin/python -m agents.nano.make

bench: $(INSTALLED)  ## measure the environments' speed
	@$(VENV)/bin/python -m benchmarks.env_speed

clean:  ## remove the virtual environments and the tools' caches
	@rm -rf $(VENV) $(WORLD_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "installing the package and its tools into $(VENV) (minutes the first time)"
	@$(VENV)/bin/python $(PIP_INSTALL) -e ".[dev,docs,notebooks]"
	@touch $@

$(WORLD_INSTALLED): constraints.txt
	$(call make_venv,$(WORLD_VENV))
	@echo "installing numpy and gymnasium into $(WORLD_VENV)"
	@$(WORLD_VENV)/bin/python $(PIP_INSTALL) gymnasium numpy
	@touch $@

# $(call make_venv,FOLDER): a virtual environment in FOLDER unless one is there.
define make_venv
@test -x $(1)/bin/python || { \
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: name another, as in make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c "$$CHECK_PYTHON" || exit 1; \
	$(PYTHON) -m venv $(1) || { rm -rf $(1); echo "$(PYTHON) -m venv failed: install its venv module (Debian: python3-venv)" >&2; exit 1; }; \
}
endef

define CHECK_PYTHON
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    found = sys.version.split()[0]
    sys.exit(f'needs Python 3.11 to 3.13, found {found}: name another, as in make PYTHON=python3.12')
endef
export CHECK_PYTHON

define WORLD_STANDS_ALONE
import importlib.util, sys
import gymnasium as gym
import ppg_env

installed = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name)]
if installed:
    sys.exit(f'{installed} is in $(WORLD_VENV), which then proves nothing: remove that folder')
for domain in ('chatting', 'education', 'therapy'):
    env = gym.make('PersonaDialogue-v0', domain=domain)
    env.reset(seed=0)
    turns, over = 0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step('I would rather tell you about myself.')
        turns, over = turns + 1, terminated or truncated
    print(f'{domain}: {turns} turns with numpy and gymnasium alone')
endef
export WORLD_STANDS_ALONE
