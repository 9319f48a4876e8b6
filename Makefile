# make demo   builds Kiln and shows the main job end to end
# make test   everything that can fail
# make bench  speed, as ratios
# make fuzz   hostile input, a minute each
# make lint   formatting and clippy
# Each installs the Debian packages that it needs and compiles RocksDB once (kept in ~/.cache/kiln).

SHELL := /bin/bash
CARGO := cargo
# Sandboxes, overlay mounts and base images with owners need root.
SUDO := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo -E env "PATH=$$PATH")
RUNNER := $(if $(SUDO),CARGO_TARGET_$(shell uname -m | tr a-z A-Z)_UNKNOWN_LINUX_GNU_RUNNER='$(SUDO)')
export CARGO_TERM_COLOR ?= auto

.PHONY: build demo test fuzz bench lint deny setup-build setup-lab rocksdb

setup-build:
	@tools/setup.sh build

setup-lab:
	@tools/setup.sh build lab

rocksdb: setup-build
	@tools/rocksdb.sh

build: rocksdb
	$(CARGO) build --release --locked -p kiln

demo: setup-lab build
	@$(SUDO) tools/demo.sh

test: setup-lab rocksdb
	$(CARGO) build --release --locked --workspace
	@$(SUDO) tools/base-images.sh busybox tcc >/dev/null
	$(RUNNER) $(CARGO) test --release --locked --workspace

# Each target for a minute; make test runs them for a second.
fuzz: rocksdb
	KILN_FUZZ_SECONDS=60 $(CARGO) test --release --locked -p kiln-session --test hostile
	KILN_FUZZ_SECONDS=60 $(RUNNER) $(CARGO) test --release --locked -p kiln-daemon --test daemon hostile -- --test-threads 1

bench: setup-lab rocksdb
	$(CARGO) build --release --locked -p kiln -p kiln-integration --bins
	@$(SUDO) tools/base-images.sh busybox >/dev/null
	@$(SUDO) target/release/kiln-bench $(BENCH)
	$(CARGO) bench --locked --workspace --bench graphs

lint: rocksdb
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

deny:
	$(CARGO) deny check
