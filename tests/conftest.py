"""What all tests in Python share: the suite's summary line, and where results that people look at are kept."""

import pathlib

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def pytest_terminal_summary(terminalreporter):
    """Cargo's line, which tests/run adds up. A test whose setup or cleaning up broke has not passed."""
    count = {what: len(terminalreporter.stats.get(what, [])) for what in ("passed", "failed", "error", "skipped")}
    failed = count["failed"] + count["error"]
    verdict = "FAILED" if failed else "ok"
    terminalreporter.line(f"test result: {verdict}. {count['passed']} passed; {failed} failed; {count['skipped']} ignored;")


@pytest.fixture(scope="session")
def artefacts():
    directory = REPOSITORY / "target/test-artefacts"
    directory.mkdir(parents=True, exist_ok=True)
    return directory
