# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv from requirements.lock first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LIBERO := .venv-libero

.PHONY: demo demo-vision demo-cube test test-fast test-slow test-faults test-libero lint format lock clean help

help:
	@grep -E '^## ' $(MAKEFILE_LIST) | sed 's/^## //'

## make demo         train a small pi0 in a simulator, offline then online, and write runs/demo/report.html
demo: $(INSTALLED)
	$(BIN)/acrlpd train demo --overwrite

## make demo-vision  the same with a camera; needs EGL or OSMesa
demo-vision: $(INSTALLED)
	$(BIN)/acrlpd train demo-vision --overwrite

## make demo-cube    the same in OGBench's cube-single
demo-cube: $(INSTALLED)
	$(BIN)/acrlpd train demo-cube --overwrite

## make test         parity, formats, the update, a whole run with kill and resume: about 10 minutes on two cores
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "(not slow or golden) and not libero"

## make test-fast    for the loop of editing: pure functions, losses, chunks, configurations; a minute on two cores
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "not slow and not libero" \
		-p tests.budget --cpu-budget 80 $(FAST)

# Files whose tests start no process and compile next to nothing. A file that is gone or has grown slow fails the target.
FAST := $(addprefix tests/,$(addsuffix .py,\
	test_files test_pictures \
	$(addprefix agents/test_,health losses sampling) \
	$(addprefix data/test_,chunks episodes finals loader mixture normalize npz replay rewards robots sources \
		tokenizer transforms) \
	$(addprefix envs/test_,custom env) models/test_flow serving/test_codec \
	$(addprefix training/test_,agreement checksum comparison config metrics optimizer)))

## make test-slow    the longer ones: kills at random moments, hostile messages, thousands of episodes
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart=0 -m "slow and not golden and not libero"

## make test-faults  damage every file of a run, kill runs and other work a hundred times; nothing is lost
test-faults: $(INSTALLED)
	ACRLPD_FAULTS=100 $(BIN)/python -m pytest tests/training/test_faults.py tests/training/test_run_folder_faults.py

## make test-libero  the tests that need LIBERO, in .venv-libero: 2.7 GB, built from requirements-libero.lock
test-libero: $(LIBERO)/.installed
	$(LIBERO)/bin/python -m pytest -m libero tests/envs

## make lint         style, types and the import ladder
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## make lock         resolve both lock files anew (needs uv)
lock:
	$(COMPILE) -o requirements.lock \
		--extra metaworld --extra ogbench --extra aloha --extra report --extra lerobot --extra fast --extra grain --extra serving
	$(COMPILE) -o requirements-libero.lock --extra libero --extra report --extra video

COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest --group dev \
	--generate-hashes --no-emit-index-url --no-annotate --no-header

clean:
	rm -rf $(VENV) $(LIBERO) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(INSTALLED): requirements.lock pyproject.toml
$(LIBERO)/.installed: requirements-libero.lock pyproject.toml

%/.installed:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "acrlpd needs Python 3.11 to 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing). Say: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "'$(PYTHON)' cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
