"""The first checks of `make test-host`: the package comes to a host without libvirt, and its first-boot hook prepares that host.

Imported by `checks`, whose functions it uses, at the place where these are to run.
"""

import grp
import pathlib
import shutil
import time

import __main__ as host
from __main__ import PAYLOAD, STATE, check, out, run, systemd_is_up, virsh

HOOK = "/usr/share/blockhost/provisioner-hooks/first-boot.sh"
LOG = pathlib.Path("/var/log/blockhost-first-boot.log")
MARKS = [STATE / ".step-libvirt", STATE / ".step-kvm-check"]
SOURCES = pathlib.Path("/etc/apt/sources.list")
ROOT_AGENT = pathlib.Path("/etc/systemd/system/blockhost-root-agent.service")


def install(*names):
    """As the installer does. apt must get along without asking, and without taking anything away."""
    debs = [str(PAYLOAD / "debs" / name) for name in names]
    if run("dpkg", "-i", *debs).code != 0:
        run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--fix-broken", "--yes", "install").success()
    version = run("dpkg-deb", "--field", debs[-1], "Version").success().stdout.strip()
    installed = run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "blockhost-provisioner-libvirt").stdout
    assert installed == f"installed {version}", installed


def shown(unit, name):
    return run("systemctl", "show", "--property", name, "--value", unit).success().stdout.strip()


def timer():
    return f"{shown('blockhost-gc.timer', 'UnitFileState')} {shown('blockhost-gc.timer', 'ActiveState')}"


def first_boot(state=STATE):
    return run("env", f"STATE_DIR={state}", f"LOG_FILE={LOG}", HOOK, timeout=900)


@check(systemd_is_up)
def the_package_comes_before_the_hypervisor():
    assert not shutil.which("virsh") and not shutil.which("qemu-system-x86_64")
    ROOT_AGENT.write_text("[Service]\nExecStart=/bin/sleep infinity\n")
    out("systemctl", "daemon-reload")
    out("apt-get", "update")
    out("systemctl", "start", ROOT_AGENT.name)
    before = shown(ROOT_AGENT.name, "InvocationID")
    install("blockhost-common.deb", "ours.deb")
    assert not shutil.which("virsh"), "the hypervisor is the hook's to bring"
    assert timer() == "enabled active", timer()
    assert shown("blockhost-gc.service", "ActiveState") == "inactive", "a collection was started"
    assert shown(ROOT_AGENT.name, "InvocationID") not in ("", before), "the root agent has not read the new actions"
    assert run("blockhost-provisioner-detect").code == 1, "a host without libvirt passes for one that can run VMs"


@check(the_package_comes_before_the_hypervisor)
def the_timer_is_daily_and_catches_up():
    assert "*-*-* 02:00:00" in shown("blockhost-gc.timer", "TimersCalendar")
    assert shown("blockhost-gc.timer", "RandomizedDelayUSec") == "30min"
    assert shown("blockhost-gc.timer", "Persistent") == "yes"
    assert shown("blockhost-gc.service", "TimeoutStartUSec") == "4h"
    host.note(out("systemd-analyze", "security", "--no-pager", "blockhost-gc.service").splitlines()[-1])


@check(the_package_comes_before_the_hypervisor)
def the_hook_fails_where_packages_cannot_be_had():
    aside = SOURCES.with_suffix(".aside")
    lists = pathlib.Path("/var/lib/apt/lists")
    SOURCES.rename(aside)
    lists.rename("/var/lib/apt/lists.aside")
    (lists / "partial").mkdir(parents=True)
    try:
        failed = first_boot()
    finally:
        aside.rename(SOURCES)
        shutil.rmtree(lists)
        pathlib.Path("/var/lib/apt/lists.aside").rename(lists)
    assert failed.code == 1 and "the packages of the hypervisor cannot be installed" in failed.reason, failed
    assert not any(mark.exists() for mark in MARKS)
    assert "Unable to locate package" in LOG.read_text(), LOG.read_text()


def let_through():
    return "user:libvirt-qemu:--x" in out("getfacl", "--absolute-names", str(STATE)).splitlines()


@check(the_hook_fails_where_packages_cannot_be_had)
def the_hook_prepares_the_host():
    """With dnsmasq there libvirt puts up its own network, which the hook has to take down."""
    out("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "install", "dnsmasq-base")
    begin = time.monotonic()
    done = first_boot().success()
    host.note(f"the first-boot hook took {time.monotonic() - begin:.0f} s\n{done.stderr}")
    assert all(mark.exists() for mark in MARKS), done
    for unit in ("libvirtd.service", "virtlogd.socket"):
        assert shown(unit, "UnitFileState") == "enabled", unit
    assert shown("libvirtd.service", "ActiveState") == "active"
    for group in ("libvirt", "libvirt-qemu"):
        assert "blockhost" in grp.getgrnam(group).gr_mem, group
    networks = virsh("net-list", "--all").success().stdout.split()
    assert networks[:3] == ["default", "inactive", "no"], networks
    assert not pathlib.Path("/sys/class/net/virbr0").exists()
    assert shutil.which("jq") and shutil.which("qemu-img") and let_through()
    assert "Setting up libvirt-daemon-system" in LOG.read_text()
