"""What the runs of `tools/reproduce.py` measured, beside what was published: one row for each experiment and control.

A row depends on the runs' folders alone, so it can be made at any time, also while runs go on or after they failed.
"""

import math
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from modeling.key_rules import RULE_PRESETS, KeyRules
from tools.runs import Run
from trainer.comparison import differing_keys
from trainer.config import Experiment, load_experiment
from trainer.published import EpochResult, PublishedRun, published_ids, published_results

SMALL = {"vocab_size": 1024, "d_model": 64, "num_layers": 2, "num_heads": 2}
"""The model keys by which a run of small scale is known."""
TOLERANCE = 0.02
"""Largest relative difference from a published loss that counts as the same."""
MEASURES = (
    "published_loss", "published_ppl", "val_loss", "val_ppl", "nats_per_story", "bits_per_byte",
    "usage_gini", "gini_with_padding", "gini", "usage_entropy_bits", "entropy_bits_with_padding", "entropy_bits",
)  # fmt: skip
"""What is taken from an evaluation. `published_loss` follows the published convention; Gini and entropy are those of the
middle layer: of the usage average (the published measure), of all routed tokens, of real tokens."""


def changed_settings(asked: Experiment, run: Experiment, free: tuple[str, ...] = ()) -> list[str]:
    """The keys in which two experiments differ and that may change numbers; `free` ones are let pass."""
    return [key for key in differing_keys(asked.to_dict(), run.to_dict()) if key not in free]


def measure(evaluation: dict[str, Any], experiment: Experiment) -> dict[str, float | None]:
    """The MEASURES of one evaluation; None = it has none, or one that is not finite."""
    layers, layer = evaluation["layers"], experiment.model.num_layers // 2
    values = {**evaluation, **(layers[layer] if layers else {})}
    names = ("val_loss_with_padding", "val_loss_batch_mean", "val_loss")
    loss = values[next(name for name in names if name in values)]
    values |= {"published_loss": loss, "published_ppl": None if loss is None else math.exp(min(loss, 700.0))}
    if evaluation["step"] == 0:
        values |= {"usage_gini": None, "usage_entropy_bits": None}  # zeros, as no token was counted yet
    return {name: values.get(name) for name in MEASURES}


def rule_name(rules: KeyRules) -> str:
    """The preset that the rules are, or `own`."""
    return next((name for name in RULE_PRESETS if KeyRules.preset(name) == rules), "own")


def shortages(run: Run) -> list[str]:
    """`train 9,000 of 10,000` where the source had fewer documents than the run asks for."""
    data, texts = run.how.get("data", {}), []
    for split, key in (("train", "train_documents"), ("validation", "val_documents")):
        wanted, has = getattr(run.experiment.data, key), data.get(split, {}).get("documents")
        if has is not None and split == "train":
            has += data["dropped"]["overlap"]  # left out on purpose, not lacking
        if wanted and has is not None and has < wanted:
            texts.append(f"{split} {has:,} of {wanted:,}")
    wanted, has = run.experiment.data.tokenizer_documents, data.get("tokenizer_documents")
    if wanted and has is not None and has < wanted:
        texts.append(f"tokenizer {has:,} of {wanted:,}")
    return texts


def describe(run: Run) -> dict[str, Any]:
    """Where a run stands, what it took, with what and how it was run."""
    train, metrics = run.of("train"), run.folder / "metrics.jsonl"
    last = run.evals[-1] if run.evals else None
    return {
        "seed": run.seed,
        "folder": str(run.folder),
        "step": run.step,
        "total_steps": run.start.get("total_steps"),
        "finished": run.finished,
        "failure": run.failure,
        "last_evaluation": {"step": last["step"], **measure(last, run.experiment)} if last else None,
        "wall_seconds": run.seconds,
        "recorded_steps": len(train),  # those that wall_seconds covers; all, unless log.every says otherwise
        "tokens_per_second_median": statistics.median(r["tokens_per_second"] for r in train) if train else None,
        "date": datetime.fromtimestamp(metrics.stat().st_mtime, UTC).isoformat("T", "seconds") if run.records else None,
        "precision": run.start.get("precision"),
        **run.how,
    }


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, smallest and largest; None where there is no value or one is missing."""
    if not values or None in values:
        return None
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


class Row:
    """The runs of one experiment under one control over their seeds.

    Finished seeds count; where none is finished, all that have evaluated, at a step that all of them have reached.
    """

    def __init__(self, experiment_id: str, control: str | None, runs: list[Run]):
        self.id, self.control, self.runs = experiment_id, control, runs
        self.asked = load_experiment(experiment_id, [f"control={control}"] if control else [])
        self.published: PublishedRun | None = published_results(experiment_id) if experiment_id in published_ids() else None
        self.counted = [run for run in runs if run.finished and run.evals] or [run for run in runs if run.evals]
        self.ran = next((run.experiment for run in self.counted or runs if run.experiment is not None), self.asked)
        self.is_small = all(getattr(self.ran.model, key) == value for key, value in SMALL.items())
        self.changed = changed_settings(self.asked, self.ran, free=("seed", "data.allow_fewer"))
        self.mixed = self._differences()
        has_reference = self.published and control is None and not self.is_small and not self.mixed
        self.reference: list[EpochResult] = self.published.epochs if has_reference else []
        self.records, self.result = self._choose()
        self.measured = self._spreads(self.records)
        loss = self.measured["published_loss"]
        self.difference = loss["mean"] / self.result.val_loss - 1 if self.result and loss else None
        """Of the measured loss from the published one, relative."""

    def _differences(self) -> list[str]:
        """What differs between the seeds besides the seed, so that no mean over them has a meaning."""
        seeds, free = self.counted, ("seed", "data.allow_fewer")
        keys = {key for run in seeds for key in changed_settings(seeds[0].experiment, run.experiment, free)}
        if len({run.start.get("precision") for run in seeds}) > 1:
            keys.add("precision")
        return sorted(keys)

    def _choose(self) -> tuple[list[dict[str, Any]], EpochResult | None]:
        """Each counted run's evaluation, and the published one of the same epoch: the last that all have."""
        runs = self.counted
        if not runs or self.mixed:
            return [], None
        for result in reversed(self.reference):
            records = [run.at_epoch(result.epoch) for run in runs]
            if all(records):
                return records, result
        if all(run.finished for run in runs):
            return [run.evals[-1] for run in runs], None
        step = max(set.intersection(*({record["step"] for record in run.evals} for run in runs)), default=None)
        return [record for run in runs for record in run.evals if record["step"] == step], None

    def _spreads(self, records: list[dict[str, Any]]) -> dict[str, dict[str, float] | None]:
        measured = [measure(record, self.ran) for record in records]
        return {name: spread([values[name] for values in measured]) for name in MEASURES}

    @property
    def empty(self) -> str | None:
        """Why no number can be given at all; None where some can."""
        if self.mixed:
            return "seeds differ"
        if self.counted:
            return None
        if any(run.failure for run in self.runs):
            return "failed"
        return "not evaluated" if any(run.records for run in self.runs) else "not run"

    def why_missing(self, name: str) -> str:
        """Why there is no value of a measure."""
        if self.empty:
            return self.empty
        if ("gini" in name or "entropy" in name) and not any(record["layers"] for record in self.records):
            return "no experts"
        if name.endswith("_with_padding"):
            return "no padding routed"
        return "before training" if name.startswith("usage_") and self.records[0]["step"] == 0 else "not finite"

    def why_unpublished(self) -> str:
        """Why there is no published value to compare with."""
        if self.published is None or not self.published.epochs:
            return "none published"
        if self.control:
            return "none for a control"
        return "small scale" if self.is_small else self.empty or "no common epoch"

    @property
    def verdict(self) -> str:
        """Inside or outside of TOLERANCE of the published loss, or why that cannot be said."""
        if self.is_small and not self.mixed:
            return "small scale: not comparable"
        reasons = self._reasons()
        if not reasons:
            inside = f"inside {100 * TOLERANCE:g} %" if abs(self.difference) <= TOLERANCE else "outside"
            return f"{inside} ({100 * self.difference:+.1f} %)"
        compared = ""
        if self.difference is not None:
            compared = f", epoch {self.result.epoch} compared: {100 * self.difference:+.1f} %"
        return f"none: {'; '.join(reasons)}{compared}"

    def _reasons(self) -> list[str]:
        """Why there is no verdict."""
        reasons = []
        if self.published is None or not self.published.epochs or self.control:
            reasons.append(f"no published result{' for a control' if self.control else ''}")
        if self.empty:
            return [*reasons, f"seeds differ in {', '.join(self.mixed)}" if self.mixed else self.empty]
        if self.changed:
            reasons.append(f"settings changed: {', '.join(self.changed)}")
        unfinished = [run for run in self.counted if not run.finished]
        if unfinished:
            reasons.append(f"not finished: {min(unfinished, key=lambda run: run.step).progress}")
        short = sorted({text for run in self.counted for text in shortages(run)})
        if short:
            reasons.append(f"fewer documents than the run asks for: {', '.join(short)}")
        if not reasons and self.difference is None:
            cure = "no evaluation at a published epoch; train.eval_every=epoch makes one"
            reasons.append("the loss is not finite" if self.result else cure)
        return reasons

    @property
    def rule_version(self) -> str:
        """The published version, or the preset of an own experiment."""
        return self.published.rule_version if self.published else rule_name(self.asked.model.some.rules)

    @property
    def remarks(self) -> list[str]:
        """What else to know of it."""
        remarks = []
        for run in self.runs:
            if run.failure:
                remarks.append(f"seed {run.seed} failed: {run.failure}")
            if not run.records and not run.failure:
                remarks.append(f"seed {run.seed} not run")
            elif run.records and run not in self.counted:
                remarks.append(f"seed {run.seed} not counted: {run.progress}")
            skipped = max((record["skipped"] for record in run.of("train")), default=0)
            if skipped:
                remarks.append(f"seed {run.seed} skipped {skipped} steps with gradients that are not finite")
        if self.published and not self.control and self.ran.model == self.asked.model:
            counts, printed = self.ran.model.num_parameters(), self.published
            for name, ours, millions in (
                ("trained", counts.trainable, printed.printed_trainable_millions),
                ("total", counts.total, printed.printed_total_millions),
            ):
                if millions is not None and abs(ours / 1e6 - millions) > 0.0051:
                    remarks.append(f"{name} parameters were printed as {millions:.2f} M")
        if self.ran.data.path not in (None, self.asked.data.path):
            remarks.append("own data.path")
        if len({run.how.get("git_commit") for run in self.counted}) > 1:
            remarks.append("seeds ran at different commits")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        counts = self.ran.model.num_parameters()
        runs, published = self.counted, self.published
        return {
            "experiment": self.id,
            "control": self.control or "none",
            "rule_version": self.rule_version,
            "report_name": published and published.report_name,
            "seeds": [run.seed for run in self.runs],
            "finished_seeds": [run.seed for run in self.runs if run.finished],
            "counted_seeds": [run.seed for run in runs],
            "parameters": {"trained": counts.trainable, "total": counts.total},
            "printed_millions": published
            and {"trained": published.printed_trainable_millions, "total": published.printed_total_millions},
            "compared_at": {"steps": [r["step"] for r in self.records], "epoch": self.result and self.result.epoch},
            "measured": {name: value or {"missing": self.why_missing(name)} for name, value in self.measured.items()},
            "published": asdict(self.result) if self.result else {"missing": self.why_unpublished()},
            "difference": self.difference,
            "verdict": self.verdict,
            "remarks": self.remarks,
            "changed_settings": self.changed,
            "curve": [self._point(r) for r in self.reference if runs and all(run.at_epoch(r.epoch) for run in runs)],
            "assumptions": published.assumptions if published else [],
            "notes": published.notes if published else [],
            "runs": [describe(run) for run in self.runs],
        }

    def _point(self, result: EpochResult) -> dict[str, Any]:
        """One epoch, published beside measured."""
        records = [run.at_epoch(result.epoch) for run in self.counted]
        train = spread([run.train_loss(record) for run, record in zip(self.counted, records, strict=True)])
        return {"published": asdict(result), "measured": {"train_loss": train, **self._spreads(records)}}
