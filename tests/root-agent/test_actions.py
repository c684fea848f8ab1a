"""Every action with good and with hostile parameters: what is run, what is refused, what is written down."""

import re

import pytest

ALL = [
    "virsh-start",
    "virsh-shutdown",
    "virsh-destroy",
    "virsh-reboot",
    "virsh-define",
    "virsh-undefine",
    "virsh-update-gecos",
    "virsh-guest-exec",
    "virsh-neighbour-add",
    "virsh-neighbour-del",
]
GECOS = "wallet=0x52908400098527886E0F7030069857D2E4169EE7,nft=42"
GOOD = {"domain": "web1", "gecos": GECOS, "username": "admin", "command": "id"}
XML = "<domain type='qemu'><name>x</name><devices><disk type='file'><source file='/etc/shadow'/></disk></devices></domain>"


@pytest.mark.parametrize("agent", ["logger", "function"], indirect=True)
def test_the_actions_are_these_and_no_others(agent, suite):
    assert sorted(agent.handlers) == sorted(ALL)
    # Whatever `log` is, it is written to.
    assert agent.ask("virsh-guest-exec", GOOD)["ok"]
    assert "virsh-guest-exec: a command for web1" in agent.journal


@pytest.mark.parametrize(
    ("action", "calls"),
    [
        ("virsh-start", [["blockhost-vm-start", "web1"]]),
        ("virsh-shutdown", [["blockhost-vm-stop", "web1"]]),
        ("virsh-destroy", [["blockhost-vm-kill", "web1"]]),
        ("virsh-reboot", [["blockhost-vm-status", "web1"], ["blockhost-vm-stop", "web1"], ["blockhost-vm-start", "web1"]]),
        ("virsh-undefine", [["blockhost-vm-status", "web1"], ["blockhost-vm-destroy", "web1"]]),
        (
            "virsh-update-gecos",
            [["blockhost-vm-update-gecos", "web1", "0x52908400098527886E0F7030069857D2E4169EE7", "--nft-id", "42", "--username", "admin"]],
        ),
        ("virsh-guest-exec", [["blockhost-vm-guest-exec", "web1", "id"]]),
    ],
)
def test_an_action_is_a_command_of_the_suite(agent, suite, action, calls):
    suite.make("blockhost-vm-status", "echo active" if action == "virsh-reboot" else "echo suspended")
    answer = agent.ask(action, GOOD)
    assert answer["ok"], answer
    assert suite.calls == calls
    assert answer.get("output", "") == "" or action == "virsh-guest-exec"


@pytest.mark.parametrize("params", [{}, GOOD, {"domain": "web1", "xml": XML}, {"xml": XML, "path": "/tmp/x.xml"}, {"domain": XML}])
def test_nobody_defines_a_domain_from_here(agent, suite, params):
    answer = agent.ask("virsh-define", params)
    assert not answer["ok"] and "blockhost-vm-create" in answer["error"]
    assert suite.calls == []


HOSTILE = [
    None, 0, 1, True, 1.5, [], ["web1"], {}, {"a": 1},
    "", " ", ".", "..", "-h", "--help", "--config=/etc/shadow", "-", "_x", ".web1",
    "web1\n", "\nweb1", "web1\nweb2", "web1\0", "web 1", "web1 web2", "web1\t", "web1\r",
    "/etc/passwd", "../web1", "web1/../..", "a/b", "file:///etc/passwd",
    "$(id)", "`id`", "web1;id", "web1|id", "web1&", "${IFS}", "*", "?", "~root", "web1'", 'web1"', "a\\b",
    XML, "<a>", "&amp;", "web1,x", "a:b", "a=b", "ä", "\u0430", "we\u200bb1", "x" * 65, "x" * 100000, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("action", ALL)
def test_no_hostile_name_reaches_anything(agent, suite, action):
    for name in HOSTILE:
        answer = agent.ask(action, {**GOOD, "domain": name})
        assert not answer["ok"], name
        assert len(answer["error"]) < 300 and "\n" not in answer["error"], answer["error"]
    for params in ({key: value for key, value in GOOD.items() if key != "domain"}, None, [], "web1", 3):
        assert not agent.ask(action, params)["ok"]
    assert suite.calls == []
    assert not any("exec:" in line for line in agent.journal)


def test_a_name_that_is_fine_is_one_argument(agent, suite):
    for name in ("1", "1e3", "true", "null", "A.b_c-d", "x" * 64, "help", "x--help"):
        assert agent.ask("virsh-start", {"domain": name, "path": "/etc/shadow", "xml": XML, "flags": ["--nvram"]})["ok"]
    assert suite.calls == [["blockhost-vm-start", name] for name in ("1", "1e3", "true", "null", "A.b_c-d", "x" * 64, "help", "x--help")]


@pytest.mark.parametrize("key", ["gecos", "username"])
def test_no_hostile_gecos_or_user_reaches_anything(agent, suite, key):
    values = [value for value in HOSTILE if not (key == "username" and value is None)]
    values += {
        "gecos": [GECOS + "\n", GECOS + ",x=1", "wallet=,nft=1", "wallet=0x1,nft=", "wallet=0x1:x,nft=1", "wallet=--username,nft=1", "nft=1,wallet=0x1", "wallet=0x1,nft=-1"],
        "username": ["Root", "admin\n", "a" * 33, "admin:x", "0day", "a b"],
    }[key]
    for value in values:
        if value == "_x" and key == "username":
            continue
        answer = agent.ask("virsh-update-gecos", {**GOOD, key: value})
        assert not answer["ok"], value
    assert suite.calls == []


def test_the_login_user_may_be_left_to_the_record(agent, suite):
    assert agent.ask("virsh-update-gecos", {"domain": "web1", "gecos": "wallet=addr1xyz,nft=" + "f0" * 32})["ok"]
    assert suite.calls == [["blockhost-vm-update-gecos", "web1", "addr1xyz", "--nft-id", "f0" * 32]]


COMMANDS = ["id; echo $HOME | cat >/etc/motd && `x` $(y) 'a' \"b\" \\ * ?", "--help", "-x", "a\nb\n", "ünï", "x" * 65000, " lead"]


def test_a_guests_command_reaches_the_guest_to_the_byte_and_no_shell_of_the_host(agent, suite):
    for command in COMMANDS:
        assert agent.ask("virsh-guest-exec", {"domain": "web1", "command": command})["ok"]
    assert suite.calls == [["blockhost-vm-guest-exec", "web1", command] for command in COMMANDS]


def test_what_is_no_command_is_refused(agent, suite):
    for command in (None, 1, True, [], ["id"], {}, "", "  \n", "a\0b", "\ud800", "x" * 65537, "ü" * 40000):
        assert not agent.ask("virsh-guest-exec", {"domain": "web1", "command": command})["ok"], command
    assert suite.calls == []


def test_what_the_guest_says_comes_back_as_it_is(agent, suite):
    suite.make("blockhost-vm-guest-exec", r"printf '  out\xff\n\n'; printf ' err\n' >&2; exit 7")
    answer = agent.ask("virsh-guest-exec", {"domain": "web1", "command": "x"})
    assert answer == {"ok": True, "stdout": "  out\ufffd\n\n", "stderr": " err\n", "exitcode": 7}
    suite.make("blockhost-vm-guest-exec", "head -c 3000000 /dev/zero")
    assert len(agent.ask("virsh-guest-exec", {"domain": "web1", "command": "x"})["stdout"]) == 1024 * 1024


@pytest.mark.parametrize("body", ["exit 0", "exit 1", "sleep 30", "kill -9 $$", None])
def test_no_secret_of_a_guests_command_is_written_down(agent, suite, body, monkeypatch, caplog):
    if body == "sleep 30":
        monkeypatch.setattr(agent.module, "GUEST", 0.5)
    if body is None:
        suite.remove("blockhost-vm-guest-exec")
    else:
        suite.make("blockhost-vm-guest-exec", body)
    answer = agent.ask("virsh-guest-exec", {"domain": "web1", "command": "echo hunter2 >/root/key"})
    assert answer["ok"] == (body in ("exit 0", "exit 1"))
    assert "hunter2" not in str(answer) + str(agent.journal) + caplog.text
    assert "web1" in str(agent.journal)


def test_an_error_is_the_commands_own_reason(agent, suite):
    suite.make("blockhost-vm-start", "echo text; echo 'error: there is no VM called web1' >&2; exit 1")
    assert agent.ask("virsh-start", GOOD) == {"ok": False, "error": "error: there is no VM called web1"}
    suite.make("blockhost-vm-start", "exit 3")
    assert agent.ask("virsh-start", GOOD)["error"] == "blockhost-vm-start failed with exit code 3"
    suite.make("blockhost-vm-start", "yes long | head -n 9999 >&2; exit 1")
    assert len(agent.ask("virsh-start", GOOD)["error"]) <= 500
    suite.remove("blockhost-vm-start")
    assert agent.ask("virsh-start", GOOD)["error"] == "cannot run blockhost-vm-start: No such file or directory"
    suite.make("blockhost-vm-start", r"printf '\xff'; exit 0")
    answer = agent.ask("virsh-start", GOOD)
    assert not answer["ok"] and "UnicodeDecodeError" in answer["error"], "the daemon's own run fails on it"


@pytest.fixture
def until_released(tmp_path):
    """What a stand-in does to last until the test lets it end."""
    release = tmp_path / "release"
    return f"while [ ! -e {release} ]; do sleep 0.1; done", release.touch


def test_a_guest_that_does_not_shut_down_holds_up_nobody(agent, suite, monkeypatch, until_released):
    lasting, release = until_released
    monkeypatch.setattr(agent.module, "SOON", 0.3)
    suite.make("blockhost-vm-status", "echo active")
    suite.make("blockhost-vm-stop", f"{lasting}; echo 'web1 still runs' >&2; exit 1")
    assert agent.ask("virsh-shutdown", GOOD) == {"ok": True, "output": "web1 is shutting down"}
    assert agent.ask("virsh-shutdown", GOOD)["ok"], "the same again joins the first"
    assert agent.ask("virsh-reboot", {"domain": "web2"}) == {"ok": True, "output": "web2 is rebooting"}
    assert agent.ask("virsh-start", {"domain": "web3"})["ok"], "others are served meanwhile"
    thread_names = [thread.name for thread, _ in agent.module._under_way.values()]
    assert "virsh-shutdown web1" in thread_names and "virsh-reboot web2" in thread_names
    release()
    for thread, _ in list(agent.module._under_way.values()):
        thread.join(10)
    assert [call for call in suite.calls if call[0] == "blockhost-vm-stop"] == [["blockhost-vm-stop", "web1"], ["blockhost-vm-stop", "web2"]]
    # A VM that did not stop is not started over.
    assert ["blockhost-vm-start", "web2"] not in suite.calls
    # How it ended stands in the journal.
    assert any(re.search("virsh-shutdown web1: web1 still runs", line) for line in agent.journal)


def test_a_shutdown_that_fails_at_once_says_so(agent, suite):
    suite.make("blockhost-vm-stop", "echo 'there is no VM called web1' >&2; exit 1")
    assert agent.ask("virsh-shutdown", GOOD) == {"ok": False, "error": "there is no VM called web1"}
    for status in ("suspended", "destroyed", "unknown", ""):
        suite.make("blockhost-vm-status", f"echo {status}")
        answer = agent.ask("virsh-reboot", GOOD)
        assert not answer["ok"] and "does not run" in answer["error"]


def test_what_takes_too_long_goes_on_and_says_so(agent, suite, monkeypatch, until_released):
    lasting, release = until_released
    usual = agent.module.POWER
    monkeypatch.setattr(agent.module, "POWER", 0.2)
    suite.make("blockhost-vm-kill", lasting)
    answer = agent.ask("virsh-destroy", GOOD)
    assert not answer["ok"] and "goes on: ask blockhost-vm-status web1" in answer["error"] and "0.2 s" in answer["error"]
    release()
    monkeypatch.setattr(agent.module, "POWER", usual)
    for thread, _ in list(agent.module._under_way.values()):
        thread.join(10)
    assert agent.module._under_way and agent.ask("virsh-start", GOOD)["ok"], "and is forgotten once it has ended"
    assert ("virsh-destroy", "web1") not in agent.module._under_way


def test_a_flood_of_requests_is_bounded(agent, suite, monkeypatch, until_released):
    lasting, release = until_released
    monkeypatch.setattr(agent.module, "SOON", 0.01)
    monkeypatch.setattr(agent.module, "MOST_UNDER_WAY", 3)
    suite.make("blockhost-vm-stop", lasting)
    answers = [agent.ask("virsh-shutdown", {"domain": f"web{n}"}) for n in range(5)]
    assert [answer["ok"] for answer in answers] == [True, True, True, False, False]
    assert "too many" in answers[4]["error"]
    release()
    for thread, _ in list(agent.module._under_way.values()):
        thread.join(10)
    assert agent.ask("virsh-start", {"domain": "web9"})["ok"]


def test_a_running_vm_is_not_removed(agent, suite):
    suite.make("blockhost-vm-status", "echo active")
    answer = agent.ask("virsh-undefine", GOOD)
    assert not answer["ok"] and "virsh-destroy" in answer["error"]
    assert suite.calls == [["blockhost-vm-status", "web1"]]


def test_update_gecos_is_bounded(agent, suite, monkeypatch):
    monkeypatch.setattr(agent.module, "GUEST", 0.3)
    suite.make("blockhost-vm-update-gecos", "sleep 5 </dev/null >/dev/null 2>&1")
    assert agent.ask("virsh-update-gecos", GOOD) == {"ok": False, "error": "blockhost-vm-update-gecos did not end within 0.3 s"}


NEIGHBOUR = {"address": "fd00:1::2", "mac": "52:54:00:01:02:03", "dev": "br0"}


@pytest.fixture
def bridge(agent, tmp_path):
    (tmp_path / "net/br0/bridge").mkdir(parents=True)
    (tmp_path / "net/eth0").mkdir()
    agent.module.INTERFACES = tmp_path / "net"


def test_an_address_is_tied_to_a_mac_address_and_set_free(agent, suite, bridge):
    suite.make("ip")
    assert agent.ask("virsh-neighbour-add", NEIGHBOUR)["ok"]
    assert agent.ask("virsh-neighbour-del", {"address": "fd00:1:0::2", "dev": "br0"})["ok"]
    entry = ["ip", "-6", "neigh", "replace", "fd00:1::2", "lladdr", "52:54:00:01:02:03", "nud", "permanent", "dev", "br0"]
    assert suite.calls == [entry, ["ip", "-6", "neigh", "del", "fd00:1::2", "dev", "br0"]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", value)
        for value in (None, 7, "", "10.0.0.1", "fe80::1", "ff02::1", "::", "::1", "fd00::1/64", "fd00::1%br0", "fd00::1 dev eth0", "-h")
    ]
    + [("mac", value) for value in (None, "", "52:54:00:01:02", "00:11:22:33:44:55", "52:54:00:01:02:03\n", "52:54:00:01:02:0G")]
    + [("dev", value) for value in (None, "", "eth0", "br1", "../br0", "br0/../eth0", "-br0", "br0\n", "b" * 16)],
)
def test_what_is_no_neighbour_is_refused(agent, suite, bridge, key, value):
    suite.make("ip")
    assert not agent.ask("virsh-neighbour-add", NEIGHBOUR | {key: value})["ok"]
    if key != "mac":
        assert not agent.ask("virsh-neighbour-del", NEIGHBOUR | {key: value})["ok"]
    assert suite.calls == []
