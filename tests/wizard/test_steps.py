"""The finalization steps on a real libvirtd: twice, with nothing to go by, with texts, after being killed half-way."""

import grp
import json
import os
import pathlib
import pwd
import re
import stat
import subprocess
import time

import pytest
import yaml

# What an unattended installation hands over: the page's fields, as texts.
CI = {
    "storage_pool": "blockhost",
    "storage_path": "/var/lib/blockhost/vms",
    "ip_network": "192.168.122.0/24",
    "ip_start": "2",
    "ip_end": "254",
    "gateway": "192.168.122.1",
    "gc_grace_days": 7,
}


def ci(host):
    """The same, for this host."""
    return {**CI, "storage_pool": host.pool, "storage_path": str(host.state / "vms"), "ip_network": host.network, "gateway": host.gateway}


def virsh(*words):
    done = subprocess.run(["virsh", "-q", "-c", "qemu:///system", *words], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def details(what, name):
    return dict(re.findall(r"^(\w[\w ]*):\s+(\S+)$", virsh(what, name), re.M))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def as_qemu(*words):
    user = pwd.getpwnam("libvirt-qemu")
    return subprocess.run(["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", *words], capture_output=True).returncode


def storage_is_there(host):
    assert details("pool-info", host.pool)["State"] == "running"
    assert details("pool-info", host.pool)["Autostart"] == "yes"
    assert mode(host.state / "vms") == 0o711
    assert mode(host.state) & 0o007 == 0, "others must not get in"
    for name in ("templates", "template-packages"):
        assert mode(host.state / name) == 0o755
    assert (host.state / "metrics").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    # A pool that works: libvirtd makes a volume in it, and QEMU's user gets to it, but cannot look around.
    virsh("vol-create-as", host.pool, "probe", "4096", "--format", "raw")
    os.chown(host.state / "vms/probe", pwd.getpwnam("libvirt-qemu").pw_uid, -1)
    assert as_qemu("cat", str(host.state / "vms/probe")) == 0
    assert as_qemu("ls", str(host.state)) != 0
    virsh("vol-delete", "probe", "--pool", host.pool)


# storage


def test_storage_is_prepared_and_prepared_again(host):
    assert as_qemu("stat", str(host.state / "x")) != 0
    for values in (ci(host), ci(host)):
        assert host.step("storage", {"provisioner": values})[0] == [True, None]
        storage_is_there(host)
    # A volume survives another run, and QEMU's way in survives what an upgrade of the base package does.
    virsh("vol-create-as", host.pool, "kept", "4096")
    os.chmod(host.state, 0o750)
    assert as_qemu("stat", str(host.state / "vms")) == 0
    virsh("pool-destroy", host.pool)
    assert host.step("storage", {"provisioner": ci(host)})[0] == [True, None]
    assert "kept" in virsh("vol-list", host.pool)


def test_storage_goes_on_where_a_crash_left_it(host, program):
    real = {name: subprocess.run(["which", name], capture_output=True, text=True).stdout.strip() for name in ("virsh", "setfacl")}
    bin_directory = pathlib.Path(program.directory)
    count = bin_directory / "count"
    for name, path in real.items():
        # Does what it was called for, then takes the step down: its process group is the shim's own.
        program(name, f'{path.replace(str(bin_directory), "")} "$@" || exit; echo x >>{count}; [ "$(wc -l <{count})" != "$CRASH_AT" ] || kill -9 $PPID')
    survived = []
    for number in range(1, 20):
        count.unlink(missing_ok=True)
        crashed = host.step("storage", {"provisioner": ci(host)}, shims=bin_directory, CRASH_AT=str(number)) is None
        if not crashed:
            break
        survived.append(number)
        assert host.step("storage", {"provisioner": ci(host)})[0] == [True, None]
        storage_is_there(host)
        virsh("pool-destroy", host.pool)
        virsh("pool-undefine", host.pool)
        (host.state / "vms").rmdir()
    assert len(survived) >= 6, survived


def test_a_pool_of_that_name_elsewhere_is_left_alone(host):
    other = host.directory / "other"
    other.mkdir()
    virsh("pool-define-as", host.pool, "dir", "--target", str(other))
    (ok, message), _ = host.step("storage", {"provisioner": ci(host)})
    assert not ok and str(other) in message and "choose another name" in message
    assert details("pool-info", host.pool)["State"] == "inactive"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"storage_path": "/etc"}, "storage_path '/etc' must be a directory for this alone"),
        ({"storage_path": ["/a/b/c"]}, "must be a text"),
        ({"storage_pool": "a;b"}, "storage_pool 'a;b' must have"),
    ],
)
def test_values_that_cannot_be_are_refused_with_their_names(here, values, words):
    from blockhost.provisioner_libvirt import steps

    ok, message = steps.storage({"provisioner": values})
    assert not ok and words in message


def test_libvirt_that_does_not_answer_is_no_missing_pool(here, program):
    from blockhost.provisioner_libvirt import steps

    calls = program("virsh", "echo 'error: failed to connect to the hypervisor' >&2; exit 1")
    for step in (steps.storage, steps.network):
        ok, message = step({"provisioner": ci(here)})
        assert not ok and message == "virsh: error: failed to connect to the hypervisor"
    assert "define" not in calls.read_text()


def test_what_is_not_installed_is_named(here, monkeypatch):
    from blockhost.provisioner_libvirt import steps

    monkeypatch.setenv("PATH", "/nonexistent")
    assert steps.storage({"provisioner": ci(here)}) == (False, "setfacl is not installed")
    assert steps.network({}) == (False, "virsh is not installed")
    assert steps.template({}) == (False, "blockhost-build-template is not installed")
    monkeypatch.setattr(steps, "USER", "no-such-user")
    assert "base package" in steps.storage({})[1]


# network


@pytest.fixture
def libvirt_network(host):
    """A network like libvirt's default one, running and started at boot."""
    name, bridge = f"{host.bridge}-net", f"{host.bridge}n"
    description = host.directory / "network.xml"
    description.write_text(f"<network><name>{name}</name><bridge name='{bridge}'/></network>")
    virsh("net-define", str(description))
    try:
        virsh("net-start", name)
        virsh("net-autostart", name)
        yield name
    finally:
        for words in (("net-destroy", name), ("net-undefine", name)):
            subprocess.run(["virsh", "-q", "-c", "qemu:///system", *words], capture_output=True)


def test_the_bridge_is_found_and_libvirts_network_put_to_rest(host, libvirt_network):
    for _ in range(2):
        result, config = host.step("network", {}, TEST_LIBVIRT_NETWORK=libvirt_network)
        assert result == [True, None] and config["provisioner"]["bridge"] == host.bridge
        assert details("net-info", libvirt_network) | {"Active": "no", "Autostart": "no"} == details("net-info", libvirt_network)
    # Stopped but started at boot, as a crash between the two leaves it.
    virsh("net-autostart", libvirt_network)
    assert host.step("network", {"provisioner": {"bridge": host.bridge}}, TEST_LIBVIRT_NETWORK=libvirt_network)[0] == [True, None]
    assert details("net-info", libvirt_network)["Autostart"] == "no"


def test_the_network_step_goes_on_where_a_crash_left_it(host, libvirt_network, program):
    real = subprocess.run(["which", "virsh"], capture_output=True, text=True).stdout.strip()
    count = program.directory / "count"
    program("virsh", f'{real} "$@" || exit; echo x >>{count}; [ "$(wc -l <{count})" != "$CRASH_AT" ] || kill -9 $PPID')
    for number in (3, 4):
        count.unlink(missing_ok=True)
        virsh("net-autostart", libvirt_network)
        if number == 4:
            virsh("net-start", libvirt_network)
        assert host.step("network", {}, shims=program.directory, TEST_LIBVIRT_NETWORK=libvirt_network, CRASH_AT=str(number)) is None
        result, config = host.step("network", {}, TEST_LIBVIRT_NETWORK=libvirt_network)
        assert result == [True, None] and config["provisioner"]["bridge"] == host.bridge
        assert details("net-info", libvirt_network)["Autostart"] == "no"
        assert details("net-info", libvirt_network)["Active"] == "no"


def test_no_bridge_is_an_error_that_says_what_to_do(here, tmp_path, monkeypatch):
    from blockhost.provisioner_libvirt import bridge, steps

    monkeypatch.setattr(steps, "LIBVIRT_NETWORK", "no-such-network")
    (here.run / "bridge").write_text("gone0\n")
    ok, message = steps.network({})
    assert not ok and "'gone0', which is not a bridge" in message
    (here.run / "bridge").unlink()
    monkeypatch.setattr(bridge, "SYS_CLASS_NET", tmp_path)
    for config in ({}, {"provisioner": None}, {"provisioner": "x"}, None):
        ok, message = steps.network(config)
        assert not ok and "no bridge with an IPv4 address" in message


# db_config

KEYS = ["db_file", "default_expiry_days", "gc_grace_days", "bridge", "storage_pool", "storage_path", "ip_pool", "ipv6_pool"]


def test_db_yaml_has_every_key_whatever_is_handed_over(host):
    # A page that was skipped, in a process that does not know what the network step found.
    assert host.step("db_config", {})[0] == [True, None]
    written = host.database_settings()
    assert sorted(written) == sorted(KEYS)
    assert written["bridge"] == host.bridge and written["storage_pool"] == "blockhost"
    assert written["db_file"] == str(host.state / "vms.json") and written["storage_path"] == str(host.state / "vms")
    assert written["ip_pool"] == {"network": host.network, "start": 200, "end": 250, "gateway": host.gateway}
    assert written["ipv6_pool"] == {"start": 2, "end": 254}
    # An unattended installation's texts, twice.
    for _ in range(2):
        assert host.step("db_config", {"provisioner": ci(host)})[0] == [True, None]
        written = host.database_settings()
        assert written["ip_pool"] == {"network": host.network, "start": 2, "end": 254, "gateway": host.gateway}
        assert written["gc_grace_days"] == 7 and written["storage_pool"] == host.pool
    path = host.config / "db.yaml"
    assert (mode(path), path.stat().st_uid, path.stat().st_gid) == (0o640, 0, grp.getgrnam("nogroup").gr_gid)
    assert [entry.name for entry in host.config.iterdir()] == ["db.yaml"]


def test_a_network_that_is_not_the_bridges_is_written_as_it_was_asked_for(host):
    assert host.step("db_config", {"provisioner": {**CI, "gc_grace_days": "0"}})[0] == [True, None]
    written = host.database_settings()
    assert written["ip_pool"]["network"] == "192.168.122.0/24" and written["gc_grace_days"] == 0
    assert host.step("db_config", {"provisioner": {"ip_network": "192.168.122.64/26"}})[0] == [True, None]
    pool = host.database_settings()["ip_pool"]
    assert pool == {"network": "192.168.122.64/26", "start": 66, "end": 126, "gateway": "192.168.122.65"}


FOREIGN = """# ours and theirs
fields: {vm_name: name}
"yes": [1, two]
grace_days: 3
terraform_dir: /x
ip_pool: {network: 10.0.0.0/8, theirs: 1}
ipv6_pool:
  prefix: "2001:db8::/120"
libvirt:
  domain_type: qemu
default_expiry_days: 90
"""


def test_what_others_wrote_stays(host):
    path = host.config / "db.yaml"
    path.write_text(FOREIGN)
    path.chmod(0o666)
    assert host.step("db_config", {"provisioner": ci(host)})[0] == [True, None]
    written, before = host.database_settings(), yaml.safe_load(FOREIGN)
    for key in ("fields", "yes", "grace_days", "terraform_dir", "libvirt", "default_expiry_days"):
        assert written[key] == before[key]
    assert written["ip_pool"]["theirs"] == 1 and written["ip_pool"]["network"] == host.network
    assert written["ipv6_pool"] == {"start": 2, "end": 254, "prefix": "2001:db8::/120"}
    assert mode(path) == 0o640


def test_a_database_with_vms_in_another_file_stays_the_database(host):
    other = host.state / "vm-db.json"
    path = host.config / "db.yaml"
    path.write_text(f"db_file: {other}\n")
    host.step("db_config", {})
    assert host.database_settings()["db_file"] == str(host.state / "vms.json")
    path.write_text(f"db_file: {other}\n")
    other.write_text(json.dumps({"vms": {"web1": {}}}))
    host.step("db_config", {})
    assert host.database_settings()["db_file"] == str(other)


@pytest.mark.parametrize("crash", [["tempfile.mkstemp", 1], ["os.fchown", 1], ["os.fchmod", 1], ["os.fsync", 1], ["os.replace", 1], ["os.fsync", 2]])
def test_a_crash_leaves_the_old_file_or_the_new_one(host, crash):
    path = host.config / "db.yaml"
    path.write_text(FOREIGN)
    assert host.step("db_config", {"provisioner": ci(host)}, crash=crash) is None
    if crash == ["os.fsync", 2]:
        assert host.database_settings()["bridge"] == host.bridge
    else:
        assert path.read_text() == FOREIGN
    for left in host.config.iterdir():
        assert left == path or mode(left) & 0o007 == 0
    assert host.step("db_config", {"provisioner": ci(host)})[0] == [True, None]
    assert host.database_settings()["terraform_dir"] == "/x"


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "is not valid YAML and is left alone"), ("- a\n", "is no mapping and is left alone"), ("\xff", "")]
)
def test_a_file_that_cannot_be_read_is_left_alone(host, text, words):
    path = host.config / "db.yaml"
    path.write_bytes(text.encode("latin-1"))
    (ok, message), _ = host.step("db_config", {})
    assert not ok and words in message and str(path) in message
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ip_start": "x"}, "ip_start 'x' must be a number"),
        ({"ip_start": "9", "ip_end": "8"}, "ip_start 9 is beyond ip_end 8"),
        ({"gateway": "203.0.113.1"}, "gateway '203.0.113.1' is outside"),
        ({"ip_network": "10.0.0.0/33"}, "ip_network '10.0.0.0/33' must be a network"),
        ({"gc_grace_days": True}, "gc_grace_days 'True' must be"),
        ({"bridge": "../x"}, "bridge '../x' must be the name"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_names(here, values, words):
    from blockhost.provisioner_libvirt import steps

    ok, message = steps.db_config({"provisioner": values})
    assert not ok and words in message
    assert not (here.config / "db.yaml").exists()


def test_a_host_without_yaml_or_without_the_group_says_so(here, monkeypatch):
    import sys

    from blockhost.provisioner_libvirt import steps

    monkeypatch.setattr(steps, "GROUP", "no-such-group")
    assert "there is no group no-such-group" in steps.db_config({})[1]
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "python3-yaml is not installed" in steps.db_config({})[1]


def test_the_suite_reads_what_was_written(host):
    """The commands' own reading of db.yaml, by one that says what it finds."""
    assert host.step("db_config", {"provisioner": ci(host)})[0] == [True, None]
    binary = pathlib.Path(os.environ["BLOCKHOST_TEST_BIN"]) / "blockhost-vm-list"
    (host.state / "vms.json").write_text('{"vms": {}, "next_vmid": 0, "allocated_ips": []}')
    done = subprocess.run([binary, "--format", "json"], env={**os.environ, **host.environment()}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


# template


def test_the_template_step_runs_the_build_and_tells_its_last_words(here, program):
    from blockhost.provisioner_libvirt import steps

    calls = program("blockhost-build-template", "echo fine >&2")
    assert steps.template({}) == (True, None)
    assert steps.template(None) == (True, None)
    assert calls.read_text() == "\n\n", "the build is called without arguments"
    program("blockhost-build-template", "printf 'x%.0s' {1..2000} >&2; echo 'cannot build: no package' >&2; exit 1")
    ok, message = steps.template({"provisioner": ci(here)})
    assert not ok and len(message) == 500 and message.endswith("xcannot build: no package")
    program("blockhost-build-template", "exit 3")
    assert steps.template({}) == (False, "blockhost-build-template failed with exit code 3")


def test_a_build_that_does_not_end_is_ended_with_all_it_started(here, program, tmp_path, monkeypatch):
    from blockhost.provisioner_libvirt import steps

    assert steps.TEMPLATE_SECONDS == 1800
    monkeypatch.setattr(steps, "TEMPLATE_SECONDS", 3)
    pid = tmp_path / "pid"
    program("blockhost-build-template", f"echo downloading >&2; sleep 600 & echo $! >{pid}; wait")
    ok, message = steps.template({})
    assert not ok and "did not end within 3 s: downloading" in message
    status = pathlib.Path(f"/proc/{pid.read_text().strip()}/stat")

    def ended():
        """A zombie nobody has waited for yet counts as ended."""
        try:
            return status.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    # A signal is sent at once, and the process ends when it next runs.
    end = time.monotonic() + 30
    while not ended():
        assert time.monotonic() < end
        time.sleep(0.05)
