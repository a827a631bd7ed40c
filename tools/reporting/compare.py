"""Variants: runs that differ in nothing but the seed; their losses at one step, in pairs with those of a baseline."""

import json
import re
from dataclasses import dataclass
from itertools import chain, count
from statistics import fmean
from typing import Any

from tools.reporting.table import Entry
from tools.runs import Run, number
from tools.study import paired
from trainer.comparison import differing_keys

TOLERANCE = 0.05
"""An evaluation counts for a budget that it misses by no more than this part of it."""
UNITS = ("documents", "tokens", "bytes")
"""In which a run counts its validation split."""
HASHES = {"validation": "validation_sha256", "tokenizer": "tokenizer_sha256"}
"""What a run's config.yaml tells its data by."""


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
        names = chain((short, first), (f"{first} ({number})" for number in count(2)))
        variant.name = next(name for name in names if name not in taken)
        taken.add(variant.name)
        for entry in variant.entries:
            entry.tag = entry.values["tag"] = variant.name
    return list(found.values())


def _settings_key(entry: Entry) -> str:
    """Equal for runs that differ in nothing that changes a curve but the seed, and that were measured on the same data."""
    run = entry.run
    if run.experiment is None:
        return entry.label
    settings = {key: ours for key, (_, ours) in differing_keys({}, run.experiment.to_dict()).items() if key != "seed"}
    return json.dumps([settings, run.start.get("precision"), entry.data], sort_keys=True)


def sort_by_data(entries: list[Entry]) -> list[str]:
    """Number the sets of runs whose validation data are the same, in `entry.data`; a line for each set that has losses where
    several have, else none.

    The data of two runs are the same where their hashes are; where a run has none, where their counts and, with other
    seeds, their sources are. The built-in stories are others for every seed: there, runs of other seeds belong together
    where all settings that make the data are the same, and losses are compared seed by seed.
    """
    sets: list[list[Entry]] = []
    for entry in entries:
        if entry.run.experiment is None or _counts(entry.run) is None:
            continue
        matching = (place for place, members in enumerate(sets) if all(_is_same(m.run, entry.run) for m in members))
        entry.data = next(matching, len(sets))
        sets += [[]] if entry.data == len(sets) else []
        sets[entry.data].append(entry)
    measured = [[entry for entry in members if entry.run.evals] for members in sets]
    measured = [members for members in measured if members]
    return [_describe(members) for members in measured] if len(measured) > 1 else []


def _counts(run: Run) -> list[Any] | None:
    """Of the validation split; None where the run says nothing of it."""
    held = run.how.get("data", {}).get("validation")
    return None if held is None else [held.get(unit) for unit in UNITS]


def _is_same(one: Run, other: Run) -> bool:
    data, is_one_seed = [run.experiment.data for run in (one, other)], one.experiment.seed == other.experiment.seed
    if not is_one_seed and {of.name for of in data} == {"stories"}:
        return _making(one) == _making(other)
    hashes = [run.how.get("validation_sha256") for run in (one, other)]
    if None not in hashes:
        return hashes[0] == hashes[1]
    return _counts(one) == _counts(other) and (is_one_seed or len({(of.name, of.path) for of in data}) == 1)


def _making(run: Run) -> dict[str, Any]:
    """The settings that make the data of a seed."""
    kept = {key: value for key, value in vars(run.experiment.data).items() if key not in ("cache_dir", "allow_fewer")}
    return kept | {"vocab_size": run.experiment.model.vocab_size}


def _describe(members: list[Entry]) -> str:
    run, others = members[0].run, f" and {len(members) - 1} more" if len(members) > 1 else ""
    seeds = sorted({entry.run.experiment.seed for entry in members})
    sizes = [f"{value} {unit}" for value, unit in zip(_counts(run), UNITS, strict=True)]
    hashes = [f"{name} {run.how[key][:12]}" for name, key in HASHES.items() if run.how.get(key)]
    data = run.experiment.data
    source = data.name if data.path is None else f"{data.name} {data.path}"
    many = "s" if len(seeds) > 1 else ""
    return f"{members[0].label}{others} of seed{many} {', '.join(map(str, seeds))}: {', '.join([source, *sizes, *hashes])}"


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


def _losses(variant: Variant, step: int) -> dict[int, tuple[float, int | None]]:
    """Seed to loss and `Entry.data`; of several runs of a seed the first counts."""
    found: dict[int, tuple[float, int | None]] = {}
    for entry in variant.entries:
        loss = loss_at(entry.run, step)
        if loss is not None and entry.run.experiment is not None:
            found.setdefault(entry.run.experiment.seed, (loss, entry.data))
    return found
