"""A run's curves, thinned so that pages stay small and no extreme is lost.

Shapes: N records, P points kept.
"""

import math
from typing import Any

import numpy as np

from tools.runs import Run, number

BUCKETS = 400
"""A curve of more than twice as many records is cut into so many stretches."""
MOST_EVALUATIONS = 200
"""Most columns of a heat map over steps."""


def column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """(N,) float64, NaN where a record has no finite number."""
    values = [value if type(value := record.get(key)) is float else number(value) for record in records]
    values_N = np.array(values, dtype=np.float64)  # None becomes NaN
    return np.where(np.isfinite(values_N), values_N, np.nan)


def clock(run: Run) -> dict[str, np.ndarray]:
    """Of every record of a step or an evaluation, in order: `step`, real `tokens` so far and `seconds` of work so far."""
    records = run.of("train") + run.evals
    records.sort(key=lambda record: record["step"])
    tokens = np.fmax.accumulate(column(records, "tokens")) if records else np.zeros(0)
    seconds = np.cumsum(np.nan_to_num(column(records, "seconds"))) if records else np.zeros(0)
    return {"step": column(records, "step"), "tokens": np.nan_to_num(tokens), "seconds": seconds}


def curves(run: Run) -> dict[str, Any]:
    """`train` (the points kept), `means` (of stretches, what smoothing starts from; None where all are kept) and `eval`:
    lists of step, tokens, seconds and loss (None = not finite); and `records`, how many training records there are."""
    times, train = clock(run), run.of("train")
    losses_N, steps_N = column(train, "loss"), column(train, "step")
    kept_P = extremes(losses_N)
    stretches = [part for part in np.array_split(np.arange(len(train)), min(BUCKETS, max(len(train), 1))) if len(part)]
    means = [np.nanmean(losses_N[part]) if np.isfinite(losses_N[part]).any() else np.nan for part in stretches]
    middles = np.array([steps_N[part].mean() for part in stretches])
    return {
        "records": len(train),
        "train": _points(times, steps_N[kept_P], losses_N[kept_P]),
        "means": _points(times, middles, np.array(means)) if len(train) > 2 * BUCKETS else None,
        "eval": _points(times, column(run.evals, "step"), column(run.evals, "val_loss")),
    }


def extremes(values_N: np.ndarray) -> np.ndarray:
    """(P,) places to keep: all of a short curve; else first and last, and of each stretch the smallest, the largest and one
    that is not finite."""
    if len(values_N) <= 2 * BUCKETS:
        return np.arange(len(values_N))
    kept = {0, len(values_N) - 1}
    for part in np.array_split(np.arange(len(values_N)), BUCKETS):
        finite = part[np.isfinite(values_N[part])]
        if len(finite) < len(part):
            kept.add(int(part[~np.isfinite(values_N[part])][0]))
        if len(finite):
            kept |= {int(finite[values_N[finite].argmin()]), int(finite[values_N[finite].argmax()])}
    return np.array(sorted(kept))


def spread_out(items: list[Any], most: int) -> list[Any]:
    """At most so many of the items: the first, the last and evenly between."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def plain(values_N: np.ndarray, digits: int = 6) -> list[float | None]:
    """For JSON: so many significant digits, None for NaN."""
    return [None if not math.isfinite(value) else float(f"{value:.{digits}g}") for value in values_N.tolist()]


def _points(times: dict[str, np.ndarray], steps_P: np.ndarray, losses_P: np.ndarray) -> dict[str, list[float | None]]:
    last = np.searchsorted(times["step"], steps_P, side="right") - 1
    steps = plain(steps_P, 10)
    return {
        "step": steps,
        "tokens": plain(times["tokens"][last], 12) if len(last) else [],
        "seconds": plain(times["seconds"][last], 7) if len(last) else [],
        "loss": plain(losses_P, 8),
    }
