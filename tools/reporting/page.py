"""The page: everything that it shows as one JSON block in one HTML file, with its own code, styles and plotly.js."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.reporting.compare import TOLERANCE, Variant
from tools.reporting.cost import COLUMNS as COST_COLUMNS
from tools.reporting.curves import BUCKETS, curves
from tools.reporting.health import RULES, STATUSES
from tools.reporting.keymaps import key_maps
from tools.reporting.routing import MEASURES, MOST_COUNTS, routing
from tools.reporting.served import served
from tools.reporting.table import COLUMNS, Entry
from tools.runs import Run
from tools.study import T_95
from trainer.runfolder import MOST_PAIRS
from trainer.text import visible

HERE = Path(__file__).parent
SCRIPTS = ("tables.js", "charts.js", "curves.js", "compare.js", "routing.js", "page.js")
"""In the order in which they run: each uses what those before it define."""


def page_data(
    entries: list[Entry],
    variants: list[Variant],
    baseline: Variant,
    costs: list[dict[str, Any]],
    warnings: list[str],
    with_umap: bool = False,
) -> dict[str, Any]:
    """All that the page shows; `with_umap`: also maps of keys by UMAP.

    Expert by expert (usage, pairs, maps of keys) it shows the best run of each variant: pages of many runs stay small.
    """
    chosen = {id(_best(variant)) for variant in variants}
    runs = []
    for entry in entries:
        shows_experts = id(entry) in chosen
        runs.append(
            {
                "cells": {c.key: [_json_value(entry.values[c.key]), shown] for c, shown in zip_cells(entry)},
                "anomalies": [visible(anomaly.text) for anomaly in entry.anomalies],
                "data": entry.data,
                "batches_per_epoch": _steps_per_epoch(entry),
                "curves": curves(entry.run),
                "routing": routing(entry.run, shows_experts),
                "served": _served(entry.run) if shows_experts else None,
                "maps": key_maps(entry.run.folder, with_umap) if shows_experts else None,
            }
        )
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "columns": [vars(column) for column in COLUMNS],
        "runs": runs,
        "variants": [variant.name for variant in variants],
        "baseline": baseline.name,
        "t_95": T_95,
        "tolerance": TOLERANCE,
        "measures": MEASURES,
        "cost_columns": [vars(column) for column in COST_COLUMNS],
        "costs": costs,
        "warnings": warnings,
        "notes": {
            "statuses": STATUSES,
            "anomalies": RULES,
            "buckets": BUCKETS,
            "counts": MOST_COUNTS,
            "pairs": MOST_PAIRS,
            "has_umap": with_umap,
        },
    }


def _served(run: Run) -> dict[str, Any] | None:
    return None if run.experiment is None else served(run.folder, run.experiment.model.some.num_experts)


def zip_cells(entry: Entry) -> list[tuple[Any, str]]:
    """Each column and the entry's text in it."""
    cells = entry.cells
    return [(column, cells[column.key]) for column in COLUMNS]


def _best(variant: Variant) -> Entry:
    losses = [entry for entry in variant.entries if entry.values["best_val_loss"] is not None]
    return min(losses, key=lambda entry: entry.values["best_val_loss"], default=variant.entries[0])


def _json_value(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _steps_per_epoch(entry: Entry) -> float | None:
    step, epochs = entry.values["step"], entry.values["epochs"]
    return step / epochs if step and epochs else None


def page(data: dict[str, Any], plotly: str) -> str:
    """The HTML; `plotly` is the library's code."""
    scripts = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "DATA": embedded_json(data),
        # What would end the element early, or hide its end; in strings and patterns it may be written so.
        "PLOTLY": plotly.replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        "SCRIPT": scripts,
    }
    before, *rest = (HERE / "page.html").read_text(encoding="utf-8").split("{{")
    pieces = [before]
    for piece in rest:
        name, after = piece.split("}}", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def embedded_json(data: Any) -> str:
    """JSON that can stand in a script element: it holds no character that HTML or JavaScript would read otherwise."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # In JSON these three stand in strings only. (Line separators are escaped already, as all that is not ASCII.)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
