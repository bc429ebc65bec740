# The front door: every habit of the project is a target. `make demo` and `make test` do all the set-up.

PYTHON ?= python3
# How many files of tests run at a time, more than a CI machine has cores: tests wait a lot. Each takes up to 2 GiB.
PROCESSES := 3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The command alone, as the demo needs it.
COMMAND := $(VENV)/.command
DEMO := build/demo
PASSPHRASE := correct horse battery staple

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' qubes_restore_svc/__init__.py)
RPM := build/rpm
DEB := build/deb
# What the packages are made of: the work tree as it is, without what was built in it.
PACKAGED := LICENSE README.md bin completion debian desktop docs/administration.md docs/configuration.md docs/schema etc fleet man \
    post-install.d pyproject.toml qubes-rpc qubes_restore_svc rpc-policy setup.py systemd tmpfiles tools
TAR_SOURCE := tar --create --exclude=__pycache__ --exclude='*.so' --owner=0 --group=0 \
    --transform='s,^,qubes-restore-svc-$(VERSION)/,' $(PACKAGED)
# Other systems know these packages under other names, and only inspect what is built.
RPM_DEPENDENCIES := $(if $(wildcard /etc/fedora-release),,--nodeps)

.PHONY: help demo test lint types check bench torture fuzz mutants conformance engines format rpm deb clean system-demo system-test

help:
	@echo "make demo    write a sample backup, restore it in the sandbox, compare, look into it"
	@echo "make test    ruff, mypy and pytest"
	@echo "make conformance QUBES=DIR   compare the emulation with the sources of Qubes R4.3 in DIR"
	@echo "make engines run the role of Ansible and the states of Salt with the real engines"
	@echo "make bench   measure a restore beside the stock programs; BENCH_ARGS=--help for options"
	@echo "make torture restore damaged archives, and restore on a system that fails; ARGS=--help for options"
	@echo "make fuzz    feed every parser with what nobody would write; ARGS=--help for options"
	@echo "make mutants break important lines, one at a time, and see which of them no test notices"
	@echo "make rpm     the packages for Fedora and dom0, in $(RPM)"
	@echo "make deb     the packages for Debian, in $(DEB)"
	@echo "make clean   remove what the other targets made"

demo: system-demo $(COMMAND)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo; echo "== A sample backup: three qubes, encrypted with the passphrase '$(PASSPHRASE)'"
	@tools/demo-images $(DEMO)/images
	@$(BIN)/python -m tests.support.backup_writer $(DEMO)/sample.qbackup --expect $(DEMO)/sample.json \
	    --passphrase "$(PASSPHRASE)" --log-n 16 --chunk-mib 8 \
	    --qube work:64:0 --image work/private=$(DEMO)/images/private.img --qube vault:32:0.3 \
	    --qube debian-12-clone:48:0.4:TemplateVM --image debian-12-clone/root=$(DEMO)/images/root.img
	@echo "$(PASSPHRASE)" > $(DEMO)/passphrase
	@echo; echo "== What is in it"
	$(BIN)/qubes-restore-svc list $(DEMO)/sample.qbackup -p $(DEMO)/passphrase
	@echo; echo "== Restore it, through a worker in a sandbox"
	$(BIN)/qubes-restore-svc extract $(DEMO)/sample.qbackup -p $(DEMO)/passphrase --to $(DEMO)/restored
	@echo; echo "== Compare the disk images with what went into the backup"
	@$(BIN)/python -m tests.support.compare $(DEMO)/sample.json $(DEMO)/restored
	@echo; echo "== Look into one: the commands above mount them; this needs no root"
	PATH=$$PATH:/usr/sbin:/sbin debugfs -R 'cat /home/user/Documents/notes.txt' $(DEMO)/restored/work/private.img

# The tests start many processes. Each would compile its modules anew if nobody had kept them compiled.
test: system-test $(STAMP) lint types
	@$(BIN)/python -m compileall -q -j 0 -x '/test_\w+\.py' qubes_restore_svc tests
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: system-test $(STAMP)
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

# DIR has checkouts of qubes-core-admin, qubes-core-admin-client and qubes-core-qrexec, of any of them.
conformance: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,conformance]'
	QUBES='$(if $(QUBES),$(abspath $(QUBES)))' $(BIN)/pytest -rPs tests/conformance

# Salt alone takes minutes to install, so the tests of both engines are skipped where this was not run. From 3008 on,
# Salt pins the newest release of each library, which an index that lags behind does not have.
engines: system-test $(STAMP)
	$(PYTHON) -m venv build/engines
	build/engines/bin/pip install --quiet --disable-pip-version-check 'ansible-core>=2.14' 'salt<3008'
	$(BIN)/pytest -rs tests/fleet

# All of it takes two hours. The quick part of it is in `make test`.
torture: system-test $(STAMP)
	$(BIN)/python -m tests.torture $(ARGS)

# Takes ten minutes.
mutants: system-test $(STAMP)
	$(BIN)/python -m tests.torture.mutants $(ARGS)

# With coverage to guide it where atheris is: pip install atheris
fuzz: system-test $(STAMP)
	$(BIN)/python -m tests.fuzz $(ARGS)

# The packages are for the Python of the system, whatever PYTHON is.
rpm:
	rm -rf $(RPM) && mkdir -p $(RPM)/work/SOURCES $(RPM)/work/tmp
	$(TAR_SOURCE) --gzip --file=$(RPM)/work/SOURCES/qubes-restore-svc-$(VERSION).tar.gz
	sed 's/@VERSION@/$(VERSION)/' rpm_spec/qubes-restore-svc.spec.in > $(RPM)/work/qubes-restore-svc.spec
	rpmbuild -bb --quiet $(RPM_DEPENDENCIES) --define '_topdir $(abspath $(RPM)/work)' \
	    --define '_tmppath $(abspath $(RPM)/work/tmp)' --define '_rpmdir $(abspath $(RPM))' \
	    --define '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
	    $(RPM)/work/qubes-restore-svc.spec
	rm -rf $(RPM)/work

deb:
	rm -rf $(DEB) && mkdir -p $(DEB)/work
	$(TAR_SOURCE) --file=$(DEB)/work/source.tar
	tar --extract --file=$(DEB)/work/source.tar --directory=$(DEB)/work
	cd $(DEB)/work/qubes-restore-svc-$(VERSION) && dpkg-buildpackage --build=binary --unsigned-changes
	mv $(DEB)/work/*.deb $(DEB) && rm -rf $(DEB)/work

clean:
	rm -rf build $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

system-demo:
	@tools/system-packages demo $(PYTHON)

system-test:
	@tools/system-packages test $(PYTHON)

$(COMMAND): pyproject.toml setup.py $(wildcard qubes_restore_svc/kdf/_scrypt/*) | system-demo
	@echo "== Install the command and its libraries in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --editable .
	@touch $@

$(STAMP): $(COMMAND)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
