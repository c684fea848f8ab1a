"""The actions over the suite's real commands, on real domains without a guest in them."""

import json
import os
import pathlib
import subprocess
import uuid

import pytest

DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid>{metadata}
  <memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
  <devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices>
</domain>
"""
METADATA = """
<metadata><blockhost:vm xmlns:blockhost='urn:blockhost:vm:1'>
  <blockhost:name>{name}</blockhost:name><blockhost:creation-id>{uuid}</blockhost:creation-id>
  <blockhost:created-at>2026-11-20T10:00:00.000000+00:00</blockhost:created-at>
  <blockhost:expires-at>2099-11-20T10:00:00.000000+00:00</blockhost:expires-at>
  <blockhost:wallet-address>0xAB</blockhost:wallet-address><blockhost:username>admin</blockhost:username>
  <blockhost:network-mode>broker</blockhost:network-mode><blockhost:ipv4>{ipv4}</blockhost:ipv4>
  <blockhost:mac>52:54:00:00:00:01</blockhost:mac>
</blockhost:vm></metadata>
"""


def virsh(*words):
    done = subprocess.run(["virsh", "-q", "-c", "qemu:///system", *words], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture
def domains():
    """One of BlockHost's and one that is somebody else's; both are removed by the run's fixture too, by their disks."""
    directory = pathlib.Path(os.environ["BLOCKHOST_TEST_DIR"]) / "root-agent"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o711)
    database = pathlib.Path(os.environ["BLOCKHOST_STATE_DIR"]) / "vms.json"
    if not database.exists():
        database.write_text(json.dumps({"vms": {}, "next_vmid": 0, "allocated_ips": [], "allocated_ipv6": []}))
    names = []
    try:
        for kind in ("own", "foreign"):
            name, ident = f"{kind}-{uuid.uuid4().hex[:8]}", uuid.uuid4()
            # Where the pool does not look: a file is nobody's volume.
            disk = directory / f"{name}.raw"
            disk.touch()
            os.truncate(disk, 1 << 20)
            metadata = METADATA.format(name=name, uuid=ident, ipv4=os.environ["BLOCKHOST_TEST_GATEWAY"][:-1] + "77") if kind == "own" else ""
            description = directory / f"{name}.xml"
            description.write_text(DOMAIN.format(name=name, uuid=ident, metadata=metadata, disk=disk))
            assert virsh("define", str(description)) is not None
            names.append(name)
        yield names
    finally:
        for name in names:
            virsh("destroy", name)
            virsh("undefine", name)


def test_the_power_of_a_vm_and_its_removal(agent, real, domains):
    own, foreign = domains
    ask = lambda action, name: agent.ask(action, {"domain": name})  # noqa: E731
    answer = ask("virsh-start", own)
    assert answer["ok"], answer
    assert virsh("domstate", own) == "running"
    assert ask("virsh-start", own)["ok"], "one that runs is started"
    answer = ask("virsh-undefine", own)
    assert not answer["ok"] and "comes first" in answer["error"]
    assert virsh("domstate", own) == "running"
    assert ask("virsh-destroy", own)["ok"]
    assert virsh("domstate", own) == "shut off"
    assert ask("virsh-destroy", own)["ok"] and ask("virsh-shutdown", own)["ok"], "one that is off is stopped"
    assert "does not run" in ask("virsh-reboot", own)["error"]

    # Somebody else's, running: nothing is done to it.
    assert virsh("start", foreign) is not None
    for action in ("virsh-shutdown", "virsh-destroy", "virsh-reboot", "virsh-undefine", "virsh-start"):
        answer = ask(action, foreign)
        assert not answer["ok"], action
        assert "is not BlockHost's" in answer["error"] or "comes first" in answer["error"] or "does not run" in answer["error"], answer
        assert virsh("domstate", foreign) == "running", action
    virsh("destroy", foreign)
    assert not ask("virsh-start", foreign)["ok"] and not ask("virsh-undefine", foreign)["ok"]
    assert virsh("domstate", foreign) == "shut off"

    assert ask("virsh-undefine", own)["ok"]
    assert virsh("domstate", own) is None
    assert ask("virsh-undefine", own)["ok"], "removing what is gone is a success, as it is for the suite"
    assert "no VM called" in ask("virsh-start", own)["error"]
