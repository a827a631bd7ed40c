"""Whether a run goes on, told from the files that it leaves; the one rule of `tools/watch.py` and `tools/report.py`.

A run is
- `done` or `stopped` where the last line of its `metrics.jsonl` is an end: that of the schedule, or one before it;
- `failed` where a tool has noted so, where its files cannot be read, or where the process that holds its lock is of this
  machine and gone;
- `failed?` where there is no end, and no line for `parallel.timeout_minutes`, after which the trainer ends a run that hangs,
  nor for three times as long as its longest step, evaluation or checkpoint took;
- `running` else.
"""

import os
from pathlib import Path
from typing import NamedTuple

from tools.runs import FAILED, Run, number
from trainer.config import ParallelConfig
from trainer.lock import NAME as LOCK
from trainer.lock import is_gone

STATUSES = ("running", "failed?", "failed", "stopped", "done")
"""In the order in which they are shown."""
FILES = ("config.yaml", "metrics.jsonl", FAILED)
"""What a run writes while it goes on."""


class Standing(NamedTuple):
    """Where a run stands."""

    status: str
    """One of STATUSES."""
    why: str
    """Of a failure or a stop."""
    silent_seconds: float
    """Since its files last changed."""


def standing(run: Run, now: float) -> Standing:
    """By the rule above, at `now`, in seconds since 1970."""
    silent = max(0.0, now - max((stat.st_mtime for name in FILES if (stat := stat_of(run.folder / name))), default=now))
    return Standing(*_status(run, silent), silent)


def stat_of(path: Path) -> os.stat_result | None:
    """None where there is no such file, or none that may be seen."""
    try:
        return path.stat()
    except OSError:
        return None


def _status(run: Run, silent: float) -> tuple[str, str]:
    if run.failure:
        return "failed", run.failure
    last = run.records[-1] if run.records else {}
    if last.get("event") == "end":
        if last.get("finished"):
            return "done", ""
        return "stopped", f"by {last['stopped_by']}" if "stopped_by" in last else "as --max_steps asked"
    if _is_abandoned(run.folder):
        return "failed", "its process is gone, without an end in metrics.jsonl"
    parallel = ParallelConfig() if run.experiment is None else run.experiment.parallel
    longest = max((number(record.get("seconds")) or 0 for record in run.records), default=0)
    if silent > max(60 * parallel.timeout_minutes, 3 * longest):
        return "failed?", f"no end, and no line for {silent / 3600:.1f} hours"
    return "running", ""


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that held the run's lock was killed or failed."""
    try:
        return is_gone((folder / LOCK).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False
