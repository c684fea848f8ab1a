"""The one way this package runs other programs."""

import os
import signal
import subprocess

# After SIGTERM a build still has its staging directory to remove.
GRACE = 15


class Failed(Exception):
    """What failed and why, in words for the installer's page."""


def run(*words, timeout=60):
    """Runs a program; (exit code, stdout, stderr). A program that outlives `timeout` seconds is ended with all it started."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise Failed(f"{words[0]} is not installed") from None
    except OSError as error:
        raise Failed(f"cannot run {words[0]}: {error.strerror}") from None
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, number)
            except ProcessLookupError:
                pass
            try:
                _, err = child.communicate(timeout=GRACE)
                break
            except subprocess.TimeoutExpired:
                err = ""
        said = f": {tail(err)}" if err.strip() else ""
        raise Failed(f"{words[0]} did not end within {timeout} s{said}") from None
    return child.returncode, out, err


def must(*words, timeout=60):
    """Runs a program that has to succeed; its stdout."""
    code, out, err = run(*words, timeout=timeout)
    if code != 0:
        raise Failed(f"{words[0]}: {tail(err) or f'exit code {code}'}")
    return out


def tail(text, most=500):
    """The end of what a program said, which is where the reason stands."""
    return text.strip()[-most:]
