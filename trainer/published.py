"""The published SoME runs: as experiments that repeat their conventions, and with the figures that were printed for them.

The table lies in `experiments/published`: `conventions.yaml` holds what the runs of a rule version have in common,
`runs.yaml` the runs themselves. Its source is the specification document (specs sections 1 to 3, 5, 6 and 10); what no
source states is named in each run's assumptions.
"""

import copy
import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

from trainer.text import read_yaml

TABLE_DIR = Path(__file__).parent / "experiments" / "published"
TINYSTORIES = "roneneldan/TinyStories"


@dataclass(frozen=True)
class EpochResult:
    """What was printed after one epoch; None = not printed. Losses count padding or not, see `PublishedRun.pads_counted`."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    """Nats per target: mean over the epoch's batches."""
    val_loss: float
    """Nats per target: mean over the validation batches."""
    val_ppl: float
    """exp(val_loss), printed with two decimals."""
    gini: float | None
    """Gini coefficient, 0 to 1 - K/E, of the usage that the key rules keep in the middle layer (index L // 2, from 0).
    Usage counts padding where the losses do."""
    entropy_bits: float | None
    """Entropy in bits, log2 K to log2 E, of the same usage."""


@dataclass(frozen=True)
class PublishedRun:
    """One published run: what was printed, and what to know before comparing with it."""

    id: str
    """Name of the run as an experiment."""
    report_name: str
    """Name in its report, with the report before it, as names such as V1 or A1 occur in several."""
    rule_version: str
    """Version of the notebook, which is also the preset of the key rules: v1.1 to v7, or cmp."""
    dataset: str
    """Hub id of the data."""
    epochs: list[EpochResult]
    """In order. Some reports give the first and the last epoch only; empty where no result was published."""
    printed_total_millions: float | None
    """All parameters, frozen experts included, as printed, in millions; None = not printed."""
    printed_trainable_millions: float | None
    """Trained parameters as printed, in millions; None = not printed."""
    assumptions: list[str]
    """What no source states, and what the experiment uses in its place."""
    notes: list[str]
    """What else to know before comparing."""
    pads_counted: bool
    """Padding was a target of the losses, was routed and moved keys."""


@dataclass(frozen=True)
class _Row:
    experiment: dict
    result: PublishedRun


def published_ids() -> list[str]:
    """Names of all published runs, in the order of their reports."""
    return list(_table())


def published_experiment(run_id: str) -> dict:
    """The run as nested plain values, for `trainer.config.experiment_from_dict`. The caller owns the dict.

    Raises:
        ValueError: unknown id.
    """
    return copy.deepcopy(_row(run_id).experiment)


def published_results(run_id: str) -> PublishedRun:
    """What was printed for the run. The caller owns it.

    Raises:
        ValueError: unknown id.
    """
    return copy.deepcopy(_row(run_id).result)


def merge(below: dict, above: dict) -> dict:
    """Nested dicts as one; where both have a value, that of `above` counts. Changes neither."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _row(run_id: str) -> _Row:
    table = _table()
    if run_id not in table:
        close = difflib.get_close_matches(run_id, table, n=1, cutoff=0.5)
        cure = f"did you mean {close[0]}?" if close else f"known: {', '.join(table)}"
        raise ValueError(f"published run {run_id!r} is unknown; {cure}")
    return table[run_id]


@functools.cache
def _table() -> dict[str, _Row]:
    conventions = _read("conventions.yaml")
    rows: dict[str, _Row] = {}
    for series in _read("runs.yaml")["series"]:
        version = series["rule_version"]
        if version not in conventions["versions"]:
            raise ValueError(
                f"rule_version = {version!r} of series {series['title']!r} in {TABLE_DIR / 'runs.yaml'} is not in "
                f"conventions.yaml; known: {', '.join(conventions['versions'])}"
            )
        base = merge(conventions["all"], conventions["versions"][version])
        base = merge(base, series.get("common", {}))
        for run_id, run in series["runs"].items():
            if run_id in rows:
                raise ValueError(f"run {run_id!r} stands twice in {TABLE_DIR / 'runs.yaml'}; rename or remove one")
            experiment = {"name": run_id, **merge(base, run.get("changes", {}))}
            rows[run_id] = _Row(experiment, _result(run_id, run, series, experiment["data"]))
    return rows


def _result(run_id: str, run: dict, series: dict, data: dict) -> PublishedRun:
    return PublishedRun(
        id=run_id,
        report_name=run["report_name"],
        rule_version=series["rule_version"],
        dataset=data.get("path", TINYSTORIES),
        epochs=[_epoch_result(run_id, epoch, figures) for epoch, figures in run["epochs"].items()],
        printed_total_millions=run["printed_millions"]["total"],
        printed_trainable_millions=run["printed_millions"]["trainable"],
        assumptions=series.get("assumptions", []) + run.get("assumptions", []),
        notes=series.get("notes", []) + run.get("notes", []),
        pads_counted=data["count_padding"],
    )


def _epoch_result(run_id: str, epoch: int, figures: list[float | None]) -> EpochResult:
    if len(figures) != 5:
        raise ValueError(
            f"epoch {epoch} of run {run_id!r} in {TABLE_DIR / 'runs.yaml'} = {figures}: needs 5 figures, "
            "null where one was not printed"
        )
    return EpochResult(epoch, *figures)


def _read(name: str) -> dict:
    return read_yaml(TABLE_DIR / name, str(TABLE_DIR / name))
