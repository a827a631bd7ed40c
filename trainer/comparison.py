"""Settings compared: what may differ between two experiments of one curve."""

from typing import Any

# What may differ between a checkpoint and the run that resumes it, since no number of the curve depends on it. (After NaN
# it does: evaluations and checkpoints that are due make the checkpoints that `train.on_nan = rollback` goes back to.)
# The data's path may change; its content is compared by hash.
FREE_KEYS = {
    "name", "data.path", "data.cache_dir", "data.allow_fewer", "train.max_micro_batch", "train.eval_every",
    "train.deterministic", "train.max_skipped", "train.on_nan",
}  # fmt: skip
FREE_SECTIONS = ("parallel.", "checkpoint.", "log.", "sample.", "faults.")


def differing_keys(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key path to both values wherever two resolved experiments differ in what may change a curve; sorted by key."""
    theirs, ours = _flatten(theirs), _flatten(ours)
    return {
        key: (theirs.get(key), ours.get(key))
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
