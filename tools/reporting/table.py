"""The table of runs: its columns, a run's values in them, and how they read; as a page's cells, CSV and Markdown."""

import csv
import io
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np

from tools.reporting.curves import column, step_seconds
from tools.reporting.health import Anomaly, anomalies, status
from tools.results import changed_settings, rule_name
from tools.runs import Run, number
from trainer.config import Experiment, load_experiment
from trainer.published import published_ids, published_results
from trainer.text import visible

FAMILIES = {"some": "SoME", "dense": "dense", "frozen_dense": "frozen dense", "none": "attention only"}


@dataclass(frozen=True)
class Column:
    """One column."""

    key: str
    """Name in the data and in results.csv."""
    label: str
    """Its header."""
    digits: int | None = None
    """Decimals of a number; None = a text, or a number that is shown as it is."""
    is_shown: bool = True
    """Whether the page shows it before anybody chooses columns."""
    note: str = ""
    """What it means, where the header does not say."""


COLUMNS = (
    Column("run", "Run", note="the run's folder"),
    Column("family", "Family", note="what follows attention in a block"),
    Column("status", "Status"),
    Column("best_val_loss", "Best loss", 4, note="lowest validation loss, nats per real token"),
    Column("best_val_ppl", "Best ppl", 2, note="perplexity of the lowest validation loss, real tokens"),
    Column("best_step", "Best at", 0, is_shown=False, note="step of the lowest validation loss"),
    Column("final_val_loss", "Final loss", 4, note="last validation loss, nats per real token"),
    Column("final_val_ppl", "Final ppl", 2, is_shown=False, note="perplexity of the last validation loss, real tokens"),
    Column("tag", "Variant", is_shown=False, note="runs that differ in nothing but the seed have one name"),
    Column("experiment", "Experiment"),
    Column("control", "Control"),
    Column("num_experts", "E", 0, note="experts a layer"),
    Column("top_k", "k", 0, note="experts a token"),
    Column("d_ffn", "d_ffn", 0, is_shown=False, note="width of an expert, or of the dense FFN"),
    Column("router", "Router", is_shown=False),
    Column("rules", "Rules", note="preset of the key rules"),
    Column("seed", "Seed", 0),
    Column("ranks", "Ranks", 0),
    Column("ep_size", "EP", 0, is_shown=False, note="ranks that share a pool"),
    Column("precision", "Precision", is_shown=False),
    Column("params_total", "Parameters", 0, is_shown=False),
    Column("params_trained", "Trained", 0),
    Column("step", "Step", 0),
    Column("epochs", "Epochs", 2, note="passes over the training data"),
    Column("loss_published_way", "Final, padded", 4, False, "last validation loss in the published convention"),
    Column(
        "published_loss",
        "Published",
        4,
        False,
        "last printed validation loss of this id, in the published convention, where no setting was changed",
    ),
    Column("changed", "Changed", None, False, "settings in which a run differs from the published one of its id"),
    Column("gini", "Gini", 3, note="inequality of usage at the last evaluation, mean over layers; 0 = even"),
    Column("entropy_bits", "Entropy", 2, note="entropy of usage in bits at the last evaluation, mean over layers"),
    Column("anomalies", "Anomalies", 0, note="open a cell for the list"),
    Column("tokens_per_second", "Tokens/s", 0, note="median over steps"),
    Column(
        "wall_seconds",
        "Seconds",
        0,
        note="in steps and evaluations; a step that was not recorded counts as the next one that was",
    ),
    Column("git_commit", "Commit", is_shown=False),
    Column("device", "Device", is_shown=False),
)


@dataclass
class Entry:
    """A run on the page."""

    run: Run
    """What its folder holds."""
    label: str
    """The folder, as shown."""
    tag: str = ""
    """Its variant's name."""
    data: int | None = None
    """Equal for runs that were measured on the same validation data; None = not known."""
    anomalies: list[Anomaly] = field(init=False)
    """What went wrong."""
    values: dict[str, Any] = field(init=False)
    """Of each column; None = missing."""

    def __post_init__(self) -> None:
        self.anomalies = anomalies(self.run)
        self.values = {column.key: None for column in COLUMNS}
        self.values |= {"run": self.label, "status": status(self.run), "anomalies": len(self.anomalies)}
        self.values |= _settings(self.run) | _measured(self.run)

    @property
    def cells(self) -> dict[str, str]:
        """Of each column, the text; empty = missing."""
        return {column.key: text(column, self.values[column.key]) for column in COLUMNS}


def text(column: Column, value: Any) -> str:
    """A value as it is read; empty where it is missing."""
    if value is None:
        return ""
    if column.digits is None or not isinstance(value, int | float):
        return visible(str(value))
    return f"{value:,.{column.digits}f}"


def _settings(run: Run) -> dict[str, Any]:
    if run.experiment is None:
        return {}
    experiment, model, some = run.experiment, run.experiment.model, run.experiment.model.some
    has_some, counts = model.channel_mixer == "some", model.num_parameters()
    return {
        "family": FAMILIES[model.channel_mixer],
        "experiment": experiment.name,
        "control": experiment.control,
        "num_experts": some.num_experts if has_some else None,
        "top_k": some.top_k if has_some else None,
        "d_ffn": some.d_ffn if has_some else model.d_ffn,
        "router": (some.router if some.routing == "learned" else some.routing) if has_some else None,
        "rules": rule_name(some.rules) if has_some else None,
        "seed": experiment.seed,
        "params_total": counts.total,
        "params_trained": counts.trainable,
        "ranks": number(run.start.get("world_size", run.how.get("world_size"))),
        "ep_size": number(run.start.get("ep_size", run.how.get("ep_size"))),
        "precision": run.start.get("precision"),
        **_published(experiment),
        **{key: run.how.get(key) for key in ("git_commit", "device")},
    }


def _published(experiment: Experiment) -> dict[str, Any]:
    if experiment.name not in published_ids():
        return {}
    changed = changed_settings(load_experiment(experiment.name), experiment, free=("seed", "data.allow_fewer"))
    epochs = published_results(experiment.name).epochs
    return {"changed": ", ".join(changed) or None, "published_loss": epochs[-1].val_loss if epochs and not changed else None}


def _measured(run: Run) -> dict[str, Any]:
    train, records = run.of("train"), run.of("train") + run.evals
    if not records:
        return {}
    latest = max(records, key=lambda record: record["step"])
    rates = column(train, "tokens_per_second")
    values = {
        "step": run.step,
        "epochs": number(latest.get("epoch")),
        "tokens_per_second": median(rates[np.isfinite(rates)].tolist()) if np.isfinite(rates).any() else None,
        "wall_seconds": float(np.nansum(step_seconds(run)) + np.nansum(column(run.evals, "seconds"))),
    }
    evals = [(loss, record["step"]) for record in run.evals if (loss := number(record["val_loss"])) is not None]
    if evals:
        loss, step = min(evals)
        values |= {"best_val_loss": loss, "best_val_ppl": perplexity(loss), "best_step": step}
    if run.evals:
        last = run.evals[-1]
        loss = number(last["val_loss"])
        padded = [number(last[key]) for key in ("val_loss_with_padding", "val_loss_batch_mean") if key in last]
        values |= {"final_val_loss": loss, "final_val_ppl": perplexity(loss), "loss_published_way": next(iter(padded), None)}
        values |= {key: layer_mean(last, key) for key in ("gini", "entropy_bits")}
    return values


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None where there is none, or none that a number holds."""
    return None if loss is None or loss > 700 else float(np.exp(loss))


def layer_mean(evaluation: dict[str, Any], key: str) -> float | None:
    """Mean of a measure over SoME layers; None where it has none."""
    values = [number(layer.get(key)) for layer in evaluation["layers"]]
    return fmean(values) if values and None not in values else None


def to_csv(entries: list[Entry]) -> str:
    """All columns, numbers in full; a row for each run."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([column.key for column in COLUMNS])
    for entry in entries:
        row = [entry.values[column.key] for column in COLUMNS]
        writer.writerow(["" if value is None else visible(value) if isinstance(value, str) else value for value in row])
    return out.getvalue()


def to_markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose cells show what they hold, whatever it is."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(plain_markdown, cells)) + " |" for cells in lines)


def plain_markdown(text: str) -> str:
    """A text from elsewhere as Markdown that shows it as it is, within a line."""
    for character in "\\`*_[]|~":
        text = text.replace(character, f"\\{character}")
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
