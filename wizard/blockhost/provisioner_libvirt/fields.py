"""The values of the page: their defaults, and what is wrong with one, in words that stand beside its field."""

import ipaddress
import posixpath
import re

from . import bridge as bridges

NAMES = ("bridge", "ip_network", "ip_start", "ip_end", "gateway", "storage_pool", "storage_path", "gc_grace_days")
POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PATH = re.compile(r"(/[A-Za-z0-9._-]+)+")
# Making one of these a pool would change its mode.
SYSTEM = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var/tmp")
MOST_DAYS = 3650


class Invalid(Exception):
    """What is wrong with a value."""


def _text(value):
    # JSON knows numbers; forms and hand-written files have texts.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise Invalid("must be a text or a number")
    text = str(value).strip()
    if not text:
        raise Invalid("is missing")
    if len(text) > 255:
        raise Invalid("is too long")
    return text


def _integer(value, least, most):
    text = _text(value)
    # int() would also take "1_0", "+5" and the digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise Invalid(f"must be a whole number from {least} to {most}")
    return int(text)


def network(value):
    text = _text(value)
    try:
        parsed = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        parsed = None
    if parsed is None or not re.fullmatch(r"[0-9.]+/[0-9]{1,2}", text):
        raise Invalid("must be a network such as 192.168.1.0/24")
    if not 8 <= parsed.prefixlen <= 30:
        raise Invalid("must have a prefix length from 8 to 30")
    if parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified:
        raise Invalid("is not a network VMs can be in")
    return parsed


def _address(text):
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def last_octet(value, within):
    """A last octet of `within`, given as a number or as a full address."""
    text = _text(value)
    address = _address(text)
    if address is not None and within is not None:
        if address not in within or int(address) >> 8 != int(within.network_address) >> 8:
            raise Invalid(f"is outside the network {within}" if address not in within else "must be in the network's first 256 addresses")
        text = str(int(address) & 0xFF)
    elif address is not None:
        text = str(int(address) & 0xFF)
    if not re.fullmatch(r"[0-9]{1,3}", text) or int(text) > 255:
        raise Invalid("must be a number from 0 to 255, or an address of the network")
    octet = int(text)
    if within is not None and octet not in bridges.last_octets(within):
        raise Invalid(f"is outside the network {within}, or its network or broadcast address")
    return octet


def gateway(value, within):
    address = _address(_text(value))
    if address is None:
        raise Invalid("must be an address such as 192.168.1.1")
    if within is not None and address not in within:
        raise Invalid(f"is outside the network {within}")
    if within is not None and address in (within.network_address, within.broadcast_address):
        raise Invalid("is the network's own or its broadcast address")
    return address


def storage_pool(value):
    text = _text(value)
    if not POOL_NAME.fullmatch(text):
        raise Invalid("must have 1 to 64 of A-Z a-z 0-9 . _ -, and begin with a letter or digit")
    return text


def storage_path(value):
    text = _text(value)
    if not PATH.fullmatch(text.rstrip("/")):
        raise Invalid("must be an absolute path of A-Z a-z 0-9 . _ - and /")
    path = text.rstrip("/")
    if path != posixpath.normpath(path):
        raise Invalid("must not have . or .. as a part of it")
    if path.count("/") < 2 or path in ("/var/lib", "/var/log", "/var/cache") or any(path == top or path.startswith(top + "/") for top in SYSTEM):
        raise Invalid("must be a directory for this alone, such as /var/lib/blockhost/vms")
    return path


def gc_grace_days(value):
    return _integer(value, 0, MOST_DAYS)


def bridge_name(value):
    text = _text(value)
    if not bridges.INTERFACE.fullmatch(text):
        raise Invalid("must be the name of a network interface")
    return text


def defaults(bridge, vms):
    """What the page offers, all as values to be stored."""
    return {
        **(bridges.offer(bridge) or {}),
        **({"bridge": bridge.name} if bridge else {}),
        "storage_pool": "blockhost",
        "storage_path": str(vms),
        "gc_grace_days": 7,
    }


def check(typed, found):
    """Checks what was typed, with `found` the host's bridges by name: (values to store, messages by field)."""
    values, errors = {}, {}

    def take(name, parse, *context):
        try:
            return parse(typed.get(name), *context)
        except Invalid as invalid:
            errors[name] = str(invalid)
            return None

    typed = {name: typed.get(name) if typed.get(name) is not None else "" for name in NAMES}
    within = take("ip_network", network)
    start = take("ip_start", last_octet, within)
    end = take("ip_end", last_octet, within)
    router = take("gateway", gateway, within)
    values["storage_pool"] = take("storage_pool", storage_pool)
    values["storage_path"] = take("storage_path", storage_path)
    values["gc_grace_days"] = take("gc_grace_days", gc_grace_days)
    bridge = None
    if typed["bridge"]:
        name = take("bridge", bridge_name)
        if name is not None and name not in found:
            errors["bridge"] = "is not a bridge of this host"
        bridge = found.get(name)

    if within is not None:
        values["ip_network"] = str(within)
        if bridge and bridge.addresses and not bridge.address_in(within):
            own = ", ".join(str(address.network) for address in bridge.addresses)
            errors["ip_network"] = f"is not a network of bridge {bridge.name}, which is in {own}: VMs would reach nobody"
    if start is not None and end is not None and within is not None:
        message = wrong_range(start, end, within, router, bridge)
        if message:
            errors["ip_end"] = message
    if router is not None:
        values["gateway"] = str(router)
    if bridge:
        values["bridge"] = bridge.name
    values.update(ip_start=start, ip_end=end)
    return values, errors


def wrong_range(start, end, within, router, bridge):
    """What is wrong with a range whose ends are fine, or None."""
    if start > end:
        return "must not be below the first address"
    first = int(within.network_address) & ~0xFF
    for own in bridge.addresses if bridge else ():
        # The provisioner leaves out the gateway by itself, but knows of no other address.
        if own.ip != router and first + start <= int(own.ip) <= first + end:
            return f"the range contains this host's own address {own.ip}"
    if not set(bridges.last_octets(within, {router})) & set(range(start, end + 1)):
        return "the range has no address for a VM: the gateway is not given to one"
    return None
