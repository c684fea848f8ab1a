import importlib.util
import json
import logging
import os
import pathlib
import stat
import subprocess
import sys
import types

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ACTIONS = REPOSITORY / "root-agent-actions"


class Agent:
    """What the daemon is to a module of actions: it loads each file by its path, with `_common` beside it, and calls a
    handler with what a client sent. `journal` is what it would have written."""

    def __init__(self, logger):
        self.journal = []
        common = types.ModuleType("_common")
        if logger:
            common.log = logging.Logger("root-agent")
            handler = logging.Handler()
            handler.emit = lambda record: self.journal.append(record.getMessage())
            common.log.addHandler(handler)
        else:
            common.log = self.journal.append
        common.run = self.run
        sys.modules["_common"] = common
        self.handlers = {}
        for path in sorted(ACTIONS.glob("*.py")):
            if not path.name.startswith("_"):
                spec = importlib.util.spec_from_file_location(f"action_{path.stem}", path)
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                for name, function in module.ACTIONS.items():
                    self.handlers.setdefault(name, function)
                self.module = module
        del sys.modules["_common"]

    def run(self, cmd, timeout=120):
        self.journal.append(f"exec: {' '.join(cmd)}")
        done = subprocess.run(cmd, capture_output=True, text=True, timeout=timeout)
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    def ask(self, action, params):
        answer = self.handlers[action](params)
        # It goes over a socket as JSON.
        assert json.loads(json.dumps(answer)) == answer and isinstance(answer["ok"], bool)
        assert answer["ok"] or (isinstance(answer["error"], str) and answer["error"])
        return answer


@pytest.fixture(params=["logger"])
def agent(request):
    """Its `log` is a logger, as in the base package; the contract's text has a function, which tests may ask for instead."""
    return Agent(request.param == "logger")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Stand-ins for the suite's commands; each records what it was called with, to the byte."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    class Suite:
        calls_file = tmp_path / "calls"

        def __init__(self):
            for verb in ("start", "stop", "kill", "status", "destroy", "update-gecos", "guest-exec", "create"):
                self.make(f"blockhost-vm-{verb}")
            # Nothing may go past the suite.
            for name in ("virsh", "sh", "qemu-img"):
                self.make(name)

        def make(self, name, body="exit 0"):
            path = directory / name
            path.unlink(missing_ok=True)
            path.write_text(f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" $'\\1' >>{self.calls_file}\n{body}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

        def remove(self, name):
            (directory / name).unlink()

        @property
        def calls(self):
            if not self.calls_file.exists():
                return []
            calls = self.calls_file.read_bytes().decode().split("\0\1\0")
            return [call.split("\0") for call in calls[:-1]]

    return Suite()


@pytest.fixture
def real(monkeypatch):
    """The suite's own commands, in front of everything."""
    monkeypatch.setenv("PATH", f"{os.environ['BLOCKHOST_TEST_BIN']}:{os.environ['PATH']}")
