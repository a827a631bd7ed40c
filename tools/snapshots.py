"""The runs below a folder as they are now, from the files that they leave; for `tools/watch.py`."""

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.runs import Run, number, read_run, run_folders
from tools.standing import FILES, STATUSES, standing, stat_of
from trainer.text import visible

RECENT = 20
"""Recorded steps from which speed and time left are told."""


@dataclass(frozen=True)
class Snapshot:
    """One run now. None = not known (yet)."""

    name: str
    """Its folder, below the one that is watched; printable."""
    status: str
    """By `tools/standing.py`."""
    why: str
    """Of a failure or a stop; printable."""
    step: int
    """The last that was recorded."""
    total_steps: int | None
    """Of the schedule."""
    losses: list[float]
    """Of the recorded steps, nats per real token; NaN where it was not finite."""
    val_loss: float | None
    """Of the last evaluation, nats per real token."""
    tokens_per_second: float | None
    """Median of the last RECENT recorded steps."""
    seconds_left: float | None
    """Of a run that is running: steps as of late (median of the last RECENT recorded), with the time that evaluations and
    checkpoints took so far spread over all steps."""
    ranks: int | None
    """As it was last started."""
    ep_size: int | None
    """Ranks that share a pool."""
    experts: int | None
    """A layer; of a model that has some."""
    effective_experts: float | None
    """2 to the entropy of usage at the last evaluation, in the layer that has fewest."""
    dead_experts: int | None
    """Experts that no validation token chose at the last evaluation, in the layer that has most of them."""
    silent_seconds: float
    """Since its files last changed."""


class Watched:
    """The runs below a folder. What has not changed is not read again."""

    def __init__(self, root: Path):
        """Raises ValueError where there is no such folder."""
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; give one with runs in it or below it")
        self._root = root
        self._read: dict[Path, tuple[list, Run]] = {}

    def folders(self) -> list[Path]:
        """Of all runs, by name."""
        return run_folders(self._root)

    def snapshots(self) -> list[Snapshot]:
        """All runs: those that go on first, then by the time of their last line, newest first."""
        found = []
        for folder in self.folders():
            stamp = stamp_of(folder)
            if folder not in self._read or self._read[folder][0] != stamp:
                self._read[folder] = stamp, read_run(folder)
            name = "." if folder == self._root else str(folder.relative_to(self._root))
            found.append(take(self._read[folder][1], name, time.time()))
        return sorted(found, key=lambda snapshot: (STATUSES.index(snapshot.status), snapshot.silent_seconds))


def stamp_of(folder: Path) -> list[tuple[int, int] | None]:
    """Differs when a file of the run does."""
    stats = [stat_of(folder / name) for name in FILES]
    return [None if stat is None else (stat.st_mtime_ns, stat.st_size) for stat in stats]


def take(run: Run, name: str, now: float) -> Snapshot:
    """A run as it is `now`, in seconds since 1970."""
    start, train, last_eval = run.start, run.of("train"), next(reversed(run.evals), {})
    status, why, silent = standing(run, now)
    total = start.get("total_steps")
    model = None if run.experiment is None else run.experiment.model
    experts = model.some.num_experts if model is not None and model.channel_mixer == "some" else None
    layers = last_eval.get("layers", [])
    used = _numbers(layers, "experts_used")
    rates = _numbers(train[-RECENT:], "tokens_per_second")
    return Snapshot(
        name=visible(name),
        status=status,
        why=visible(why),
        step=run.step,
        total_steps=total,
        losses=[value if (value := number(record["loss"])) is not None else math.nan for record in train],
        val_loss=number(last_eval.get("val_loss")),
        tokens_per_second=statistics.median(rates) if rates else None,
        seconds_left=_seconds_left(run, total) if status == "running" else None,
        ranks=start.get("world_size", run.how.get("world_size")),
        ep_size=start.get("ep_size", run.how.get("ep_size")),
        experts=experts,
        effective_experts=min(_numbers(layers, "effective_experts"), default=None),
        dead_experts=int(experts - min(used)) if used and experts is not None else None,
        silent_seconds=max(0.0, silent),
    )


def _seconds_left(run: Run, total: int | None) -> float | None:
    """Steps left times what one takes, with its part of the evaluations and checkpoints."""
    times = _numbers(run.of("train")[-RECENT:], "seconds")
    if total is None or not times:
        return None
    first = run.of("start")[0]["step"]
    # The evaluation before the first step does not come again.
    others = sum(_numbers([record for record in run.evals if record["step"] > first], "seconds"))
    others += sum(
        _numbers([{"seconds": r.get("blocked_seconds", r.get("seconds"))} for r in run.of("checkpoint")], "seconds")
    )
    return max(0, total - run.step) * (statistics.median(times) + others / max(1, run.step - first))


def _numbers(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if number(record.get(key)) is not None]
