"""Runs one finalization step in this process: its name is the argument, its config JSON on stdin; prints [result, config].

CRASH = ["os.replace", 1] kills the process with SIGKILL at the first call of that function, before it does anything.
"""

import importlib
import json
import os
import signal
import sys

from blockhost.provisioner_libvirt import steps, wizard

steps.USER, steps.GROUP = "nobody", "nogroup"
steps.LIBVIRT_NETWORK = os.environ.get("TEST_LIBVIRT_NETWORK", "no-such-network")

if "CRASH" in os.environ:
    (path, number) = json.loads(os.environ["CRASH"])
    module, _, name = path.rpartition(".")
    module = importlib.import_module(module)
    original = getattr(module, name)
    calls = []

    def crashing(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, crashing)

config = json.load(sys.stdin)
functions = {entry[0]: entry[2] for entry in wizard.get_finalization_steps()}
result = functions[sys.argv[1]](config)
print(json.dumps([result, config]))
