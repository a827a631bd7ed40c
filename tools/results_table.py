"""The rows of `tools/results.py` as one Markdown table, for `tools/reproduce.py`. A cell without a number says why."""

from datetime import UTC, datetime

from tools.results import TOLERANCE, Row

RULE = (
    "Verdict: the mean over the counted seeds of the validation loss in the published convention, against the published "
    f"loss after the same epoch, the last that both have: inside {100 * TOLERANCE:g} % of it, or outside. Runs that are not "
    "finished, had fewer documents or have another setting get the difference without a verdict. Finished seeds count, or "
    "all where none is finished. A cell with several seeds is their mean, smallest and largest value."
)
CONVENTIONS = (
    "Published convention: every target of the padded rows where the version counts padding, mean of batch means. Real "
    "tokens: every real target once. Gini and entropy (bits) of the middle layer: the published measure is that of the "
    "usage average, which padding enters where the version counts it; the other two are of the validation pass."
)
HEADS = (
    "experiment", "rules", "control", "seeds done", "steps done", "trained, M", "total, M", "compared at",
    "val loss", "published", "ppl", "published", "real tokens: val loss", "ppl", "nats/story", "bits/byte",
    "Gini: published", "usage average", "with padding", "real tokens",
    "entropy: published", "usage average", "with padding", "real tokens", "verdict", "remarks",
)  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """The table, what its columns mean, and what to know of the published runs in it."""
    lines = [f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. {_machines(rows)}", ""]
    lines += [_line(HEADS), "|" + "---|" * len(HEADS), *(_line(cells(row)) for row in rows), "", RULE, "", CONVENTIONS]
    notes = {row.id: [*row.published.assumptions, *row.published.notes] for row in rows if row.published}
    if any(notes.values()):
        lines += ["", "To know before comparing:", ""]
        lines += [f"- {name}: {'; '.join(texts)}" for name, texts in notes.items() if texts]
    return "\n".join(lines) + "\n"


def brief(row: Row) -> str:
    """A row for the terminal."""
    name = f"{row.id}+{row.control}" if row.control else row.id
    return (
        f"{name}: {_seeds(row)} seeds, val loss {value(row, 'published_loss', 4)}, "
        f"published {published(row, 'val_loss', 4)}; {row.verdict}"
    )


def cells(row: Row) -> list[str]:
    """In the order of HEADS."""
    counts = row.ran.model.num_parameters()
    return [
        row.id,
        row.rule_version,
        row.control or "none",
        _seeds(row),
        _steps(row),
        f"{counts.trainable / 1e6:,.2f}",
        f"{counts.total / 1e6:,.2f}",
        _compared_at(row),
        value(row, "published_loss", 4),
        published(row, "val_loss", 4),
        value(row, "published_ppl", 2),
        published(row, "val_ppl", 2),
        value(row, "val_loss", 4),
        value(row, "val_ppl", 2),
        value(row, "nats_per_story", 1),
        value(row, "bits_per_byte", 4),
        published(row, "gini", 3),
        *(value(row, name, 3) for name in ("usage_gini", "gini_with_padding", "gini")),
        published(row, "entropy_bits", 3),
        *(value(row, name, 3) for name in ("usage_entropy_bits", "entropy_bits_with_padding", "entropy_bits")),
        row.verdict,
        "; ".join(row.remarks) or "none",
    ]


def value(row: Row, name: str, digits: int) -> str:
    """A measure: `2.5601`, `2.5601 (2.5500 to 2.5702)` over seeds, or why there is none."""
    spread = row.measured[name]
    if spread is None:
        return row.why_missing(name)
    mean = f"{spread['mean']:,.{digits}f}"
    return mean if len(row.records) == 1 else f"{mean} ({spread['min']:,.{digits}f} to {spread['max']:,.{digits}f})"


def published(row: Row, name: str, digits: int) -> str:
    """A published figure of the compared epoch, or why there is none."""
    if row.result is None:
        return row.why_unpublished()
    figure = getattr(row.result, name)
    return "not printed" if figure is None else f"{figure:,.{digits}f}"


def _seeds(row: Row) -> str:
    return f"{sum(run.finished for run in row.runs)}/{len(row.runs)}"


def _steps(row: Row) -> str:
    progress = [f"{run.step}/{run.start.get('total_steps', '?')}" if run.records else "not run" for run in row.runs]
    return ", ".join(dict.fromkeys(progress))


def _compared_at(row: Row) -> str:
    if row.empty:
        return row.empty
    steps = ", ".join(dict.fromkeys(str(record["step"]) for record in row.records))
    return f"epoch {row.result.epoch} (step {steps})" if row.result else f"step {steps}"


def _machines(rows: list[Row]) -> str:
    """With what the runs were made."""
    runs = [run for row in rows for run in row.runs if run.records]
    parts = [
        f"{name}: {', '.join(sorted({str(run.how.get(key)) for run in runs}))}"
        for name, key in (("commit", "git_commit"), ("device", "device"), ("torch", "torch"), ("ranks", "world_size"))
    ]
    precisions = sorted({str(run.start.get("precision")) for run in runs})
    return f"{'; '.join(parts)}; precision: {', '.join(precisions)}." if runs else "No run has begun."


def _line(texts: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts) + " |"
