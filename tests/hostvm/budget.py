"""Whether there is time for all checks of `make test-host`, and which are made when there is not.

Numbers of seconds are those of a quick machine: two cores that emulate a processor at full speed, with nothing beside.
"""

import pathlib

# From the moment when the host is up and its disk is filled until the last check has ended.
ALL_SECONDS = 420.0
ESSENTIAL_SECONDS = 200.0
# A machine that is busy now may be busier in a minute.
MARGIN = 1.3


def needed(factor):
    """Seconds that all checks need on a machine that takes `factor` times what a quick one takes."""
    return ALL_SECONDS * factor * MARGIN


def fits(factor, left):
    return needed(factor) <= left


def essential():
    """The names of the checks that matter most."""
    lines = (pathlib.Path(__file__).parent / "essential").read_text().splitlines()
    return [name for line in lines if (name := line.partition("#")[0].strip())]
