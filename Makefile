# `make demo` and `make test` are the two commands: each sets up .venv by itself on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench bench-gpu clean

demo: .venv/demo
	$(BIN)/unmask run tiny

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev  # a few minutes; see bench/ for more
	$(BIN)/python bench/train_step.py --shape S
	$(BIN)/python bench/train_step.py --shape S --optimizer muon
	for stage in sft reward ppo; do $(BIN)/python bench/stage_step.py --stage $$stage || exit 1; done
	$(BIN)/python bench/generate.py --shape S --batch 16
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/data.py
	$(BIN)/python bench/startup.py

bench-gpu: .venv/dev  # on a CUDA device; NANOGPT=DIR, a clone of nanoGPT, is timed beside it
	$(BIN)/python bench/gpu.py $(if $(NANOGPT),--nanogpt-dir $(NANOGPT))

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unmask needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,report,hf]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,report,hf,text,dev]'
	touch $@
