# The front door: every habit of the project is a target. `make demo` and `make test` do all the set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo
PASSPHRASE := correct horse battery staple

.PHONY: help demo test lint types check bench format clean system-demo system-test

help:
	@echo "make demo    write a sample backup, restore it in the sandbox, compare"
	@echo "make test    ruff, mypy and pytest"
	@echo "make bench   time this project against the manual recovery procedure"
	@echo "make clean   remove what the other targets made"

demo: system-demo $(STAMP)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "== A sample backup: three qubes, encrypted with the passphrase '$(PASSPHRASE)'"
	@$(BIN)/python -m tests.support.backup_writer $(DEMO)/sample.qbackup --expect $(DEMO)/sample.json \
	    --passphrase "$(PASSPHRASE)" --log-n 16 --chunk-mib 8 \
	    --qube work:64:0.5 --qube vault:32:0.3 --qube debian-12-clone:48:0.4:TemplateVM
	@echo "$(PASSPHRASE)" > $(DEMO)/passphrase
	@echo; echo "== What is in it"
	$(BIN)/qubes-restore-svc list $(DEMO)/sample.qbackup -p $(DEMO)/passphrase
	@echo; echo "== Restore it, through a worker in a sandbox"
	$(BIN)/qubes-restore-svc extract $(DEMO)/sample.qbackup -p $(DEMO)/passphrase --to $(DEMO)/restored
	@echo; echo "== Compare the disk images with what went into the backup"
	@$(BIN)/python -m tests.support.compare $(DEMO)/sample.json $(DEMO)/restored

test: system-test $(STAMP) lint types
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: system-test $(STAMP)
	$(BIN)/python -m tests.bench.manual_recovery

clean:
	rm -rf build $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

system-demo:
	@tools/system-packages demo $(PYTHON)

system-test:
	@tools/system-packages test $(PYTHON)

$(STAMP): pyproject.toml setup.py $(wildcard qubes_restore_svc/archive/_scrypt/*) | system-demo
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
