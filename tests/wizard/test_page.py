"""The page without a browser: who may see it, what it offers, what it refuses, what it stores."""

import ipaddress
import json
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "wizard"
URL = "/wizard/libvirt"


@pytest.fixture
def client(here, installer):
    client = installer.test_client()
    client.get("/login")
    return client


@pytest.fixture
def good(here):
    """What the page offers."""
    from blockhost.provisioner_libvirt import bridge, fields

    found = bridge.detect(here.run)
    return {name: str(value) for name, value in fields.defaults(found, here.state / "vms").items()}


def stored(client):
    with client.session_transaction() as session:
        return session.get("libvirt")


def test_the_import_needs_nothing_but_flask_and_the_standard_library():
    script = """
import builtins, importlib, os, subprocess, sys
os.environ["PATH"] = "/nonexistent"
real = builtins.__import__
def guarded(name, *rest):
    top = name.partition(".")[0]
    if top in ("yaml", "libvirt", "virt", "requests"):
        raise ImportError(name)
    return real(name, *rest)
builtins.__import__ = guarded
def nothing(*a, **k): raise AssertionError("a process was started")
subprocess.Popen = nothing
module = importlib.import_module("blockhost.provisioner_libvirt.wizard")
assert module.blueprint.name == "provisioner_libvirt"
assert [s[0] for s in module.get_finalization_steps()] == ["storage", "network", "db_config", "template"]
assert len(module.get_finalization_steps()[3]) == 4
assert not any(name.partition(".")[0] in ("yaml", "libvirt") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], env={"PYTHONPATH": str(PACKAGE)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["get", "post"])
def test_who_is_not_logged_in_is_sent_to_the_login(here, installer, good, method):
    client = installer.test_client()
    answer = getattr(client, method)(URL, data=good if method == "post" else None)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/login")
    assert stored(client) is None


def test_the_bridges_own_network_is_offered_without_the_host(client, here):
    page = client.get(URL).get_data(as_text=True)
    value = dict(re.findall(r'name="(\w+)" value="([^"]*)"', page))
    assert value["ip_network"] == here.network
    assert value["gateway"] == here.gateway
    assert value["storage_path"] == str(here.state / "vms")
    network = ipaddress.ip_network(here.network)
    offered = [network[octet] for octet in range(int(value["ip_start"]), int(value["ip_end"]) + 1)]
    assert len(offered) > 40 and ipaddress.ip_address(here.gateway) not in offered
    assert here.bridge in page


def test_without_a_bridge_nothing_is_offered_and_the_page_says_so(client, here, monkeypatch, tmp_path):
    from blockhost.provisioner_libvirt import bridge

    monkeypatch.setattr(bridge, "SYS_CLASS_NET", tmp_path)
    (here.run / "bridge").unlink()
    answer = client.get(URL)
    page = answer.get_data(as_text=True)
    assert answer.status_code == 200 and "no bridge with an IPv4 address yet" in page
    assert 'name="ip_network" value=""' in page and 'name="storage_pool" value="blockhost"' in page


def test_a_host_whose_addresses_cannot_be_asked_for_gets_the_page_all_the_same(client, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert client.get(URL).status_code == 200


def test_good_input_is_stored_small_and_plain_and_goes_on(client, here, good):
    answer = client.post(URL, data=good)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/wizard/connectivity")
    values = stored(client)
    assert json.loads(json.dumps(values)) == values and len(json.dumps(values)) < 1000
    assert values["ip_network"] == here.network and values["gateway"] == here.gateway
    assert (values["ip_start"], values["ip_end"]) == (int(good["ip_start"]), int(good["ip_end"]))
    assert values["gc_grace_days"] == 7 and values["bridge"] == here.bridge
    # Coming back, the page shows what was chosen.
    client.post(URL, data={**good, "gc_grace_days": "23", "ip_start": str(ipaddress.ip_network(here.network)[201])})
    assert stored(client)["ip_start"] == 201
    page = client.get(URL).get_data(as_text=True)
    assert 'name="gc_grace_days" value="23"' in page and 'name="ip_start" value="201"' in page


HOSTILE = ["", " ", "x", "1e3", "-1", "999", "٣", "1_0", "0x10", "<script>alert(1)</script>", "'; DROP", "a\0b", "9" * 400, "../..", "\n", "{{7*7}}"]


@pytest.mark.parametrize("name", ["ip_network", "ip_start", "ip_end", "gateway", "storage_pool", "storage_path", "gc_grace_days"])
def test_bad_input_is_shown_again_with_its_message_and_nothing_is_stored(client, good, name):
    for text in HOSTILE:
        if name == "storage_pool" and text in ("x", "1e3", "999", "1_0", "0x10"):
            continue
        if name == "gc_grace_days" and text == "999":
            continue
        answer = client.post(URL, data={**good, name: text})
        page = answer.get_data(as_text=True)
        assert answer.status_code == 200, (name, text)
        assert f'id="{name}-error"' in page or (name == "ip_start" and 'id="ip_end-error"' in page), (name, text)
        assert "<script>alert" not in page and "49" != dict(re.findall(r'name="(\w+)" value="([^"]*)"', page))[name]
        # What was typed elsewhere is kept.
        assert f'name="{"gateway" if name != "gateway" else "storage_pool"}" value="{good["gateway" if name != "gateway" else "storage_pool"]}"' in page
    assert stored(client) is None
    assert 'name="gateway" value="10.0.0.x"' in client.post(URL, data={**good, "gateway": "10.0.0.x"}).get_data(as_text=True)


def test_a_request_made_by_hand_without_fields_is_no_error_of_ours(client):
    answer = client.post(URL, data={})
    assert answer.status_code == 200 and answer.get_data(as_text=True).count('aria-invalid="true"') == 7


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"gateway": "203.0.113.1"}, "gateway", "outside the network"),
        ({"ip_start": "203.0.113.5"}, "ip_start", "outside the network"),
        ({"ip_start": "250", "ip_end": "200"}, "ip_end", "below the first"),
        ({"ip_start": "0"}, "ip_start", "broadcast"),
        ({"ip_end": "255"}, "ip_end", "broadcast"),
        ({"ip_start": "1", "ip_end": "1"}, "ip_end", "no address for a VM"),
        ({"ip_network": "203.0.113.0/24"}, "ip_network", "is not a network of bridge"),
        ({"ip_network": "203.0.113.0"}, "ip_network", "must be a network such as"),
        ({"ip_network": "127.0.0.0/8"}, "ip_network", "not a network VMs can be in"),
        ({"storage_path": "/etc/blockhost"}, "storage_path", "a directory for this alone"),
        ({"storage_path": "/var/lib/../lib/x"}, "storage_path", "must not have"),
        ({"storage_path": "vms"}, "storage_path", "absolute path"),
        ({"storage_pool": "--config"}, "storage_pool", "begin with a letter"),
        ({"gc_grace_days": "3651"}, "gc_grace_days", "from 0 to 3650"),
        ({"bridge": "lo"}, "bridge", "not a bridge"),
    ],
)
def test_each_mistake_has_words_of_its_own(client, good, changes, field, message):
    page = client.post(URL, data={**good, **changes}).get_data(as_text=True)
    found = re.search(rf'id="{field}-error">(.*?)</p>', page, re.S)
    text = found.group(1) if found else page
    assert message in text, page


def test_values_of_a_session_that_something_else_filled_do_no_harm(client):
    from blockhost.provisioner_libvirt import wizard

    for value in (None, "x", 7, [], {"ip_start": {"a": 1}}, {"storage_pool": "<b>"}):
        with client.session_transaction() as session:
            session["libvirt"] = value
        assert client.get(URL).status_code == 200
        page = client.get("/wizard/summary")
        assert page.status_code == 200 and b"<b>" not in page.data
    for session in (None, 3, [], {}, {"libvirt": None}, {"libvirt": {"bridge": None}}):
        assert set(wizard.get_summary_data(session)) >= {"ip_network", "storage_pool"}
        assert wizard.get_ui_params(session) == {}


def test_the_summary_shows_what_was_chosen(client, good):
    client.post(URL, data=good)
    page = client.get("/wizard/summary").get_data(as_text=True)
    for name in ("ip_network", "gateway", "storage_pool", "storage_path"):
        assert good[name] in page
    assert f"{good['ip_start']} to {good['ip_end']}" in page


# The offer


def bridge_of(*addresses, router=None):
    from blockhost.provisioner_libvirt.bridge import Bridge

    interfaces = tuple(ipaddress.IPv4Interface(address) for address in addresses)
    return Bridge("br0", interfaces, ipaddress.IPv4Address(router) if router else None)


@pytest.mark.parametrize(
    ("addresses", "router", "expected"),
    [
        # The router's address when the bridge has an uplink, else the host's.
        (["192.168.7.20/24"], "192.168.7.1", ("192.168.7.0/24", 200, 250, "192.168.7.1")),
        (["192.168.7.1/24"], None, ("192.168.7.0/24", 200, 250, "192.168.7.1")),
        # A host in the middle of what is usually offered.
        (["192.168.7.220/24"], "192.168.7.1", ("192.168.7.0/24", 221, 250, "192.168.7.1")),
        # Networks smaller and larger than a /24, and not at its beginning.
        (["10.0.0.130/25"], "10.0.0.129", ("10.0.0.128/25", 200, 250, "10.0.0.129")),
        (["10.0.0.33/28"], None, ("10.0.0.32/28", 34, 46, "10.0.0.33")),
        (["10.0.5.1/16"], None, ("10.0.0.0/16", 200, 250, "10.0.5.1")),
        # The network with the router counts.
        (["10.9.0.1/24", "192.168.7.20/24"], "192.168.7.1", ("192.168.7.0/24", 200, 250, "192.168.7.1")),
        # No room at all.
        (["10.0.0.1/32"], None, None),
        (["10.0.0.0/31"], None, None),
        ([], None, None),
    ],
)
def test_what_is_offered_fits_the_bridge(addresses, router, expected):
    from blockhost.provisioner_libvirt.bridge import offer

    offered = offer(bridge_of(*addresses, router=router))
    assert (tuple(offered.values()) if offered else None) == expected


def test_what_is_offered_is_what_is_accepted():
    from blockhost.provisioner_libvirt import bridge, fields

    for address in ("10.0.0.1/8", "10.1.2.3/20", "192.168.0.200/24", "192.168.0.126/25", "10.0.0.6/29", "10.0.0.1/30"):
        own = bridge_of(address)
        typed = {name: str(value) for name, value in fields.defaults(own, "/var/lib/blockhost/vms").items()}
        _, errors = fields.check(typed, {"br0": own})
        assert errors == {} and bridge.offer(own), address


def test_the_marker_decides_then_an_address_then_the_router():
    from dataclasses import replace

    from blockhost.provisioner_libvirt.bridge import choose, marked

    plain = bridge_of("10.0.0.1/24")
    found = {
        "a": replace(plain, name="a"),
        "b": replace(bridge_of("10.1.0.2/24", router="10.1.0.1"), name="b"),
        "empty": replace(bridge_of(), name="empty"),
        "virbr0": replace(bridge_of("192.168.122.1/24"), name="virbr0"),
    }
    assert choose(found, None).name == "b"
    assert choose(found, "a").name == "a"
    assert choose(found, "virbr0").name == "virbr0"
    assert choose({"a": found["a"], "virbr0": found["virbr0"]}, "gone").name == "a"
    assert choose({"virbr0": found["virbr0"], "empty": found["empty"]}, None) is None
    assert marked(PACKAGE) is None


def test_a_range_with_the_hosts_own_address_is_refused():
    from blockhost.provisioner_libvirt.fields import wrong_range

    own = bridge_of("192.168.7.20/24", router="192.168.7.1")
    network = ipaddress.IPv4Network("192.168.7.0/24")
    router = ipaddress.IPv4Address("192.168.7.1")
    assert "192.168.7.20" in wrong_range(2, 254, network, router, own)
    assert wrong_range(21, 254, network, router, own) is None
    assert wrong_range(1, 19, network, router, own) is None
