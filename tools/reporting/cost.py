"""What a run cost: counted work, measured time by part, and estimates of traffic and memory."""

from typing import Any

import numpy as np

from tools.reporting.curves import column, step_seconds
from tools.reporting.table import Column, Entry, text
from tools.runs import Run
from trainer.layout import Layout
from trainer.plan import Deployment, Sharding, memory, traffic

COLUMNS = (
    Column("run", "Run"),
    Column("tokens", "Tokens", 0, note="real tokens trained on"),
    Column("mflop_per_token", "MFLOP/token", 1, note="forward and backward, counted from the sizes, at full rows"),
    Column("tflop", "TFLOP", 1, note="the two multiplied"),
    Column("rank_tokens_per_second", "Tokens/s a rank", 0, note="median over steps"),
    Column("step_seconds", "Steps, s", 1, note="a step that was not recorded counts as the next one that was"),
    Column("eval_seconds", "Evaluations, s", 1),
    Column("checkpoint_seconds", "Checkpoints, s", 1, note="that training waited for"),
    Column("load_seconds", "Resuming, s", 1, note="verifying and loading checkpoints"),
    Column("exchange_mb", "Tokens sent, MB", 1, note="a rank and step, estimate for even usage and full rows"),
    Column("gradient_mb", "Gradients sent, MB", 1, note="a rank and step, with parameters gathered"),
    Column("key_mb", "Key sums sent, MB", 1, note="a rank and step"),
    Column("memory_gib", "Memory, GiB", 2, note="a rank at its peak, by the model of --dry_run"),
    Column("rank_hours", "Rank hours", 3, note="all parts of the time, times ranks"),
    Column("kwh", "kWh", 3, note="rank hours times --watts"),
    Column("price", "Price", 2, note="rank hours times --price"),
)


def cost_rows(entries: list[Entry], watts: float | None, price: float | None) -> list[dict[str, tuple[Any, str]]]:
    """Of each run that has steps, value and text of each column.

    Args:
        entries: the runs.
        watts: power of a rank, None = not known.
        price: of a rank for an hour, None = not known.
    """
    rows = []
    for entry in entries:
        if entry.run.of("train"):
            values = {"run": entry.label} | _time(entry.run, entry.values["tokens_per_second"]) | _estimates(entry.run)
            hours = values["rank_hours"]
            values |= {
                "kwh": None if watts is None else hours * watts / 1000,
                "price": None if price is None else hours * price,
            }
            rows.append({c.key: (values.get(c.key), text(c, values.get(c.key))) for c in COLUMNS})
    return rows


def _time(run: Run, rate: float | None) -> dict[str, float | None]:
    parts = {
        "step_seconds": float(np.nansum(step_seconds(run))),
        "eval_seconds": _sum(run.evals, "seconds"),
        "checkpoint_seconds": _sum(
            [{"held_up": r.get("blocked_seconds", r.get("seconds"))} for r in run.of("checkpoint")], "held_up"
        ),
        "load_seconds": _sum(run.of("resume"), "verify_seconds") + _sum(run.of("resume"), "load_seconds"),
    }
    ranks = run.start.get("world_size", 1)
    tokens = column(run.of("train"), "tokens")
    return parts | {
        "rank_hours": sum(parts.values()) * ranks / 3600,
        "rank_tokens_per_second": None if rate is None else rate / ranks,
        "tokens": float(np.nanmax(tokens)) if np.isfinite(tokens).any() else None,
    }


def _sum(records: list[dict[str, Any]], key: str) -> float:
    return float(np.nansum(column(records, key)))


def _estimates(run: Run) -> dict[str, float | None]:
    """From the settings; empty where the folder does not say all that they need."""
    experiment, start, tokens = run.experiment, run.start, column(run.of("train"), "tokens")
    if experiment is None:
        return {}
    flops = experiment.model.num_flops_per_token(experiment.model.max_seq_len)
    values = {"mflop_per_token": flops / 1e6}
    if np.isfinite(tokens).any():
        values["tflop"] = flops * float(np.nanmax(tokens)) / 1e12
    try:
        layout = Layout(start["ep_size"], start["micro_batch"], start["accumulation"])
        device = "cpu" if str(run.how["device"]).startswith("cpu") else "cuda"
        sharding = Sharding.of(run.how["ds_config"])
        deployment = Deployment(layout, start["world_size"], start["world_size"], sharding, device)
        sent = traffic(experiment, deployment)
        held = memory(experiment, deployment)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return values
    return values | {
        "exchange_mb": sent.tokens.total / 1e6,
        "gradient_mb": sent.gradients.total / 1e6,
        "key_mb": sent.keys.total / 1e6,
        "memory_gib": held.total / 2**30,
    }
