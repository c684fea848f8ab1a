"""The checks of what decides which checks are made: `.ci/run` with a program in place of make, and the budget of time. They need no host."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import budget

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def ci(make, seconds=None):
    """Runs `.ci/run` with this shell script as its make: its exit code, what it said, and how long that took."""
    with tempfile.TemporaryDirectory() as directory:
        fake = pathlib.Path(directory) / "make"
        fake.write_text(f"#!/bin/bash\nset -- \"$2\"\n{make}\n")
        fake.chmod(0o755)
        environment = {**os.environ, "BLOCKHOST_CI_MAKE": str(fake)}
        environment.pop("BLOCKHOST_TEST_HOST_SECONDS", None)
        if seconds:
            environment["BLOCKHOST_CI_SECONDS"] = str(seconds)
        begin = time.monotonic()
        done = subprocess.run([ROOT / ".ci/run"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, time.monotonic() - begin


def closing(text):
    lines = text.splitlines()
    return lines[lines.index("== altogether") + 1 :]


@check
def a_gate_that_passes_says_so_last():
    code, text, _ = ci('echo "$1 works"; [ "$1" = lint ] || echo "3 passed, 0 failed"')
    assert code == 0 and "lint works" in text, text
    lint, test, host, last = closing(text)
    assert lint.startswith("== make lint: passed after "), text
    assert test.endswith(": 3 passed, 0 failed") and host.startswith("== make test-host: passed after "), text
    assert last.startswith("== all passed after "), text


@check
def a_gate_names_what_failed_and_goes_on():
    code, text, _ = ci('[ "$1" != test ] || { echo "failed: a_test"; echo "2 passed, 1 failed"; exit 2; }')
    assert code == 1, text
    _, test, failed, host = closing(text)
    assert test.startswith("== make test: failed (2) after ") and test.endswith("2 passed, 1 failed"), text
    assert failed == "failed: a_test" and host.startswith("== make test-host: passed"), text


@check
def a_gate_ends_a_step_that_hangs_with_all_its_children():
    mark = f"31{os.getpid()}"
    code, text, seconds = ci(f'[ "$1" != test ] || {{ trap "" TERM; sleep {mark} & sleep {mark}; sleep {mark}; }}', seconds=40)
    assert code == 1, text
    _, test, host = closing(text)
    assert test.startswith("== make test: ended, as it took longer than "), text
    assert host.startswith("== make test-host: passed"), text
    # Far from what was slept for; how far depends on the machine.
    assert seconds < 300, seconds
    running = [path for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if f"sleep\0{mark}\0" in readable(path)]
    assert not running, running


def readable(path):
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@check
def a_gate_gives_the_host_what_time_is_left():
    shown = 'echo "$1 has ${BLOCKHOST_TEST_HOST_SECONDS-all}"; [ "$1" != test-host ] || echo "only the essential checks: of a slow machine"'
    code, text, _ = ci(shown)
    assert code == 0 and "test has all" in text, text
    given = int(text.partition("test-host has ")[2].split()[0])
    assert 3600 < given < 5400 - 60, given
    assert "only the essential checks: of a slow machine" in closing(text), text


@check
def a_quick_machine_makes_all_checks_and_a_slow_one_those_it_has_time_for():
    assert budget.fits(1.0, 1200), "a quick machine, after 25 minutes or after an hour"
    assert budget.fits(4.0, 3600), "a slow one with most of its time left"
    assert not budget.fits(4.0, 1200), "a slow one that has used most of it"
    assert budget.fits(4.0, 1200) == (budget.needed(4.0) <= 1200)
    # What the gate leaves for the host is enough for the essential ones where all others took four times as long as they do.
    assert budget.ESSENTIAL_SECONDS * 4 < 1200


@check
def the_essential_checks_are_some_of_all():
    text = "".join((HERE / name).read_text() for name in ("checks", "install_checks.py", "removal_checks.py"))
    names = budget.essential()
    unknown = [name for name in names if f"\ndef {name}():" not in text]
    assert len(names) >= 10 and len(set(names)) == len(names) and not unknown, unknown
    for one in ("the_hook_prepares_the_host", "detect_finds_the_host_fit", "a_quota_caps_the_whole_vm", "a_vm_cannot_send_what_it_forges"):
        assert one in names, one


def results(found=None):
    """Name, seconds and reason of each: no reason where what it says holds."""
    found = [] if found is None else found
    for function in CHECKS:
        begin, reason = time.monotonic(), None
        try:
            function()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].lineno
            reason = f"{type(error).__name__} in line {where}: {' '.join(str(error).split())[:400]}"
        found.append((function.__name__, time.monotonic() - begin, reason))
    return found


if __name__ == "__main__":
    for name, seconds, reason in results():
        print(f"{'ok' if reason is None else 'not ok'} {name} ({seconds:.1f} s) {reason or ''}")
    sys.exit(0)
