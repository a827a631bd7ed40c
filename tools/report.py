"""One page of any number of runs, to read offline and to keep, with its tables as files beside it.

    python tools/report.py runs/study runs/a4 -o report.html       # also results.csv and report.md in the same folder
    python tools/report.py runs/study --baseline attention_only --mixed_data --price 2.5 --watts 700

A run is a folder with config.yaml or metrics.jsonl; other folders are searched for such. Those two files, failed.txt, the
lock and the checkpoints' key stores are all that is read, so runs may be unfinished, running, crashed or damaged.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.outputs import is_stdout, is_stream, make_output_folder, read_paths, write_output
from tools.reporting.compare import Variant, common_step, comparison, sort_by_data, variants
from tools.reporting.cost import cost_rows
from tools.reporting.health import RULES, STATUSES
from tools.reporting.keymaps import check_umap
from tools.reporting.page import page, page_data
from tools.reporting.table import COLUMNS, Entry, plain_markdown, to_csv, to_markdown
from tools.runs import EXIT_REFUSED, read_records, read_run, run_folders
from trainer.console import guard_streams
from trainer.text import error_line, visible

CSV, MARKDOWN = "results.csv", "report.md"


@dataclass(frozen=True)
class Settings:
    """What a reader may choose."""

    baseline: str | None = None
    """The variant that others are compared with; None = the first run's."""
    mixed_data: bool = False
    """Show runs whose validation data differ on one page."""
    watts: float | None = None
    """Power of a rank."""
    price: float | None = None
    """Of a rank for an hour."""
    plotly: Path | None = None
    """A build of plotly.js; None = that of the `plotly` package."""
    umap: bool = False
    """Add maps of keys by UMAP."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    guard_streams()
    chosen = parse_arguments(arguments)
    try:
        read_paths(chosen, "runs", "output", "plotly")
        settings = Settings(chosen.baseline, chosen.mixed_data, chosen.watts, chosen.price, chosen.plotly, chosen.umap)
        count = write_report(chosen.runs, chosen.output, settings)
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    beside = "" if is_stream(chosen.output) else f", {', '.join((CSV, MARKDOWN))} beside it"
    said = sys.stderr if is_stdout(chosen.output) else sys.stdout
    print(visible(f"{count} run(s): {chosen.output}{beside}"), file=said)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="tools/report.py", description="One page of any number of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs' folders, or folders that hold some")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="(report.html)")
    parser.add_argument("--baseline", metavar="NAME", help="the variant to compare with, as the page names it")
    parser.add_argument("--mixed_data", action="store_true", help="show runs whose validation data differ on one page")
    parser.add_argument("--watts", type=float, metavar="W", help="power of a rank, for the energy")
    parser.add_argument("--price", type=float, metavar="P", help="price of a rank for an hour")
    parser.add_argument("--plotly", metavar="FILE", help="a build of plotly.js to embed, such as a smaller one")
    parser.add_argument("--umap", action="store_true", help="add maps of keys by UMAP, which takes some seconds a layer")
    return parser.parse_args(arguments)


def write_report(folders: list[Path], output: Path, settings: Settings = Settings()) -> int:
    """Write the page to `output`, and its tables beside it, but for a pipe or a device; how many runs it has.

    Raises:
        ValueError: no such folder, an unknown baseline, other validation data, no plotly or UMAP, a rate that is no rate, a
            file that cannot be written.
    """
    _check(output, settings)
    library = _plotly(settings.plotly)
    found = [run for folder in folders for run in find_runs(folder)]
    labels = _labels(found)
    entries = [Entry(_read(folder), label) for folder, label in labels.items()]
    differing = sort_by_data(entries)
    named = variants(entries)
    baseline = _baseline(named, settings.baseline)
    if differing and not settings.mixed_data:
        raise ValueError(
            f"the runs have different validation data ({'; '.join(differing)}), and their losses do not compare; choose "
            f"runs of one kind, or add --mixed_data to see them on one page all the same"
        )
    entries.sort(key=lambda entry: (entry.values["best_val_loss"] is None, entry.values["best_val_loss"]))
    warnings = [f"Validation data differ, and losses on different data do not compare: {visible('; '.join(differing))}."]
    costs = cost_rows(entries, settings.watts, settings.price)
    data = page_data(entries, named, baseline, costs, warnings if differing else [], settings.umap)
    texts = {CSV: to_csv(entries), MARKDOWN: markdown(entries, named, baseline, data["warnings"])}
    if is_stream(output):
        texts = {}
    else:
        make_output_folder(output.parent, "--output")
    for name, text in texts.items():
        write_output(output.with_name(name), text, "--output")
    write_output(output, page(data, library), "--output")
    return len(entries)


def _check(output: Path, settings: Settings) -> None:
    """Raises ValueError for what can be refused before anything is read."""
    for flag, value in (("--watts", settings.watts), ("--price", settings.price)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{flag} {value}: must be a number of 0 or more")
    tables = [os.path.realpath(output.with_name(name)) for name in (CSV, MARKDOWN)]
    if output.name in (CSV, MARKDOWN) or os.path.realpath(output) in tables:
        raise ValueError(f"--output {output}: is a table's place beside the page; choose another name")
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file in it, such as {output / 'report.html'}")
    if settings.umap:
        check_umap()


def find_runs(folder: Path) -> list[Path]:
    """The run that `folder` is, or those below it, by name; a folder without any counts as an empty run.

    Raises:
        ValueError: no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run's folder, or one that holds runs")
    return run_folders(folder) or [folder]


def _labels(folders: list[Path]) -> dict[Path, str]:
    """Each folder once, and what is left of its path without what all have in common."""
    whole = {folder.resolve(): folder for folder in folders}
    common = Path(os.path.commonpath([path.parent for path in whole]))
    return {folder: visible(str(path.relative_to(common))) for path, folder in whole.items()}


def _read(folder: Path):
    run = read_run(folder)
    if run.experiment is None and not run.records:
        try:
            run.records, run.unreadable_lines = read_records(folder / "metrics.jsonl")
        except OSError:
            pass  # none, or what read_run has said already
    return run


def _baseline(found: list[Variant], name: str | None) -> Variant:
    matching = [variant for variant in found if variant.name == name]
    if name is not None and not matching:
        raise ValueError(f"--baseline {name}: no such variant; there are {', '.join(variant.name for variant in found)}")
    return matching[0] if matching else found[0]


def _plotly(path: Path | None) -> str:
    try:
        if path is not None:
            return path.read_text(encoding="utf-8")
        return resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise ValueError("the page needs the package plotly; pip install plotly, or pip install -e '.[report]'") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--plotly {path}: cannot be read ({error}); give a build of plotly.js") from None


def markdown(entries: list[Entry], found: list[Variant], baseline: Variant, warnings: list[str]) -> str:
    """The tables as Markdown: the runs as the page shows them, and the variants at the step that most runs share."""
    shown = [column for column in COLUMNS if column.is_shown]
    rows = [[entry.cells[column.key] for column in shown] for entry in entries]
    parts = [
        "# Runs\n",
        *(f"**{plain_markdown(warning)}**\n" for warning in warnings),
        to_markdown([c.label for c in shown], rows),
    ]
    step = common_step(entries)
    if step is not None:
        parts.append(f"\n## Validation loss at step {step:,}, nats per real token\n")
        header = ["Variant", "Seeds", "Mean", "Lowest", "Highest", f"Minus {baseline.name}", "± 95 %"]
        rows = []
        for row in comparison(found, baseline, step):
            figures = [_figure(row[key]) for key in ("mean", "low", "high")]
            signed = "" if row["difference"] is None else f"{row['difference']:+.4f}"
            rows.append([row["name"], str(row["seeds"]), *figures, signed, _figure(row["half"])])
        parts.append(to_markdown(header, rows))
        parts.append("\nDifferences are means over pairs of equal seed and validation data, with Student's 95 % interval.")
    odd = {entry.label: "; ".join(anomaly.text for anomaly in entry.anomalies) for entry in entries if entry.anomalies}
    lines = [f"- Run {plain_markdown(label)}: {plain_markdown(text)}" for label, text in odd.items()]
    parts += ["\n## Anomalies\n", *(lines or ["None."]), f"\nCounted are: {RULES}."]
    parts += ["\n## Statuses\n", *(f"- {name}: {rule}" for name, rule in STATUSES.items())]
    return "\n".join(parts) + "\n"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
