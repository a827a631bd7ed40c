"""What all tests share."""

import os
import signal
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # there are more workers than CPUs: a thread each; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

QUICK = (
    "tests/modeling/", "tests/trainer/data/",
    *(f"tests/trainer/test_{name}.py" for name in (
        "board", "checkpoint", "cost", "distributed", "ds_config", "evaluate", "experiment_config", "faults", "generate",
        "lock", "memory", "metrics", "placement", "plan", "published", "resume", "saver", "schedule", "served", "storage",
        "text",
    )),
    *(f"tests/test_{name}.py" for name in ("no_pickle", "readme", "watch")),
)  # fmt: skip
"""Beginnings of the paths whose tests are all marked `quick`; elsewhere single tests are, by hand."""


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
    """Our marks; and Ctrl-C and hang-up as a terminal has them, since what a script or nohup starts may ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "long: takes minutes; runs with --long only")
    config.addinivalue_line("markers", "quick: of the inner loop; `-m quick` runs these alone, in two minutes at most")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """Of `-n auto`, which `make test` gives."""
    from tests.side_by_side import number_of_workers

    return number_of_workers(config.args, config.option.markexpr)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Ours, unless another one was asked for with `--dist`."""
    from tests.side_by_side import UnitScheduling

    return UnitScheduling(config, log) if config.option.dist == "load" else None


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items) -> None:
    """Skip what takes minutes where it was not asked for, mark what is quick; side by side begin with the longest."""
    if hasattr(config, "workerinput"):
        from tests.side_by_side import place

        items.sort(key=lambda item: place(item.nodeid.split("::")[0]))
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker("quick")
