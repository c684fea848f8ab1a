import importlib
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading
import uuid

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "wizard"
sys.path.insert(0, str(PACKAGE))
sys.path.insert(0, str(pathlib.Path(__file__).parent))


class Host:
    """Directories of one installation, below the run's, so that the fixture takes its pool away too."""

    def __init__(self, directory):
        self.directory = directory
        self.config, self.state, self.run = (directory / name for name in ("config", "state", "run"))
        self.pool = f"{os.environ['BLOCKHOST_TEST_POOL']}-{directory.name}"
        self.bridge = os.environ["BLOCKHOST_TEST_BRIDGE"]
        self.network = os.environ["BLOCKHOST_TEST_NETWORK"]
        self.gateway = os.environ["BLOCKHOST_TEST_GATEWAY"]
        for path in (self.config, self.state, self.run):
            path.mkdir(parents=True)
        # As the base package leaves it.
        self.state.chmod(0o750)
        (self.run / "bridge").write_text(self.bridge + "\n")

    def environment(self):
        return {
            "BLOCKHOST_CONFIG_DIR": str(self.config),
            "BLOCKHOST_STATE_DIR": str(self.state),
            "BLOCKHOST_RUN_DIR": str(self.run),
        }

    def step(self, name, config, crash=None, shims=None, **extra):
        """Runs a finalization step in a process of its own; (result, config afterwards), or None when it died."""
        environment = {**os.environ, **self.environment(), "PYTHONPATH": str(PACKAGE), **extra}
        if crash is not None:
            environment["CRASH"] = json.dumps(crash)
        if shims is not None:
            environment["PATH"] = f"{shims}:{environment['PATH']}"
        done = subprocess.run(
            [sys.executable, "-B", str(pathlib.Path(__file__).parent / "run_step.py"), name],
            input=json.dumps(config),
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == -9:
            return None
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def database_settings(self):
        import yaml

        return yaml.safe_load((self.config / "db.yaml").read_text())


@pytest.fixture
def host():
    directory = pathlib.Path(os.environ["BLOCKHOST_TEST_DIR"]) / f"wizard-{uuid.uuid4().hex[:6]}"
    directory.mkdir(mode=0o711)
    directory.chmod(0o711)
    yield Host(directory)
    # libvirt's default deadline is the fixture's; a pool that stays would only slow down the runs after this one.
    for words in (("pool-destroy",), ("pool-undefine",)):
        subprocess.run(
            ["virsh", "-q", "-c", "qemu:///system", *words, f"{os.environ['BLOCKHOST_TEST_POOL']}-{directory.name}"],
            capture_output=True,
        )
    shutil.rmtree(directory)


@pytest.fixture
def here(host, monkeypatch):
    """The same for steps that are called in this process."""
    for key, value in host.environment().items():
        monkeypatch.setenv(key, value)
    steps = importlib.import_module("blockhost.provisioner_libvirt.steps")
    # Any user and group will do where the base package is not installed.
    monkeypatch.setattr(steps, "USER", "nobody")
    monkeypatch.setattr(steps, "GROUP", "nogroup")
    return host


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program in front of $PATH; it writes its arguments to <name>.calls, one call per line."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    monkeypatch.setenv("PATH", f"{bin_directory}:{os.environ['PATH']}")

    def make(name, body="exit 0"):
        path = bin_directory / name
        calls = bin_directory / f"{name}.calls"
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{calls}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return calls

    make.directory = bin_directory
    return make


@pytest.fixture
def installer():
    """The stand-in for the installer, as a Flask application."""
    from installer import create

    return create()


@pytest.fixture
def served(installer):
    """Its address, while it is being served."""
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, installer, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
