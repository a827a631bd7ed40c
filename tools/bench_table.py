"""What all benchmarks share: contenders that take turns, and a table of what they took."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.runfolder import git_commit

SPREAD = {"ms": ".1f", "ms_min": ".1f", "ms_max": ".1f"}
"""Columns of `spread`."""


class BenchmarkFailed(Exception):
    """Why a process that was to be measured did not get to its end, in one line."""


@dataclass
class Table:
    """What one benchmark measured."""

    name: str
    """The subcommand."""
    conditions: dict[str, Any]
    """What holds for all rows."""
    columns: dict[str, str]
    """Key of a row's value -> format."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Keys without a value are left out."""
    notes: list[str] = field(default_factory=list)
    """Who is missing and why, and what a figure does not show."""

    def text(self) -> str:
        """Right-aligned columns; the first is the contender's name and left-aligned."""
        lines = [[key.replace("_", " ") for key in self.columns]]
        for row in self.rows:
            lines.append([format(row[key], form) if key in row else "" for key, form in self.columns.items()])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        conditions = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        printed = [f"{self.name}: {conditions}"]
        for first, *others in lines:
            cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
            printed.append("  ".join(cells).rstrip())
        return "\n".join([*printed, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the columns' formats."""
        values = asdict(self)
        del values["columns"]
        return values


def measure(contenders: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every run of every contender after one warm-up each.

    They take turns, so that a machine whose speed drifts treats them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            synchronise(device)
            began = time.perf_counter()
            run()
            synchronise(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def choose_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What figures of record must name."""
    versions = {"torch": str(torch.__version__), "commit": git_commit()}
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), **versions}


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
