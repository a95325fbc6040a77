# `make` prints the targets. Each sets up what it needs on a fresh machine: git, Python >= 3.10 with venv, a C compiler (for
# `make test` a C++ one too: g++).

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
STORIES := build/stories.so

help:            ## print this
	@sed -n 's/^\([a-z]*\): *\(.*\)## /\1\t/p' $(MAKEFILE_LIST)

dev: $(VENV)/.ready  ## make .venv with all a developer needs, llmc on its path

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@echo "setting up $(VENV) (PyTorch, TVM, ONNX: a few minutes the first time)" >&2
	@test -x $(BIN)/pip || python3 -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e '.[compiler,serve,zig,cuda,dev]'
	@touch $@

run: $(VENV)/.ready  ## compile the demonstration model and let it tell a story
	@mkdir -p build
	@$(BIN)/llmc compile examples/stories/model -o $(STORIES)
	@printf '\nOnce upon a time'
	@$(BIN)/llmc run $(STORIES) -p "Once upon a time" -n 400

test: $(VENV)/.ready  ## lint, type-check and run all tests
	@$(MAKE) --no-print-directory -j 2 lint tests

tests: $(VENV)/.ready
	@$(BIN)/python -m pytest -n 2 -q --max-worker-restart 0

quick: $(VENV)/.ready  ## the one-minute test: a two-layer model end to end
	@$(BIN)/python -m pytest -q tests/test_tiny.py

lint: $(VENV)/.ready  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

golden: $(VENV)/.ready  ## rewrite the golden files after a change you meant
	@$(BIN)/python -m pytest -q -n 2 --update-golden tests/passes tests/compiler tests/cli

bench: $(VENV)/.ready  ## measure decode beside Hugging Face, draw build/chart.png (7B: hours; MODELS=opt-125m: minutes)
	@mkdir -p build
	@$(BIN)/llmc bench $(MODELS) --plot build/chart.png --resume

clean:           ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.PHONY: help dev run test tests quick lint golden bench clean
