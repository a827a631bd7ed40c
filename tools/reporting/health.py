"""Whether a run is done, and what went wrong in it, by rules that the page prints.

Shapes: N records of steps.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.reporting.curves import column
from tools.runs import Run, number
from tools.standing import standing

WINDOW, FEWEST = 51, 10
"""Recorded steps from whose median a spike is told: at most, and at least."""
STATUSES = {
    "done": "the whole schedule was run and measured",
    "running": "no end yet, and neither gone nor silent for longer than the trainer bears",
    "partial": "stopped before its end, or failed",
    "diverged": "its last loss is not finite, or over its first validation loss by more than 0.5 nats",
    "empty": "no step and no evaluation was recorded",
    "unreadable": "its config.yaml or metrics.jsonl cannot be read",
}
"""Each status and its rule."""
RULES = (
    f"loss or gradients not finite; steps skipped; training loss more than 1 nat above the median of the {WINDOW} recorded "
    f"steps before it (of those that there are, if {FEWEST} or more); gradient norm over 10 times theirs; at the last "
    "evaluation more than 10 % of a layer's experts unused, or fewer effective experts than 1.5 top_k, or over twice the "
    "mean load at one rank; going back to a checkpoint; failures; lines that are no records"
)
"""What counts as an anomaly, for readers."""


@dataclass(frozen=True)
class Anomaly:
    """One thing that went wrong."""

    kind: str
    """Its name."""
    steps: str
    """When: `step 3`, `steps 3 to 7`; empty where it has no step."""
    detail: str = ""
    """How much."""

    @property
    def text(self) -> str:
        """All of it in a line."""
        return " ".join(part for part in (self.kind, self.detail, f"({self.steps})" if self.steps else "") if part)


def status(run: Run) -> str:
    """One of STATUSES."""
    if run.experiment is None and (run.failure or run.records):
        return "unreadable"
    train = run.of("train")
    if not train and not run.evals:
        return "empty"
    if _is_diverged(train, run.evals):
        return "diverged"
    if run.finished:
        return "done"
    return "running" if standing(run, time.time()).status == "running" else "partial"


def _is_diverged(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> bool:
    latest = [number(records[-1].get(key)) for records, key in ((train, "loss"), (evals, "val_loss")) if records]
    first = number(evals[0].get("val_loss")) if evals else None
    return None in latest or (first is not None and max(latest) > first + 0.5)


def anomalies(run: Run) -> list[Anomaly]:
    """What went wrong, in order of kind."""
    found = []
    if run.failure:
        found.append(Anomaly("failed", "", run.failure))
    if run.unreadable_lines:
        found.append(Anomaly("lines that are no records", "", str(run.unreadable_lines)))
    train = run.of("train")
    steps_N, losses_N, norms_N = (column(train, key) for key in ("step", "loss", "grad_norm"))
    found += _stretches("not finite: loss", steps_N, ~np.isfinite(losses_N))
    found += _stretches("not finite: gradients", steps_N, ~np.isfinite(norms_N) & np.isfinite(losses_N))
    found += _stretches("loss spike", steps_N, losses_N > _median_before(losses_N) + 1, losses_N)
    found += _stretches("gradient spike", steps_N, norms_N > 10 * _median_before(norms_N), norms_N)
    skipped = max((number(record.get("skipped")) or 0 for record in train), default=0)
    if skipped:
        found.append(Anomaly("skipped steps", "", f"{skipped:.0f}"))
    found += [Anomaly("rollback", f"step {r['step']}", f"to step {r.get('to')}") for r in run.of("rollback")]
    bad = [record for record in run.evals if number(record.get("val_loss")) is None]
    found += [Anomaly("not finite: validation loss", f"step {record['step']}") for record in bad]
    return found + (_routing(run, run.evals[-1]) if run.evals and run.experiment and run.evals[-1]["step"] else [])


def _routing(run: Run, last: dict[str, Any]) -> list[Anomaly]:
    some, when, found = run.experiment.model.some, f"step {last['step']}", []
    for layer in last["layers"]:
        where = f"layer {layer.get('layer')}:"
        used, effective, load = (number(layer.get(k)) for k in ("experts_used", "effective_experts", "load_max_over_mean"))
        if used is not None and used < 0.9 * some.num_experts:
            found.append(Anomaly("dead experts", when, f"{where} {some.num_experts - used:.0f} of {some.num_experts}"))
        if effective is not None and effective < 1.5 * some.top_k < some.num_experts / 2:
            found.append(Anomaly("collapsed routing", when, f"{where} {effective:.1f} effective experts"))
        if load is not None and load > 2:
            found.append(Anomaly("load skew", when, f"{where} {load:.2f} of the mean"))
    return found


def _median_before(values_N: np.ndarray) -> np.ndarray:
    """(N,) the median of those of the WINDOW values before each that are finite; NaN where there are fewer than FEWEST."""
    if not len(values_N):
        return np.zeros(0)
    finite_N = np.where(np.isfinite(values_N), values_N, np.nan)
    padded = np.pad(finite_N, (WINDOW, 0), constant_values=np.nan)[:-1]
    sorted_NW = np.sort(np.lib.stride_tricks.sliding_window_view(padded, WINDOW), axis=1)  # NaN come last
    counts_N, rows_N = np.isfinite(sorted_NW).sum(1), np.arange(len(values_N))
    medians_N = (sorted_NW[rows_N, np.maximum(counts_N - 1, 0) // 2] + sorted_NW[rows_N, counts_N // 2]) / 2
    return np.where(counts_N >= FEWEST, medians_N, np.nan)


def _stretches(kind: str, steps_N: np.ndarray, is_bad_N: np.ndarray, values_N: np.ndarray | None = None) -> list[Anomaly]:
    """One anomaly for each row of bad records, with the largest value of it."""
    found, bad = [], np.flatnonzero(is_bad_N)
    for part in np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1) if len(bad) else []:
        first, last = steps_N[part[0]], steps_N[part[-1]]
        when = f"step {first:.0f}" if first == last else f"steps {first:.0f} to {last:.0f}"
        found.append(Anomaly(kind, when, "" if values_N is None else f"{values_N[part].max():.4g}"))
    return found
