#!/bin/bash
# Builds build/blockhost-provisioner-libvirt_<version>_amd64.deb, the same bytes whenever and wherever the same toolchain does it.
#
# On Debian 12 with a Rust toolchain from rustup. Installs the Debian packages it lacks (as root or through sudo); needs no network when
# those are there and cargo has the crates of Cargo.lock.
set -euo pipefail

cd "$(dirname "$0")"
if ! command -v cargo >/dev/null && [ -r "$HOME/.cargo/env" ]; then
    # shellcheck disable=SC1091 # made by rustup
    . "$HOME/.cargo/env"
fi
command -v cargo >/dev/null || { echo 'build-deb: there is no cargo: install a Rust toolchain with rustup' >&2; exit 1; }
tests/host/setup build package

out=${BLOCKHOST_DEB_OUT:-build}
mkdir -p "$out"
rm -f -- "$out"/blockhost-provisioner-libvirt_*.deb
version=$(dpkg-parsechangelog --show-field Version)

# What the environment says must not show in the package.
umask 022
export LC_ALL=C.UTF-8 TZ=UTC DEB_RULES_REQUIRES_ROOT=no
unset SOURCE_DATE_EPOCH DEB_BUILD_OPTIONS DEB_BUILD_PROFILES
log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
package() {
    debian/rules clean
    debian/rules build
    debian/rules binary
}
if [ -n "${BLOCKHOST_DEB_BINARIES-}" ]; then
    package >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
else
    package >&2
fi
deb=$out/blockhost-provisioner-libvirt_${version}_amd64.deb
[ -s "$deb" ] || { echo "build-deb: the build made no $deb" >&2; exit 1; }
printf '%s\n' "$deb"
