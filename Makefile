# Everything a newcomer needs. Each target sets up what it stands on: on a fresh Debian 12 with root or sudo and a Rust
# toolchain, any of them works as the first command.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup build deb demo test test-host test-deb test-fresh bench lint fmt clean

WITH_HOST := tests/host/with-host

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install the Debian packages that are missing
	@tests/host/setup
	@command -v cargo >/dev/null || { echo 'cargo is not in $$PATH: install a Rust toolchain with rustup' >&2; exit 1; }

build: setup ## Build the commands into target/release
	cargo build --locked --workspace --release

deb: ## Build the Debian package into build
	@./build-deb.sh

demo: setup ## Build a template, create a real VM, look at it, destroy it
	@$(WITH_HOST) tests/demo

test: setup ## Run all tests, with real VMs
	@$(WITH_HOST) tests/run

test-host: setup ## Check the commands on a real Debian 12 host, as a VM: systemd, cgroup v2, AppArmor
	@tests/hostvm/run

test-deb: setup ## Build the package, look into it, install it in a chroot; build it again and compare
	@tests/package/run

test-fresh: setup ## Run make demo and make test in a Debian 12 made on the spot, with nothing else in it
	@tests/fresh/run $(FRESH)

bench: build ## Measure against virsh and qemu-img; fails when slower than promised
	@$(WITH_HOST) tests/bench/run

lint: setup ## Check formatting, clippy, scripts, packages, licences
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	@tests/lint/scripts
	@tests/lint/commands
	@tests/lint/licences

fmt: ## Format the Rust code
	cargo fmt --all

clean: ## Remove build results, cached templates, and what killed runs left
	@tests/host/clean
	@rm -rf build debian/.debhelper debian/blockhost-provisioner-libvirt debian/debhelper-build-stamp debian/files debian/manual \
	    debian/*.debhelper debian/*.log debian/*.substvars
	cargo clean
