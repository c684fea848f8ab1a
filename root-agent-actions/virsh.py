"""Actions of BlockHost's root agent for libvirt VMs: a thin door to the suite's own commands.

The agent is root and its clients are not. So a client chooses among fixed verbs and names a VM; nothing else it says
reaches a shell, a file or libvirt. Whether the VM is BlockHost's is for the commands to find out, in one place for everybody.
Two more verbs are asked by those commands themselves, when they do not run as root: see `neighbour_add`.

The agent serves the whole host in one thread. What may take long is therefore done beside that thread, and the answer is
held up for a few seconds only: long enough for what goes wrong at once to be told.
"""

import ipaddress
import pathlib
import re
import subprocess
import threading

from _common import log, run

# Those of the suite (docs/architecture.md). Matched against the whole text: a `$` would let a newline at the end through.
VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOGIN_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
GECOS = re.compile(r"wallet=([A-Za-z0-9_]{1,256}),nft=([0-9A-Za-z]{1,128})")

# libvirt's own range, which all VMs are made in.
MAC = re.compile(r"52:54:00(:[0-9a-f]{2}){3}")
INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
INTERFACES = pathlib.Path("/sys/class/net")

# The kernel takes 128 KiB for one argument.
COMMAND_LIMIT = 64 * 1024
OUTPUT_LIMIT = 1024 * 1024

# Seconds. How long the agent's thread is kept, and so the whole host waits:
SOON = 3  # by when a request that cannot be met has failed
POWER = 15  # libvirt needs about eleven to end a QEMU that hangs
GUEST = 10  # a guest decides itself how slow it is
# How long a command that goes on beside it may take. The longest is a shutdown, which gives up by itself after 45.
LIMIT = 120

MOST_UNDER_WAY = 16


class Refused(Exception):
    """Why a request is not met, for the client."""


def _text(params, key, pattern, rule):
    value = params.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise Refused(f"{key} {str(value)[:80]!r} is not valid: {rule}")
    return value


def _domain(params):
    return _text(params, "domain", VM_NAME, "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit")


def _say(text):
    # A logger in some releases of the base package, a function in others.
    getattr(log, "info", log)(text)


def _reason(command, code, out, err):
    lines = " ".join((err or out).split())
    return lines[-500:] or f"{command} failed with exit code {code}"


def _suite(command, *arguments, timeout=LIMIT):
    """Runs a command of the suite; its stdout. The agent logs the arguments."""
    try:
        code, out, err = run([command, *arguments], timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Refused(f"{command} did not end within {timeout} s") from None
    except OSError as error:
        raise Refused(f"cannot run {command}: {error.strerror}") from None
    if code != 0:
        raise Refused(_reason(command, code, out, err))
    return out


def _answer(work):
    try:
        return {"ok": True, **work()}
    except Refused as refused:
        return {"ok": False, "error": str(refused)}
    except Exception as error:  # noqa: BLE001 - its text may hold what a client wants kept secret
        return {"ok": False, "error": f"{type(error).__name__} in the root agent"}


_under_way = {}
_guard = threading.Lock()


def _beside(action, domain, work, wait):
    """Does `work` in a thread of its own; its answer, or None when it goes on after `wait` seconds."""
    key = (action, domain)
    with _guard:
        for other in [other for other, (thread, _) in _under_way.items() if not thread.is_alive()]:
            del _under_way[other]
        if key not in _under_way:
            if len(_under_way) >= MOST_UNDER_WAY:
                raise Refused("too many VMs are being worked on: try again in a minute")
            answers = []

            def worker():
                answer = _answer(work)
                answers.append(answer)
                if not answer["ok"]:
                    _say(f"{action} {domain}: {answer['error']}")

            thread = threading.Thread(target=worker, name=f"{action} {domain}", daemon=True)
            thread.start()
            _under_way[key] = (thread, answers)
        thread, answers = _under_way[key]
    # Whoever asks for the same thing twice waits for the first.
    thread.join(wait)
    return answers[0] if answers else None


def _finished(action, domain, work):
    answer = _beside(action, domain, work, POWER)
    if answer is None:
        raise Refused(f"{action} of {domain} has not ended within {POWER} s and goes on: ask blockhost-vm-status {domain}")
    if not answer["ok"]:
        raise Refused(answer["error"])
    return {"output": answer["output"]}


def _requested(action, domain, work, what):
    """As virsh: the request is made, the guest takes its time."""
    answer = _beside(action, domain, work, SOON)
    if answer is None:
        return {"output": f"{domain} {what}"}
    if not answer["ok"]:
        raise Refused(answer["error"])
    return {"output": answer["output"]}


def start(params):
    domain = _domain(params)
    return _finished("virsh-start", domain, lambda: {"output": _suite("blockhost-vm-start", domain)})


def shutdown(params):
    domain = _domain(params)
    work = lambda: {"output": _suite("blockhost-vm-stop", domain)}  # noqa: E731
    return _requested("virsh-shutdown", domain, work, "is shutting down")


def destroy(params):
    """libvirt's word for taking the power away. Nothing is deleted."""
    domain = _domain(params)
    return _finished("virsh-destroy", domain, lambda: {"output": _suite("blockhost-vm-kill", domain)})


def reboot(params):
    domain = _domain(params)

    def work():
        if _suite("blockhost-vm-status", domain) != "active":
            raise Refused(f"{domain} does not run: virsh-start starts it")
        # A guest that does not shut down keeps running: cutting its power is for virsh-destroy, which says so.
        _suite("blockhost-vm-stop", domain)
        return {"output": _suite("blockhost-vm-start", domain)}

    return _requested("virsh-reboot", domain, work, "is rebooting")


def define(_params):
    # A description can name any file of the host as a disk: whoever may define one is root.
    raise Refused("virsh-define takes no descriptions from clients: blockhost-vm-create defines VMs")


def undefine(params):
    """Ends the removal of a VM that earlier clients began with virsh-destroy. A domain that is undefined and nothing else
    would leave its disk, addresses and record to nobody, so it is the suite's whole removal; and so, as a guard against
    one word too few, only of a VM that is off."""
    domain = _domain(params)

    def work():
        if _suite("blockhost-vm-status", domain) == "active":
            raise Refused(f"{domain} runs: virsh-destroy, or virsh-shutdown, comes first")
        return {"output": _suite("blockhost-vm-destroy", domain)}

    return _finished("virsh-undefine", domain, work)


def update_gecos(params):
    domain = _domain(params)
    gecos = _text(params, "gecos", GECOS, "wallet=<address>,nft=<id>")
    wallet, nft = GECOS.fullmatch(gecos).groups()
    arguments = [domain, wallet, "--nft-id", nft]
    if params.get("username") is not None:
        arguments += ["--username", _text(params, "username", LOGIN_NAME, "1 to 32 of a-z 0-9 _ -, the first a letter or _")]
    return {"output": _suite("blockhost-vm-update-gecos", *arguments, timeout=GUEST)}


def guest_exec(params):
    """Runs a shell command in the guest, not here. The agent's own `run` writes what it runs into the journal, strips the
    output and fails on what is not UTF-8, so it is not used."""
    domain = _domain(params)
    command = params.get("command")
    if not isinstance(command, str) or not command.strip() or "\0" in command:
        raise Refused("command must be a text that is not empty")
    try:
        if len(command.encode()) > COMMAND_LIMIT:
            raise Refused(f"command has more than {COMMAND_LIMIT} bytes")
    except UnicodeEncodeError:
        raise Refused("command is not valid Unicode") from None
    _say(f"virsh-guest-exec: a command for {domain}")
    name = "blockhost-vm-guest-exec"
    try:
        done = subprocess.run([name, domain, command], stdin=subprocess.DEVNULL, capture_output=True, timeout=GUEST)
    except subprocess.TimeoutExpired:
        # The original names the command.
        raise Refused(f"the command in {domain} has not ended within {GUEST} s: {name} itself waits longer") from None
    except OSError as error:
        raise Refused(f"cannot run {name}: {error.strerror}") from None
    if done.returncode < 0:
        raise Refused(f"{name} was killed by signal {-done.returncode}")
    out, err = (stream[:OUTPUT_LIMIT].decode(errors="replace") for stream in (done.stdout, done.stderr))
    return {"stdout": out, "stderr": err, "exitcode": done.returncode}


def _neighbour(params):
    text = params.get("address")
    try:
        address = ipaddress.IPv6Address(text if isinstance(text, str) and "%" not in text else "")
    except ValueError:
        address = ipaddress.IPv6Address("::")
    if address.is_unspecified or address.is_link_local or address.is_multicast or address.is_loopback:
        raise Refused(f"address {str(text)[:80]!r} is not valid: an IPv6 address of a VM")
    bridge = _text(params, "dev", INTERFACE, "the name of a bridge")
    if not (INTERFACES / bridge / "bridge").is_dir():
        raise Refused(f"dev {bridge!r} is not valid: the name of a bridge")
    return str(address), bridge


def neighbour_add(params):
    """Ties a VM's IPv6 address to its MAC address on the host, so that the host believes no other VM that claims it. Setting a
    neighbour entry needs root, and the base package has no action for it, as it has for the route."""
    address, bridge = _neighbour(params)
    mac = _text(params, "mac", MAC, "52:54:00 and three more bytes, in lower case")
    return {"output": _suite("ip", "-6", "neigh", "replace", address, "lladdr", mac, "nud", "permanent", "dev", bridge, timeout=SOON)}


def neighbour_del(params):
    address, bridge = _neighbour(params)
    return {"output": _suite("ip", "-6", "neigh", "del", address, "dev", bridge, timeout=SOON)}


def _action(handler):
    def action(params):
        if not isinstance(params, dict):
            return {"ok": False, "error": "params must be an object"}
        return _answer(lambda: handler(params))

    action.__name__ = handler.__name__
    action.__doc__ = handler.__doc__
    return action


ACTIONS = {
    "virsh-start": _action(start),
    "virsh-shutdown": _action(shutdown),
    "virsh-destroy": _action(destroy),
    "virsh-reboot": _action(reboot),
    "virsh-define": _action(define),
    "virsh-undefine": _action(undefine),
    "virsh-update-gecos": _action(update_gecos),
    "virsh-guest-exec": _action(guest_exec),
    "virsh-neighbour-add": _action(neighbour_add),
    "virsh-neighbour-del": _action(neighbour_del),
}
