"""Where things are on a host. The same variables as the suite's commands read move them, for tests."""

import os
import pathlib
from dataclasses import dataclass

GROUP = "blockhost"
USER = "blockhost"
QEMU_USER = "libvirt-qemu"


@dataclass(frozen=True)
class Places:
    config: pathlib.Path
    state: pathlib.Path
    run: pathlib.Path
    libvirt: str

    @property
    def db_yaml(self):
        return self.config / "db.yaml"

    @property
    def vms(self):
        return self.state / "vms"

    @property
    def database(self):
        return self.state / "vms.json"


def places():
    def directory(variable, default):
        return pathlib.Path(os.environ.get(variable) or default)

    return Places(
        config=directory("BLOCKHOST_CONFIG_DIR", "/etc/blockhost"),
        state=directory("BLOCKHOST_STATE_DIR", "/var/lib/blockhost"),
        run=directory("BLOCKHOST_RUN_DIR", "/run/blockhost"),
        libvirt=os.environ.get("BLOCKHOST_LIBVIRT_URI") or "qemu:///system",
    )
