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


def step_seconds(run: Run) -> np.ndarray:
    """(N,) float64 of every training record, the seconds of the steps since the one before, which `log.every` may have left
    out: as many as its own step took, each. NaN where that is not known."""
    train = run.of("train")
    steps_N = column(train, "step")
    covered_N = np.maximum(np.diff(steps_N, prepend=next((record["step"] for record in run.of("start")), 0)), 0)
    return column(train, "seconds") * covered_N


def clock(run: Run) -> dict[str, np.ndarray]:
    """Of every record of a step or an evaluation, in order: `step`, real `tokens` so far and `seconds` of work so far."""
    records = run.of("train") + run.evals
    steps = column(records, "step")
    order = np.argsort(steps, kind="stable")
    tokens = np.fmax.accumulate(column(records, "tokens")[order]) if records else np.zeros(0)
    seconds = np.concatenate([step_seconds(run), column(run.evals, "seconds")])[order]
    return {"step": steps[order], "tokens": np.nan_to_num(tokens), "seconds": np.cumsum(np.nan_to_num(seconds))}


def curves(run: Run) -> dict[str, Any]:
    """`train` (the points kept), `is_thinned` (whether those are not all), `means` (of up to BUCKETS equal stretches of the
    schedule, so that those of several seeds are the same; None where it is short) and `eval`: lists of step, tokens, seconds
    and loss (None = not finite); `eval` also has `rate`, the median of tokens/s over the steps so far."""
    times, train, evals = clock(run), run.of("train"), column(run.evals, "step")
    losses_N, steps_N, rates_N = (column(train, key) for key in ("loss", "step", "tokens_per_second"))
    kept_P = extremes(losses_N)
    rates = [_median(rates_N[: np.searchsorted(steps_N, step, side="right")]) for step in evals]
    return {
        "train": _points(times, steps_N[kept_P], losses_N[kept_P]),
        "is_thinned": len(kept_P) < len(train),
        "means": _means(times, steps_N, losses_N, max(run.start.get("total_steps", 0), run.step)),
        "eval": _points(times, evals, column(run.evals, "val_loss"), digits=17) | {"rate": plain(np.array(rates))},
    }


def _means(times: dict[str, np.ndarray], steps_N: np.ndarray, losses_N: np.ndarray, total: int) -> dict[str, Any] | None:
    if total <= 2 * BUCKETS:
        return None
    width = math.ceil(total / BUCKETS)
    stretches_N = (steps_N - 1) // width
    stretches_P, first_P = np.unique(stretches_N, return_index=True)
    # A value that is not finite makes its stretch's mean so, too: gaps stay gaps.
    means_P = [part.mean() for part in np.split(losses_N, first_P[1:])] if len(losses_N) else []
    return _points(times, stretches_P * width + (width + 1) / 2, np.array(means_P))


def _median(values_N: np.ndarray) -> float:
    finite = values_N[np.isfinite(values_N)]
    return float(np.median(finite)) if len(finite) else math.nan


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


def _points(
    times: dict[str, np.ndarray], steps_P: np.ndarray, losses_P: np.ndarray, digits: int = 8
) -> dict[str, list[float | None]]:
    last = np.searchsorted(times["step"], steps_P, side="right") - 1
    steps = plain(steps_P, 10)
    return {
        "step": steps,
        "tokens": plain(times["tokens"][last], 12) if len(last) else [],
        "seconds": plain(times["seconds"][last], 7) if len(last) else [],
        "loss": plain(losses_P, digits),
    }
