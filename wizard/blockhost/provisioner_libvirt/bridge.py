"""The bridge the VMs will sit on, and the addresses to offer for them."""

import ipaddress
import json
import pathlib
import re
from dataclasses import dataclass

from . import child

SYS_CLASS_NET = pathlib.Path("/sys/class/net")
# Those of libvirt's own networks and of Docker. A marker file may name one all the same.
SOMEBODY_ELSES = re.compile(r"virbr\d+|docker\d+|br-[0-9a-f]{12}")
INTERFACE = re.compile(r"(?!-)(?!\.{1,2}$)[A-Za-z0-9._@-]{1,15}")
# Above what routers usually give out by DHCP.
PREFERRED = range(200, 251)
ENOUGH = 8


@dataclass(frozen=True)
class Bridge:
    name: str
    # Its global IPv4 addresses, each with its network.
    addresses: tuple = ()
    # The router behind it, if the host's default route leads there.
    router: ipaddress.IPv4Address | None = None

    @property
    def address(self):
        """That in the router's network, else the first."""
        behind = [own for own in self.addresses if self.router and self.router in own.network]
        return (behind or list(self.addresses) or [None])[0]

    def address_in(self, network):
        return next((own.ip for own in self.addresses if own.ip in network), None)


def _ip(*words):
    try:
        return json.loads(child.must("ip", "-j", "-4", *words, timeout=10) or "[]")
    except ValueError:
        raise child.Failed("ip: its answer is not JSON") from None


def bridges():
    """All bridges of the host that have a global IPv4 address, or that the marker may name: name to Bridge."""
    try:
        names = sorted(path.name for path in SYS_CLASS_NET.iterdir() if (path / "bridge").is_dir())
    except OSError:
        return {}
    if not names:
        return {}
    addresses, routers = {}, {}
    for link in _ip("address", "show"):
        for entry in link.get("addr_info", []):
            if entry.get("family") == "inet" and entry.get("scope") == "global":
                own = ipaddress.IPv4Interface(f"{entry['local']}/{entry['prefixlen']}")
                addresses.setdefault(link.get("ifname"), []).append(own)
    for route in _ip("route", "show", "default"):
        if "gateway" in route and "dev" in route:
            routers.setdefault(route["dev"], ipaddress.IPv4Address(route["gateway"]))
    return {name: Bridge(name, tuple(addresses.get(name, ())), routers.get(name)) for name in names}


def marked(run_directory):
    """The name in the first boot's marker, or None."""
    try:
        name = (run_directory / "bridge").read_text(errors="replace").strip()
    except OSError:
        return None
    return name if INTERFACE.fullmatch(name) else None


def choose(found, marker):
    """The bridge of the VMs among those found, or None: the marked one, else one with an address, that behind which
    the host's router is first."""
    if marker in found:
        return found[marker]
    fit = [bridge for bridge in found.values() if bridge.addresses and not SOMEBODY_ELSES.fullmatch(bridge.name)]
    fit.sort(key=lambda bridge: (bridge.router is None, bridge.name))
    return fit[0] if fit else None


def detect(run_directory):
    """The bridge of the VMs, or None when there is none."""
    return choose(bridges(), marked(run_directory))


def last_octets(network, without=()):
    """What a pool of `network` can give out, as last octets: the provisioner counts up in the network's first 256
    addresses, leaving out its own and its broadcast address."""
    first = int(network.network_address) & ~0xFF
    return [
        octet
        for octet in range(256)
        if (address := ipaddress.IPv4Address(first + octet)) in network
        and address not in (network.network_address, network.broadcast_address)
        and address not in without
    ]


def _longest_run(octets):
    best, run = [], []
    for octet in octets:
        run = [*run, octet] if run and octet == run[-1] + 1 else [octet]
        best = max(best, run, key=len)
    return best


def offer(bridge):
    """The pool to offer on a bridge: its network, its gateway, and a range without the host and the router. None where the
    bridge has no address, or its network no room."""
    own = bridge.address if bridge else None
    if own is None or own.network.prefixlen > 30:
        return None
    network = own.network
    gateway = bridge.router if bridge.router and bridge.router in network else own.ip
    free = last_octets(network, {gateway, *(other.ip for other in bridge.addresses)})
    run = _longest_run([octet for octet in free if octet in PREFERRED])
    if len(run) < ENOUGH:
        run = _longest_run(free)
    if not run:
        return None
    return {"ip_network": str(network), "ip_start": run[0], "ip_end": run[-1], "gateway": str(gateway)}
