"""The finalization steps. Each makes sure of something, so it can be run again at any time, in any process, after any crash; each
takes whatever the installer hands over, and answers (True, None) or (False, why)."""

import functools
import grp
import ipaddress
import json
import os
import pathlib
import pwd
import stat
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from . import bridge as bridges
from . import fields
from .child import Failed, must, run, tail
from .places import GROUP, QEMU_USER, USER, places

# libvirt's own network, which Debian defines. Its bridge has an address and would pass for the VMs'.
LIBVIRT_NETWORK = "default"
TEMPLATE_SECONDS = 1800


def step(function):
    """No exception leaves a step: the installer would show its text without what it was about."""

    @functools.wraps(function)
    def wrapped(config):
        try:
            function(config if isinstance(config, dict) else {})
        except Failed as failed:
            return False, str(failed)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return False, f"{function.__name__}: {where}{error.strerror or error}"
        except Exception as error:  # noqa: BLE001
            return False, f"{function.__name__}: {type(error).__name__}: {error}"
        return True, None

    return wrapped


def settings(config):
    """The dict of the page's values inside `config`, made if it is not there."""
    values = config.get("provisioner")
    if not isinstance(values, dict):
        values = config["provisioner"] = {}
    return values


def setting(values, name, parse, default, *context):
    """One value of the page, or its default when it was not given."""
    given = values.get(name)
    if given is None or given == "":
        return default
    try:
        return parse(given, *context)
    except fields.Invalid as invalid:
        raise Failed(f"{name} {str(given)[:80]!r} {invalid}") from None


def virsh(*words, timeout=60):
    return must("virsh", "-q", "-c", places().libvirt, *words, timeout=timeout)


def listed(*words):
    """The names that a list of virsh has. That the list cannot be had is an error, and no "there is none"."""
    return virsh(*words, "--name").split()


# storage


@step
def storage(config):
    values = settings(config)
    here = places()
    pool = setting(values, "storage_pool", fields.storage_pool, "blockhost")
    target = pathlib.Path(setting(values, "storage_path", fields.storage_path, str(here.vms)))
    own = _ids(USER, GROUP)
    _directory(here.state, 0o750, own, keep=True)
    _directory(here.state / "templates", 0o755)
    _directory(here.state / "template-packages", 0o755)
    _directory(here.state / "metrics", 0o750, own)
    for parent in reversed(target.parents):
        _directory(parent, 0o755, keep=True)
    # libvirtd makes the images in it, root's and 0600; QEMU and the commands only pass through.
    _directory(target, 0o711)
    _let_qemu_pass(here.state)
    for parent in target.parents:
        # The base directory has its entry; what everybody may pass through needs none.
        if parent != here.state and not parent.stat().st_mode & stat.S_IXOTH:
            _let_qemu_pass(parent)
    _pool(pool, target)
    # Building it can change the mode of a directory that exists.
    _directory(target, 0o711)


def _ids(user, group):
    try:
        return pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
    except KeyError:
        raise Failed(f"there is no user {user}: BlockHost's base package makes it") from None


def _directory(path, mode, owner=None, keep=False):
    """Makes sure of a directory; with `keep`, one that exists stays as it is."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir():
            raise Failed(f"{path} exists and is no directory") from None
        if keep:
            return
    os.chmod(path, mode)
    if owner:
        os.chown(path, *owner)


def _let_qemu_pass(path):
    try:
        pwd.getpwnam(QEMU_USER)
    except KeyError:
        raise Failed(f"there is no user {QEMU_USER}: the hypervisor is not installed") from None
    # An entry of its own survives what resets owner, group and mode of the directory.
    must("setfacl", "-m", f"u:{QEMU_USER}:x", str(path))


def _pool(name, target):
    if name not in listed("pool-list", "--all"):
        virsh("pool-define-as", name, "dir", "--target", str(target))
    description = ElementTree.fromstring(virsh("pool-dumpxml", "--inactive", name))
    path = description.findtext("./target/path")
    if description.get("type") != "dir" or path != str(target):
        raise Failed(
            f"storage pool {name!r} exists already, as a {description.get('type')!r} pool at {path}, not at {target}: "
            "choose another name, or that path"
        )
    if name not in listed("pool-list"):
        virsh("pool-build", name)
        # Somebody, such as a second installer, may have been faster.
        code, _, err = run("virsh", "-q", "-c", places().libvirt, "pool-start", name)
        if code != 0 and name not in listed("pool-list"):
            raise Failed(f"storage pool {name!r} does not start: {tail(err)}")
    virsh("pool-autostart", name)


# network


@step
def network(config):
    values = settings(config)
    _silence(LIBVIRT_NETWORK)
    values["bridge"] = _bridge(values).name


def _silence(name):
    if name not in listed("net-list", "--all"):
        return
    if name in listed("net-list"):
        code, _, err = run("virsh", "-q", "-c", places().libvirt, "net-destroy", name)
        if code != 0 and name in listed("net-list"):
            raise Failed(f"libvirt's network {name!r} does not stop: {tail(err)}")
    virsh("net-autostart", name, "--disable")


def _bridge(values):
    """The VMs' bridge: the marked one, the one chosen on the page, else the one that fits."""
    found = bridges.bridges()
    marker = bridges.marked(places().run)
    if marker is not None and marker not in found:
        raise Failed(f"{places().run / 'bridge'} names {marker!r}, which is not a bridge of this host")
    chosen = setting(values, "bridge", fields.bridge_name, None)
    bridge = found.get(marker or chosen) or bridges.choose(found, None)
    if bridge is None:
        raise Failed(f"this host has no bridge with an IPv4 address for the VMs: make one, and write its name to {places().run / 'bridge'}")
    if not bridge.addresses:
        raise Failed(f"bridge {bridge.name} has no IPv4 address")
    return bridge


# db_config


@step
def db_config(config):
    values = settings(config)
    here = places()
    bridge = _bridge(values)
    pool = _ip_pool(values, bridge)
    try:
        import yaml
    except ImportError:
        raise Failed(f"cannot write {here.db_yaml}: python3-yaml is not installed") from None
    try:
        group = grp.getgrnam(GROUP).gr_gid
    except KeyError:
        raise Failed(f"cannot write {here.db_yaml}: there is no group {GROUP}; BlockHost's base package makes it") from None
    document = _read(here.db_yaml, yaml)
    document.update(
        db_file=_database(document, here),
        gc_grace_days=setting(values, "gc_grace_days", fields.gc_grace_days, document.get("gc_grace_days", 7)),
        bridge=bridge.name,
        storage_pool=setting(values, "storage_pool", fields.storage_pool, "blockhost"),
        storage_path=setting(values, "storage_path", fields.storage_path, str(here.vms)),
        ip_pool={**_mapping(document, "ip_pool"), **pool},
        ipv6_pool={"start": 2, "end": 254, **_mapping(document, "ipv6_pool")},
    )
    document.setdefault("default_expiry_days", 30)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=False)
    _directory(here.config, 0o750, (0, group), keep=True)
    _write(here.db_yaml, "# Written by BlockHost's installer. The provisioner's own settings go under `libvirt:`.\n" + text, group)


def _ip_pool(values, bridge):
    offered = bridges.offer(bridge) or {}
    given = setting(values, "ip_network", fields.network, None)
    within = given or (fields.network(offered["ip_network"]) if offered else None)
    if within is None:
        raise Failed(f"bridge {bridge.name} has no network to take addresses from: give ip_network, ip_start, ip_end and gateway")
    # An offer for another network is none for this one.
    if offered.get("ip_network") != str(within):
        own = bridge.address_in(within)
        if own is None:
            print(f"db_config: bridge {bridge.name} has no address in {within}: VMs may reach nobody", file=sys.stderr)
        interface = ipaddress.IPv4Interface(f"{own or within.network_address + 1}/{within.prefixlen}")
        offered = bridges.offer(bridges.Bridge(bridge.name, (interface,)))
    start = setting(values, "ip_start", fields.last_octet, offered["ip_start"], within)
    end = setting(values, "ip_end", fields.last_octet, offered["ip_end"], within)
    if start > end:
        raise Failed(f"ip_start {start} is beyond ip_end {end}")
    router = setting(values, "gateway", fields.gateway, offered["gateway"], within)
    return {"network": str(within), "start": start, "end": end, "gateway": str(router)}


def _read(path, yaml):
    """What the file says. One that cannot be read is not replaced: other programs' settings are in it."""
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Failed(f"{path} is not valid YAML and is left alone: {' '.join(str(error).split())}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise Failed(f"{path} is no mapping and is left alone")
    return document


def _mapping(document, key):
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _database(document, here):
    """The database's path: that of the contract, unless a host that is taken over has VMs in another file."""
    other = document.get("db_file")
    try:
        if isinstance(other, str) and other.startswith("/") and json.loads(pathlib.Path(other).read_text())["vms"]:
            return other
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return str(here.database)


def _write(path, text, group):
    """Replaces the file in one step, never readable for others on the way."""
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
            out.flush()
            os.fchown(out.fileno(), 0, group)
            os.fchmod(out.fileno(), 0o640)
            os.fsync(out.fileno())
        os.replace(fresh, path)
    except BaseException:
        pathlib.Path(fresh).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# template


@step
def template(config):
    code, _, err = run("blockhost-build-template", timeout=TEMPLATE_SECONDS)
    if code != 0:
        raise Failed(tail(err) or f"blockhost-build-template failed with exit code {code}")
