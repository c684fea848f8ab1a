"""The checks of `make test-host` on what becomes of the package: its hook runs again, the earlier package is taken over with its VMs, ours
is installed again, removed and purged. Imported by `checks`, whose functions it uses, at the place where these are to run.
"""

import datetime
import json
import os
import pathlib

from __main__ import CONFIG, MONITOR, POOL, STATE, check, engine, ownership, out, qemu_reaches_its_disks_through_an_acl, run, settled, status, unit, unless_slow, virsh
from install_checks import MARKS, ROOT_AGENT, first_boot, install, let_through, shown, timer

EARLIER = STATE / "vm-db.json"
TARGET = pathlib.Path("/etc/systemd/system/timers.target.wants/blockhost-gc.timer")


def instant(days):
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)).isoformat(timespec="microseconds")


def record(vm, address, **more):
    return {
        "vm_name": vm,
        "vmid": 0,
        "ip_address": address,
        "ipv6_address": "",
        "expires_at": instant(20),
        "owner": "somebody",
        "status": "active",
        "created_at": "2025-11-01T10:00:00.000000+00:00",
        "purpose": "",
        "wallet_address": "0x00000000000000000000000000000000000000aa",
        "username": "admin",
        **more,
    }


def earlier_vm(vm):
    """As the earlier provisioner made them: no metadata, the seed in a directory of its own, a base that was never ours."""
    base = STATE / "templates" / "earlier-base.qcow2"
    if not base.exists():
        out("qemu-img", "create", "-q", "-f", "qcow2", str(base), "1G")
    out("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"backing_file={base},backing_fmt=qcow2", str(POOL / f"{vm}.qcow2"))
    seed = STATE / "cloud-init" / vm / "cidata.iso"
    seed.parent.mkdir(parents=True)
    seed.write_bytes(bytes(65536))
    disks = f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{POOL}/{vm}.qcow2'/><target dev='vda' bus='virtio'/></disk>"
    disks += f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{seed}'/><target dev='sda' bus='sata'/><readonly/></disk>"
    definition = pathlib.Path(f"/run/{vm}.xml")
    definition.write_text(
        f"<domain type='qemu'><name>{vm}</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<features><acpi/></features><devices>{disks}</devices></domain>"
    )
    virsh("define", str(definition)).success()


def everything():
    """All files of the host's VMs and settings, by size: a running guest may write to its disk, nobody may take it away."""
    found = {path: path.stat().st_size if path.suffix != ".qcow2" else None for top in (STATE, CONFIG) for path in top.rglob("*") if path.is_file()}
    return {path: size for path, size in found.items() if STATE / "metrics" not in path.parents}


def set_database(file):
    text = (CONFIG / "db.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("db_file:")]
    (CONFIG / "db.yaml").write_text("\n".join([f"db_file: {file}", *lines, ""]))


def edit(change):
    vms = json.loads(EARLIER.read_text())
    change(vms["vms"])
    EARLIER.write_text(json.dumps(vms, indent=2))


@check(qemu_reaches_its_disks_through_an_acl, second=True)
def the_hook_can_be_run_again():
    marks = [os.stat(mark).st_mtime_ns for mark in MARKS]
    again = first_boot().success()
    assert "libvirt: done before" in again.stderr and "kvm-check: done before" in again.stderr, again
    assert [os.stat(mark).st_mtime_ns for mark in MARKS] == marks
    # As after a run that was cut off before the end: everything is looked at once more, and put right.
    for mark in MARKS:
        mark.unlink()
    out("setfacl", "-b", str(STATE))
    virsh("net-autostart", "default").success()
    # An emulated processor may offer virtualisation; the modules are loaded, so that nothing brings the device back.
    device, aside = pathlib.Path("/dev/kvm"), pathlib.Path("/dev/kvm.aside")
    had = device.exists()
    if had:
        device.rename(aside)
    try:
        warned = first_boot().success()
    finally:
        if had:
            aside.rename(device)
    assert "warning: there is no /dev/kvm" in warned.stderr, warned
    assert let_through() and virsh("net-list", "--all").success().stdout.split()[:3] == ["default", "inactive", "no"]


@check(qemu_reaches_its_disks_through_an_acl, second=True)
def removal_and_purge_leave_vms_and_data():
    earlier_vm("old1")
    EARLIER.write_text(json.dumps({"vms": {"old1": record("old1", "10.213.0.240")}, "next_vmid": 7, "allocated_ips": ["10.213.0.240"]}, indent=2))
    out("chown", "blockhost:blockhost", str(EARLIER))
    virsh("start", "old1").success()
    # What it holds open must not be touched either.
    before = everything()
    assert EARLIER in before and POOL / "old1.qcow2" in before
    for act in ("--remove", "--purge"):
        out("dpkg", act, "blockhost-provisioner-libvirt")
        assert everything() == before, act
        assert virsh("domstate", "old1").success().stdout.strip() == "running", act
        assert shown("blockhost-gc.timer", "ActiveState") == "inactive", act
    assert not pathlib.Path("/usr/share/blockhost/provisioner.json").exists()
    assert not os.path.lexists(TARGET), "the timer's link is left"


@check(removal_and_purge_leave_vms_and_data, second=True)
def the_earlier_package_is_taken_over():
    install("earlier.deb")
    assert timer() == "enabled active", timer()
    set_database(EARLIER)
    before = everything()
    agent = shown(ROOT_AGENT.name, "InvocationID")
    install("ours.deb")
    assert everything() == before
    assert virsh("domstate", "old1").success().stdout.strip() == "running"
    # Its prerm has disabled the timer.
    assert timer() == "enabled active", timer()
    assert shown("blockhost-gc.service", "User") == "blockhost", "the earlier unit is in force"
    assert shown(ROOT_AGENT.name, "InvocationID") not in ("", agent)
    assert not list(pathlib.Path("/usr/lib/python3/dist-packages/blockhost").rglob("earlier.py"))


@check(the_earlier_package_is_taken_over, second=True)
def earlier_vms_are_managed_like_our_own():
    rows = json.loads(unit(MONITOR, ["blockhost-vm-list", "--format", "json"]).finish().success().stdout)
    assert rows == [{"name": "old1", "status": "active", "ip": "10.213.0.240", "created": "2025-11-01"}], rows
    known = {"state": "running", "cpu_count": 1, "memory_total_mb": 64}
    with unless_slow():
        settled("old1", "its figures", lambda found: {key: found[key] for key in known} == known)
        settled("old1", "the size of its disk", lambda found: found["disk_total_mb"] == 1024)
    limited = engine("blockhost-vm-throttle", "old1", "--cpu-quota", "50").success()
    assert "50" in limited.stdout and "global_quota" in virsh("dumpxml", "--inactive", "old1").success().stdout, limited
    engine("blockhost-vm-kill", "old1").success()
    assert status("old1") == "suspended\n"
    engine("blockhost-vm-start", "old1").success()
    assert status("old1") == "active\n"
    assert "global_quota" in virsh("dumpxml", "old1").success().stdout
    assert ownership(EARLIER).startswith("blockhost:blockhost"), ownership(EARLIER)


@check(the_earlier_package_is_taken_over, second=True)
def a_timer_that_was_disabled_stays_so():
    out("systemctl", "disable", "--now", "blockhost-gc.timer")
    install("ours.deb")
    assert timer() == "disabled inactive", timer()
    out("systemctl", "enable", "--now", "blockhost-gc.timer")
    install("ours.deb")
    assert timer() == "enabled active", timer()


@check(earlier_vms_are_managed_like_our_own, second=True)
def expired_vms_are_collected_by_the_unit():
    """One is suspended, one, whose grace is over, is destroyed, after the network plugins have had their turn."""
    hook = pathlib.Path("/usr/bin/blockhost-network-hook")
    hook.write_text(f"#!/bin/sh\necho \"$@\" >>{STATE}/network-hook.log\n")
    hook.chmod(0o755)
    earlier_vm("old2")
    engine("blockhost-vm-kill", "old1").success()

    def expire(vms):
        vms["old1"]["expires_at"] = instant(-1)
        vms["old2"] = record("old2", "10.213.0.241", status="suspended", expires_at=instant(-90), suspended_at=instant(-60))

    edit(expire)
    run("systemctl", "start", "blockhost-gc.service", timeout=400)
    said = out("journalctl", "-u", "blockhost-gc.service", "-o", "cat", "--no-pager")
    assert shown("blockhost-gc.service", "Result") == "success", said
    vms = json.loads(EARLIER.read_text())["vms"]
    assert {vm: vms[vm]["status"] for vm in ("old1", "old2")} == {"old1": "suspended", "old2": "destroyed"}, f"{vms}\n{said}"
    assert (STATE / "network-hook.log").read_text() == "cleanup old2\n", said
    assert not (POOL / "old2.qcow2").exists() and (POOL / "old1.qcow2").exists()
    assert "old2" not in virsh("list", "--all", "--name").success().stdout.split()
    assert ownership(EARLIER).startswith("blockhost:blockhost"), ownership(EARLIER)


@check(the_earlier_package_is_taken_over, second=True)
def earlier_vms_are_destroyed_like_our_own():
    engine("blockhost-vm-destroy", "old1").success()
    assert not (POOL / "old1.qcow2").exists()
    assert (STATE / "templates" / "earlier-base.qcow2").exists(), "the base is not the VM's"
    assert json.loads(EARLIER.read_text())["vms"]["old1"]["status"] == "destroyed"
    set_database(STATE / "vms.json")
