"""Measure the parts of the trainer on this machine, each beside what it can be compared with.

    python tools/bench.py                                          # layer and update, about two minutes
    python tools/bench.py layer --tokens 2048 8192 --experts 64
    python tools/bench.py layer --precision fp32
    python tools/bench.py step --experiment a4 --set data.path=DIR
    python tools/bench.py exchange --json figures.json

Each subcommand prints one table. Contenders take turns, so a machine whose speed drifts treats them alike; figures are
medians with the smallest and largest. Close other programs before you take figures of record.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.bench_exchange import bench_exchange
from tools.bench_layer import DTYPES, bench_layer, bench_update
from tools.bench_table import BenchmarkFailed, Table, machine
from tools.bench_training import bench_memory, bench_startup, bench_step
from tools.outputs import check_writable, read_paths, write_output
from tools.runs import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, stop_on_signals
from trainer.console import guard_streams
from trainer.precision import AUTO, best_precision
from trainer.text import error_line

DEFAULT = ("layer", "update")


@dataclass(frozen=True)
class Benchmark:
    """A subcommand."""

    run: Callable[[argparse.Namespace], Table]
    help: str
    experts: list[int] | None = None
    """Default pool sizes of one that measures a layer; None = it runs the trainer."""
    ranks: int | None = None
    """Default number of processes; None = always one."""
    steps: int | None = None
    """Default number of training steps of a run; None = not to choose."""
    repeats: int = 5
    """Default number of counted turns."""
    has_chunks: bool = False
    """Whether it can cut what travels into chunks."""


BENCHMARKS = {
    "layer": Benchmark(bench_layer, "forward and backward of a layer", experts=[64, 512]),
    "update": Benchmark(bench_update, "the key update after a step", experts=[64, 512]),
    "exchange": Benchmark(
        bench_exchange, "a layer whose experts are spread over ranks", experts=[64], ranks=2, has_chunks=True
    ),
    "step": Benchmark(bench_step, "training steps of an experiment", ranks=1, steps=12, repeats=2),
    "startup": Benchmark(bench_startup, "from the command to the end of the first step", ranks=1, repeats=3),
    "memory": Benchmark(bench_memory, "the largest resident size of a rank", ranks=1, steps=4, repeats=1),
}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    guard_streams()
    try:
        with stop_on_signals():
            run(parse_arguments(arguments))
    except ValueError as error:
        fail(error, EXIT_REFUSED)
    except BenchmarkFailed as error:
        fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)


def fail(error: Exception, code: int) -> NoReturn:
    """One line and the exit code."""
    print(error_line(error), file=sys.stderr, flush=True)
    sys.exit(code)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    json_help = "also write the figures there; - prints them instead of the table"
    parser = argparse.ArgumentParser(
        prog="tools/bench.py",
        description="Measure the parts of the trainer on this machine.",
        epilog=f"Without a subcommand: {' and '.join(DEFAULT)}.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE|-", help=json_help)
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=benchmark.help, description=f"Measure {benchmark.help}.", allow_abbrev=False
        )
        # Not given here, it is the one before the subcommand.
        command.add_argument("--json", metavar="FILE|-", default=argparse.SUPPRESS, help=json_help)
        add_flags(command.add_argument, benchmark)
    return parser.parse_args(arguments)


def add_flags(add: Callable, benchmark: Benchmark) -> None:
    """The flags of one subcommand."""
    add("--repeats", type=int, default=benchmark.repeats, metavar="N", help="counted turns (default %(default)s)")
    if benchmark.ranks is not None:
        add("--ranks", type=int, default=benchmark.ranks, metavar="N", help="processes (default %(default)s)")
    if benchmark.experts is not None:
        add("--tokens", type=int, nargs="+", default=[8192], metavar="T", help="tokens in a batch (default 8192)")
        add("--experts", type=int, nargs="+", default=benchmark.experts, metavar="E", help="pool sizes, default %(default)s")
        add("--top_k", type=int, default=4, metavar="K", help="experts a token (default 4)")
        add("--d_model", type=int, default=512, metavar="D", help="width (default 512)")
        add("--d_ffn", type=int, default=1024, metavar="F", help="hidden width of an expert (default 1024)")
        help = "of experts and inputs; auto: what a run takes on this machine (default %(default)s)"
        add("--precision", choices=[AUTO, *DTYPES], default=AUTO, help=help)
        if benchmark.has_chunks:
            add("--chunks", type=int, nargs="+", default=[1], metavar="C", help="parallel.chunks (default 1)")
        return
    add("--experiment", default="quickstart", metavar="NAME|FILE.yaml", help="what to train (default quickstart)")
    add("--set", action="append", default=[], metavar="a.b=c", help="change one key of the experiment")
    add("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2.json"), metavar="FILE", help="DeepSpeed JSON")
    if benchmark.steps is not None:
        add("--steps", type=int, default=benchmark.steps, metavar="N", help="steps of a run (default %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Everything that was asked for.

    Raises:
        ValueError: what cannot work, before anything runs.
        BenchmarkFailed: a process that was measured ended early.
    """
    chosen = [arguments]
    if arguments.command is None:
        chosen = [parse_arguments([command]) for command in DEFAULT]
    for one in chosen:
        check(one)
        if getattr(one, "precision", None) == AUTO:
            one.precision = best_precision(one.d_model, one.d_ffn, local_rank=0).name
    if arguments.json not in (None, "-"):
        read_paths(arguments, "json")
        check_writable(arguments.json, "--json")
    tables, hardware = [], machine()
    for one in chosen:
        tables.append(BENCHMARKS[one.command].run(one))
        if arguments.json != "-":
            print(tables[-1].text() + "\n", flush=True)
    if arguments.json != "-":
        print(", ".join(f"{name} {value}" for name, value in hardware.items()), flush=True)
    if arguments.json is None:
        return
    text = json.dumps({"machine": hardware, "tables": [table.to_dict() for table in tables]}, indent=1)
    if arguments.json == "-":
        print(text)
    else:
        write_output(arguments.json, text + "\n", "--json")


def check(arguments: argparse.Namespace) -> None:
    """Refuse numbers below one."""
    for name in ("repeats", "ranks", "tokens", "experts", "top_k", "d_model", "d_ffn", "chunks", "steps"):
        values = getattr(arguments, name, [])
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"--{name} {value}: must be at least 1")


if __name__ == "__main__":
    main()
