"""Variants: runs that differ in nothing but the seed; their losses at one step, in pairs with those of a baseline."""

import json
import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tools.reporting.table import Entry
from tools.runs import Run, number
from tools.study import paired
from trainer.checkpoint import differing_keys

TOLERANCE = 0.05
"""An evaluation counts for a budget that it misses by no more than this part of it."""


@dataclass
class Variant:
    """Runs of one experiment over its seeds."""

    name: str
    """As shown, distinct."""
    entries: list[Entry]
    """Its runs."""


def variants(entries: list[Entry]) -> list[Variant]:
    """In the order of their first runs; names the runs' variants."""
    found: dict[str, Variant] = {}
    for entry in entries:
        found.setdefault(_settings_key(entry), Variant("", [])).entries.append(entry)
    taken: set[str] = set()
    for variant in found.values():
        first = variant.entries[0].label
        short = re.sub(r"[/_.-]*seed[_=-]?\d+$", "", first) or first
        variant.name = short if short not in taken else first
        taken.add(variant.name)
        for entry in variant.entries:
            entry.tag = entry.values["tag"] = variant.name
    return list(found.values())


def _settings_key(entry: Entry) -> str:
    """Equal for two runs when they differ in nothing that changes a curve but the seed."""
    run = entry.run
    if run.experiment is None:
        return entry.label
    settings = {key: ours for key, (_, ours) in differing_keys({}, run.experiment.to_dict()).items() if key != "seed"}
    return json.dumps([settings, run.start.get("precision")], sort_keys=True)


def validation_data(run: Run) -> list[Any] | None:
    """What tells the data apart on which a run was measured; None where it says nothing of it."""
    held = (run.how.get("data") or {}).get("validation") if isinstance(run.how, dict) else None
    return [held.get(key) for key in ("documents", "tokens", "bytes")] if isinstance(held, dict) else None


def check_same_data(entries: list[Entry]) -> list[str]:
    """One line for each set of runs of a seed whose validation data are the same, where one seed has several; else none.

    Runs of other seeds may have other data: where the source is split at random, the seed does it.
    """
    sets: dict[str, list[Entry]] = {}
    for entry in entries:
        held = validation_data(entry.run)
        if held is not None and entry.run.evals and entry.run.experiment is not None:
            sets.setdefault(json.dumps([entry.run.experiment.seed, held]), []).append(entry)
    seeds = [json.loads(key)[0] for key in sets]
    return [_describe(members, *json.loads(key)) for key, members in sets.items() if seeds.count(json.loads(key)[0]) > 1]


def _describe(members: list[Entry], seed: int, held: list[Any]) -> str:
    others = f" and {len(members) - 1} more" if len(members) > 1 else ""
    sizes = ", ".join(f"{value} {unit}" for value, unit in zip(held, ("documents", "tokens", "bytes"), strict=True))
    return f"{members[0].label}{others} of seed {seed}: {sizes}"


def loss_at(run: Run, step: int) -> float | None:
    """The loss of the last evaluation up to `step`, if it is not more than TOLERANCE before it."""
    near = [record for record in run.evals if (1 - TOLERANCE) * step <= record["step"] <= step]
    return number(near[-1]["val_loss"]) if near else None


def common_step(entries: list[Entry]) -> int | None:
    """The step after the first at which most runs have a loss, of those that are done if any is; the latest of several."""
    entries = [entry for entry in entries if entry.values["status"] == "done"] or entries
    steps = {record["step"] for entry in entries for record in entry.run.evals if record["step"] > 0}
    counts = {step: sum(loss_at(entry.run, step) is not None for entry in entries) for step in steps}
    return max(steps, key=lambda step: (counts[step], step), default=None)


def comparison(found: list[Variant], baseline: Variant, step: int) -> list[dict[str, Any]]:
    """Each variant at a step, best first: `name`, `seeds`, `mean`, `low`, `high`, and `difference` and `half` (of the 95 %
    interval) of the pairs of equal seed and validation data; None = missing."""
    reference, rows = _losses(baseline, step), []
    for variant in found:
        ours = _losses(variant, step)
        losses = [loss for (loss, _) in ours.values()]
        pairs = None
        if variant is not baseline:
            shared = {s for s in ours.keys() & reference.keys() if ours[s][1] == reference[s][1]}
            pairs = paired(*({s: {"val_loss": side[s][0]} for s in shared} for side in (ours, reference)))
        rows.append(
            {
                "name": variant.name,
                "seeds": len(losses),
                "mean": fmean(losses) if losses else None,
                "low": min(losses, default=None),
                "high": max(losses, default=None),
                "difference": pairs[0] if pairs else None,
                "half": pairs[1] if pairs else None,
            }
        )
    return sorted(rows, key=lambda row: (row["mean"] is None, row["mean"]))


def _losses(variant: Variant, step: int) -> dict[int, tuple[float, list[Any] | None]]:
    """Seed to loss and validation data; of several runs of a seed the first counts."""
    found: dict[int, tuple[float, list[Any] | None]] = {}
    for entry in variant.entries:
        loss = loss_at(entry.run, step)
        if loss is not None and entry.run.experiment is not None:
            found.setdefault(entry.run.experiment.seed, (loss, validation_data(entry.run)))
    return found
