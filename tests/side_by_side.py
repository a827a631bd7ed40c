"""How `make test` spreads the suite over workers (pytest-xdist): which tests stay together, and which begin first.

The tests of a file run in one worker, one after the other, so that they share the file's fixtures. A test that needs another
file's expensive fixture, or a machine's resource to itself, goes into a unit of `TOGETHER`.
"""

import os
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "tests/cluster/": "SLURM",  # one cluster for all
    "tests/page/": "reports",  # the ten runs of `tests/reports.py`
    "tests/test_report.py": "reports",
}
"""Beginnings of paths, and the unit that their tests make up."""
FIRST = [
    "SLURM",
    "tests/trainer/test_run.py",
    "reports",
    "tests/test_bench.py",
    "tests/test_reproduce.py",
    "tests/trainer/test_watchdog.py",
    "tests/trainer/test_invariance.py",
    "tests/test_inputs_data.py",
    "tests/test_chaos.py",
    "tests/trainer/test_engine.py",
    "tests/test_study.py",
    "tests/test_inputs_settings.py",
    "tests/trainer/test_numerical_faults.py",
    "tests/trainer/test_controls.py",
]
"""Units that take longest, in the order in which they begin: for one that began last all other workers would wait."""
MOST_WORKERS = 8
"""More would wait for the longest unit."""
FILES_A_WORKER = 4
"""Fewer are done before another worker has imported what it needs."""


def unit(path: str) -> str:
    """The unit that the tests of a file (from the repository's folder on) belong to."""
    return next((name for beginning, name in TOGETHER.items() if path.startswith(beginning)), path)


def number_of_workers(arguments: list[str], marks: str) -> int:
    """Twice as many as CPUs, since tests wait as much as they compute; 0 = this process alone, for a few files.

    Args:
        arguments: files, folders and tests that pytest was asked for.
        marks: those of `-m`; quick tests hardly wait.
    """
    files = set()
    for argument in arguments:
        path = Path(argument.split("::")[0]).resolve()
        files |= set(path.rglob("test_*.py")) if path.is_dir() else {path}
    cpus = len(os.sched_getaffinity(0))
    workers = min(cpus if marks == "quick" else 2 * cpus, MOST_WORKERS, len(files) // FILES_A_WORKER)
    return workers if workers > 1 else 0


def place(path: str) -> int:
    """When the tests of a file are dealt out: those of `FIRST` in its order, then all others."""
    return FIRST.index(unit(path)) if unit(path) in FIRST else len(FIRST)


class UnitScheduling(LoadScopeScheduling):
    """Deals out whole units in the order in which they were collected."""

    def __init__(self, config, log=None) -> None:
        config.option.loadscopereorder = False  # would begin with the unit of the most tests
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid.split("::")[0])
