"""What all tests share."""

import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Tokenised data of this session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def report_runs(tmp_path_factory) -> Path:
    """The runs of `tests/reports.py`."""
    from tests.reports import make_runs

    return make_runs(tmp_path_factory.mktemp("reports"))


def pytest_addoption(parser) -> None:
    """`--long`: also what takes minutes a test."""
    parser.addoption("--long", action="store_true", help="also run tests that take minutes each")


def pytest_configure(config) -> None:
    """The mark of such tests; and Ctrl-C as a terminal has it, since what a script starts in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "long: takes minutes; runs with --long only")


def pytest_collection_modifyitems(config, items) -> None:
    """Skip them where they were not asked for."""
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
