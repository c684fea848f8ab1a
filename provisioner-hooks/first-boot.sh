#!/bin/bash
# What a BlockHost host needs before it can run VMs through libvirt. The installer's first boot runs this as root.
#
# STATE_DIR: where a step that is done leaves its mark (.step-libvirt, .step-kvm-check); it is then not done again.
# LOG_FILE: where everything is written, also what goes to standard error.
# Any failure ends it with a non-zero code, and the next run begins where this one stopped.
set -euo pipefail

STATE_DIR=${STATE_DIR:-/var/lib/blockhost}
LOG_FILE=${LOG_FILE:-/dev/null}
readonly BASE=/var/lib/blockhost

packages=(
    # To run VMs
    qemu-system-x86 qemu-utils libvirt-daemon-system libvirt-clients
    # Each VM gets a scope of systemd's
    systemd-container dbus
    # Network filters, bridges, and the way for QEMU to its disks
    ebtables iptables iproute2 acl
    # blockhost-build-template: from a cloud image
    libguestfs-tools
    # The wizard's step that writes db.yaml
    python3-yaml
    # The suite's test script
    jq
)

say() {
    printf 'libvirt: %s\n' "$*" >&2
    printf '%s libvirt: %s\n' "$(date -u +%FT%TZ)" "$*" >>"$LOG_FILE"
}

fail() {
    say "$*"
    exit 1
}

# Runs a command with its output in the log alone; when it fails, the end of it is the reason.
quietly() {
    local output status=0
    output=$("$@" </dev/null 2>&1) || status=$?
    printf '%s\n' "$output" >>"$LOG_FILE"
    [ "$status" -eq 0 ] || say "$1 failed ($status): $(tail -n 3 <<<"$output" | paste -sd ' ')"
    return "$status"
}

virsh() { quietly command virsh -q -c qemu:///system "$@"; }

missing() {
    local package state
    for package in "${packages[@]}"; do
        state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$state" = installed ] || printf '%s\n' "$package"
    done
}

apt_get() {
    # A proxy in /etc/apt/apt.conf.d is apt's own matter. Another apt may be at work in the first minutes of a host.
    quietly env DEBIAN_FRONTEND=noninteractive apt-get -y --no-install-recommends -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@"
}

install_packages() {
    local wanted
    mapfile -t wanted < <(missing)
    [ ${#wanted[@]} -gt 0 ] || return 0
    say "installing ${wanted[*]}"
    # What a run that was cut short has left half done.
    quietly env DEBIAN_FRONTEND=noninteractive dpkg --configure -a || true
    # Lists that are out of date name versions the mirror has dropped; without a mirror, what is at hand may do.
    apt_get update || say 'the package lists could not be refreshed'
    apt_get install "${wanted[@]}" || fail 'the packages of the hypervisor cannot be installed'
    mapfile -t wanted < <(missing)
    [ ${#wanted[@]} -eq 0 ] || fail "still not installed: ${wanted[*]}"
}

start_libvirt() {
    quietly systemctl enable libvirtd.service || fail 'libvirtd cannot be enabled'
    quietly systemctl start libvirtd.service || fail 'libvirtd does not start'
    local tries
    for tries in {1..60}; do
        command virsh -q -c qemu:///system uri >/dev/null 2>&1 && return 0
        sleep 1
    done
    fail "libvirtd does not answer after $tries tries"
}

# libvirt's own network would put up virbr0, which is not the bridge of the VMs and must not be taken for it.
stop_default_network() {
    local networks
    networks=$(command virsh -q -c qemu:///system net-list --all --name) || fail "libvirt's networks cannot be listed"
    grep -qx default <<<"$networks" || return 0
    networks=$(command virsh -q -c qemu:///system net-list --name)
    if grep -qx default <<<"$networks"; then
        virsh net-destroy default || fail "libvirt's network default cannot be stopped"
    fi
    virsh net-autostart default --disable || fail "libvirt's network default would start with the host"
}

admit_service_user() {
    quietly usermod -aG libvirt,libvirt-qemu blockhost || fail 'the user blockhost cannot be put into the groups of libvirt'
}

# The directory is 0750 for the service user. QEMU's user has to pass through it, not to look into it; an entry of its own outlives a
# later chown and chmod.
admit_qemu() {
    quietly setfacl -m u:libvirt-qemu:x "$BASE" || fail "QEMU's user cannot be let through $BASE"
}

set_up_libvirt() {
    install_packages
    start_libvirt
    stop_default_network
    admit_service_user
    admit_qemu
}

check_kvm() {
    if [ ! -e /dev/kvm ]; then
        # Which of the two it is, the processor says.
        modprobe kvm_intel 2>/dev/null || modprobe kvm_amd 2>/dev/null || true
    fi
    if [ ! -e /dev/kvm ]; then
        say 'warning: there is no /dev/kvm: VMs will be emulated, which is slow; switch virtualisation on in the firmware, or nested virtualisation in the hypervisor below'
    elif ! (: <>/dev/kvm) 2>/dev/null; then
        say 'warning: /dev/kvm cannot be opened: VMs will be emulated, which is slow'
    else
        say 'KVM is there; whether a kernel boots under it is tried before the first VM is made'
    fi
}

step() {
    local mark=$STATE_DIR/.step-$1
    if [ -e "$mark" ]; then
        say "$1: done before"
        return 0
    fi
    # A command of its own, so that errexit holds in it.
    "$2"
    touch -- "$mark"
    say "$1: done"
}

[ "$(id -u)" -eq 0 ] || { echo 'first-boot.sh: must be run as root' >&2; exit 1; }
id blockhost >/dev/null 2>&1 || fail 'there is no user blockhost: install blockhost-common first'
[ -d "$BASE" ] || install -d -o blockhost -g blockhost -m 0750 "$BASE"
mkdir -p -- "$STATE_DIR"
step libvirt set_up_libvirt
step kvm-check check_kvm
