"""A live view of the runs below a folder, in a terminal, or their report in a browser.

    python tools/watch.py [RUNS_DIR]              # Ctrl-C ends it
    python tools/watch.py runs --once             # one snapshot, which is also what a pipe or a file gets
    python tools/watch.py runs --serve 8000       # the page of tools/report.py on http://127.0.0.1:8000

Reads only what runs leave behind; `tools/standing.py` says by which rule a run counts as running, done, stopped or failed.
"""

import argparse
import math
import sys
import tempfile
import textwrap
import time
from itertools import accumulate
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools.runs import EXIT_REFUSED
from tools.serve import serve
from tools.snapshots import Snapshot, Watched
from trainer.console import guard_streams
from trainer.paths import local_path
from trainer.text import error_line

STYLES = {"running": "green", "failed?": "yellow", "failed": "bold red", "stopped": "yellow", "done": "cyan"}
WIDE = 160
"""Columns from which a run takes one row of a table instead of a few lines."""
BAR, SPARKLINE = 12, 16
"""Their lengths in characters."""
HEADS = ("status", "progress", "training loss", "validation", "tokens/s", "time left", "ranks", "experts in use")
"""Of the table, between the run's name and a remark."""
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


def main() -> None:
    """The command line."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="tools/watch.py", description="Live view of the runs below a folder.")
    parser.add_argument("runs", nargs="?", default="runs", metavar="RUNS_DIR", help="default: runs")
    parser.add_argument("--once", action="store_true", help="print one snapshot and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: 2)")
    parser.add_argument(
        "--serve", type=int, nargs="?", const=8000, metavar="PORT", help="serve the report on 127.0.0.1 (port 8000)"
    )
    arguments = parser.parse_args()
    try:
        if not arguments.every > 0:
            raise ValueError(f"--every {arguments.every}: must be more than 0 seconds")
        watched = Watched(Path(local_path(arguments.runs, "RUNS_DIR")))
        if arguments.serve is not None:
            serve(watched, arguments.serve, report_page)
        else:
            watch(watched, Console(), arguments.every, arguments.once)
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        pass  # how one stops watching


def report_page(folders: list[Path]) -> str:
    """The report of these runs as one HTML page. Raises ValueError where it cannot be made."""
    from tools.report import Settings, write_report

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.html"
        write_report(folders, output, Settings(mixed_data=True))
        return output.read_text(encoding="utf-8")


def watch(watched: Watched, console: Console, every: float, once: bool) -> None:
    """Look again and again, or once where nobody can see it change."""
    if once or not console.is_terminal:
        console.print(render(watched.snapshots(), console))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while console.is_terminal:  # it may go away
            live.update(render(watched.snapshots(), console, console.height - 1), refresh=True)
            time.sleep(every)


def render(snapshots: list[Snapshot], console: Console, height: int | None = None) -> RenderableType:
    """All runs, as wide as the console; those that do not fit into `height` lines are counted."""
    if not snapshots:
        return Text("no runs yet")
    wide, ascii_only = console.width >= WIDE, console.options.ascii_only
    blocks = [[Text()] if wide else block(snapshot, console, ascii_only) for snapshot in snapshots]
    shown, lines = len(blocks), accumulate(map(len, blocks), initial=2)  # besides: the head of the table, the last line
    if height is not None:
        shown = max(1, sum(total <= height for total in lines) - 1)
    parts = [table(snapshots[:shown], ascii_only)] if wide else [line for lines in blocks[:shown] for line in lines]
    if shown < len(snapshots):
        parts.append(Text(f"and {len(snapshots) - shown} more that do not fit", style="dim"))
    return Group(*parts)


def table(snapshots: list[Snapshot], ascii_only: bool) -> Table:
    """One row a run."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("run", min_width=16, max_width=40)
    for head in HEADS:
        grid.add_column(head, no_wrap=True)
    grid.add_column("")
    cut = "crop" if ascii_only else "ellipsis"
    for snapshot in snapshots:
        grid.add_row(
            # Name and remark are the only cells that are cut where there is no room for all.
            Text(snapshot.name, no_wrap=True, overflow=cut),
            Text(snapshot.status, style=STYLES[snapshot.status]),
            progress(snapshot, ascii_only),
            losses(snapshot, ascii_only),
            _fixed(snapshot.val_loss),
            _rate(snapshot),
            _left(snapshot),
            ranks(snapshot),
            experts(snapshot),
            Text(remark(snapshot), style="dim", no_wrap=True, overflow=cut),
        )
    return grid


def block(snapshot: Snapshot, console: Console, ascii_only: bool) -> list[Text]:
    """The same in a few lines, which are broken where the terminal is narrow; what is not known is left out."""
    named = [
        ("", progress(snapshot, ascii_only)),
        ("left ", _left(snapshot)),
        ("loss ", losses(snapshot, ascii_only)),
        ("validation ", _fixed(snapshot.val_loss)),
        ("", f"{_rate(snapshot)} tokens/s" if _rate(snapshot) else ""),
        ("ranks ", ranks(snapshot)),
        ("experts ", experts(snapshot)),
    ]
    # What belongs together stays on one line: textwrap does not break at no-break spaces.
    facts = "  ".join(f"{name}{value}".replace(" ", "\u00a0") for name, value in named if value)
    lines = textwrap.wrap(facts, max(20, console.width), initial_indent="  ", subsequent_indent="  ")
    head = Text.assemble((snapshot.name, "bold"), "  ", (snapshot.status, STYLES[snapshot.status]))
    if remark(snapshot):
        head.append(f" ({remark(snapshot)})", style="dim")
    return [*head.wrap(console, console.width), *(Text(line.replace("\u00a0", " ")) for line in lines), Text()]


def remark(snapshot: Snapshot) -> str:
    """Why it is over, or for how long it has said nothing, if that is long."""
    if snapshot.why:
        return snapshot.why
    is_silent = snapshot.status == "running" and snapshot.silent_seconds > 60
    return f"silent for {duration(snapshot.silent_seconds)}" if is_silent else ""


def progress(snapshot: Snapshot, ascii_only: bool) -> str:
    """A bar and the steps."""
    if not snapshot.total_steps:
        return f"step {snapshot.step}"
    share = min(1.0, snapshot.step / snapshot.total_steps)
    full, empty = "#." if ascii_only else "█░"
    done = int(share * BAR)
    return f"{full * done}{empty * (BAR - done)} {snapshot.step}/{snapshot.total_steps} {share:.0%}"


def losses(snapshot: Snapshot, ascii_only: bool) -> str:
    """The training loss from the first step to the last, and the last; empty before the first."""
    if not snapshot.losses:
        return ""
    last = snapshot.losses[-1]
    return f"{sparkline(snapshot.losses, ascii_only)} {_fixed(last) if math.isfinite(last) else 'not finite'}"


def sparkline(values: list[float], ascii_only: bool = False) -> str:
    """Means of up to SPARKLINE equal parts, lowest to highest block; `x` where a part has a value that is not finite."""
    count = min(SPARKLINE, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0, 0)
    steps = len(blocks) - 1
    return "".join(
        (blocks[round((mean - low) / span * steps)] if span else blocks[0]) if math.isfinite(mean) else "x" for mean in means
    )


def ranks(snapshot: Snapshot) -> str:
    """`2, EP 2`."""
    return "" if snapshot.ranks is None else f"{snapshot.ranks}, EP {snapshot.ep_size or 1}"


def experts(snapshot: Snapshot) -> str:
    """`4.4 of 64, 60 dead`: the effective number in the layer with fewest, and the dead in the layer with most."""
    if snapshot.effective_experts is None or snapshot.experts is None:
        return ""
    dead = "" if snapshot.dead_experts is None else f", {snapshot.dead_experts} dead"
    return f"{snapshot.effective_experts:.1f} of {snapshot.experts}{dead}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _left(snapshot: Snapshot) -> str:
    return "" if snapshot.seconds_left is None else duration(snapshot.seconds_left)


def _rate(snapshot: Snapshot) -> str:
    return "" if snapshot.tokens_per_second is None else f"{snapshot.tokens_per_second:,.0f}"


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
