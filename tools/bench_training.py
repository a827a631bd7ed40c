"""Whole runs of the trainer, measured from outside: its steps, the time to the first one, and the memory of a rank."""

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench_baselines import why_not_pairwise
from tools.bench_table import SPREAD, BenchmarkFailed, Table, spread
from tools.runs import REPOSITORY, Run, command, read_run, start
from trainer.command_line import parse_arguments
from trainer.config import Experiment, load_experiment
from trainer.data import check_source, micro_batches, open_data, prepare_data
from trainer.job import train_order
from trainer.launch import Launch
from trainer.settings import Settings
from trainer.training import run

GIB = 2**30
WARM_UP = 2
"""First steps of a run that are not counted."""
BRIEF = [
    "data.val_documents=32",
    "train.eval_every=1000000",
    "checkpoint.every=1000000",
    "log.tensorboard=false",
    "sample.tokens=0",
]
"""What a run does besides its steps is cut short; `--set` goes before."""


@dataclass
class Measured:
    """One run, and what its ranks' probes reported."""

    run: Run
    ranks: list[dict[str, Any]]


def bench_step(arguments: argparse.Namespace) -> Table:
    """Tokens a second of an experiment, beside the straightforward algorithm on the same text and the batches alone.

    Raises:
        ValueError: an experiment that cannot be trained so.
        BenchmarkFailed: a run ended early.
    """
    if arguments.steps <= WARM_UP:
        raise ValueError(f"--steps {arguments.steps}: the first {WARM_UP} are not counted; give more")
    experiment, _ = check(arguments)
    contenders, notes = ["ours"], []
    why_not = _why_not_straightforward(experiment, arguments.ranks)
    if why_not is None:
        contenders.append("straightforward")
    else:
        notes.append(f"the straightforward algorithm is left out: {why_not}")

    measured: dict[str, list[Measured]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.repeats):
            for name in contenders:
                measured[name].append(measure_run(arguments, Path(scratch) / f"{name}_{turn}", name, arguments.steps))
    steps = {name: [record for one in runs for record in counted(one.run)] for name, runs in measured.items()}
    ours = spread([1e3 * record["seconds"] for record in steps["ours"]])
    table = Table(
        "step",
        conditions(arguments, measured["ours"][0]),
        {"contender": "", **SPREAD, "tokens_per_second": ",.0f", "x_ours": ".3f", "loss": ".4f"},
        notes=notes,
    )
    for name, records in steps.items():
        times = spread([1e3 * record["seconds"] for record in records])
        rates = {"tokens_per_second": statistics.median(record["tokens_per_second"] for record in records)}
        row = {"contender": "the trainer" if name == "ours" else "with straightforward layers and key updates"}
        table.rows.append({**row, **times, **rates, "x_ours": times["ms"] / ours["ms"], "loss": records[-1]["loss"]})
    batches = spread(batch_times(experiment, measured["ours"][0].run))
    table.rows.append({"contender": "making a rank's batches alone", **batches, "x_ours": batches["ms"] / ours["ms"]})
    table.notes.append(f"the first {WARM_UP} steps of a run are not counted; loss: of the last step")
    return table


def bench_startup(arguments: argparse.Namespace) -> Table:
    """Seconds from the command to the end of the first step, by part, on rank 0.

    Raises:
        ValueError: an experiment that cannot be trained so.
        BenchmarkFailed: a run ended early.
    """
    experiment, _ = check(arguments)
    prepared_data(experiment)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [measure_run(arguments, Path(scratch) / str(turn), "ours", steps=1) for turn in range(arguments.repeats)]
    table = Table(
        "startup",
        conditions(arguments, runs[-1]),
        {"part": "", "seconds": ".2f", "seconds_min": ".2f", "seconds_max": ".2f"},
        notes=["the data was prepared before; the evaluation is of 32 documents unless data.val_documents is set"],
    )
    parts_of_runs = [one.ranks[0]["parts"] for one in runs]
    names = [part["part"] for part in parts_of_runs[0]]
    times = {name: [parts[i]["seconds"] for parts in parts_of_runs] for i, name in enumerate(names)}
    times["to the end of the first step"] = [sum(part["seconds"] for part in parts) for parts in parts_of_runs]
    for name, seconds in times.items():
        row = {"part": name, "seconds": statistics.median(seconds)}
        table.rows.append({**row, "seconds_min": min(seconds), "seconds_max": max(seconds)})
    return table


def bench_memory(arguments: argparse.Namespace) -> Table:
    """Memory of the rank that needs most, by what was loaded when, beside the plan of `--dry_run`.

    Raises:
        ValueError: an experiment that cannot be trained so.
        BenchmarkFailed: a run ended early.
    """
    _, plan = check(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            measure_run(arguments, Path(scratch) / str(turn), "ours", arguments.steps) for turn in range(arguments.repeats)
        ]
    rank = max((rank for one in runs for rank in one.ranks), key=lambda rank: rank["largest"])
    after = {part["part"]: part["memory"] for part in rank["parts"]}
    libraries, model, engine = after["deterministic kernels"], after["model and pool"], after["engine"]
    planned = float(re.search(r"([\d.]+) GiB", plan)[1])
    table = Table(
        "memory",
        {**conditions(arguments, runs[0]), "steps": arguments.steps},
        {"what": "", "GiB": ".2f", "planned_GiB": ".2f", "x_planned": ".2f"},
        notes=[
            " ".join(plan.split()),
            "the plan counts tensors: neither the process and its libraries, nor what they keep for themselves",
        ],
    )
    rows = {
        "process, libraries and data": libraries,
        "model and pool": model - libraries,
        "engine": engine - model,
        "steps, evaluation and checkpoint": rank["largest"] - engine,
        "at most": rank["largest"],
    }
    table.rows = [{"what": what, "GiB": size / GIB} for what, size in rows.items()]
    needed = (rank["largest"] - libraries) / GIB
    row = {"what": "at most, beyond the libraries", "GiB": needed, "planned_GiB": planned}
    table.rows.append({**row, "x_planned": needed / planned} if planned else row)
    return table


def check(arguments: argparse.Namespace) -> tuple[Experiment, str]:
    """The experiment as it will be run, and the line of `--dry_run` about memory.

    Raises:
        ValueError: as the trainer does for the same flags.
    """
    flags = ["--dry_run", "--experiment", arguments.experiment, "--ds_config", arguments.ds_config]
    for setting in settings_of(arguments):
        flags += ["--set", setting]
    launch = Launch(rank=0, world_size=arguments.ranks, local_rank=0, local_world_size=arguments.ranks)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        parsed = parse_arguments(flags)
        run(parsed, Settings.read(parsed, launch))
    experiment = load_experiment(arguments.experiment, settings_of(arguments))
    check_source(experiment.data)
    plan = next(line for line in printed.getvalue().splitlines() if line.startswith("memory a rank"))
    return experiment, plan


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """The brief run's, then the user's."""
    return [*BRIEF, *arguments.set]


def conditions(arguments: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """What holds for all rows of a table."""
    rank, how = measured.ranks[0], measured.run.start
    layout = {key: how[key] for key in ("world_size", "ep_size", "micro_batch", "accumulation", "precision")}
    settings = {"settings": " ".join(arguments.set)} if arguments.set else {}
    return {
        "experiment": arguments.experiment,
        **settings,
        **layout,
        "repeats": arguments.repeats,
        "device": rank["device"],
        "threads a rank": rank["threads"],
    }


def measure_run(arguments: argparse.Namespace, folder: Path, which: str, steps: int) -> Measured:
    """Run the trainer for `steps` steps under the probe.

    Raises:
        BenchmarkFailed: the run ended early.
    """
    report = folder.with_name(f"{folder.name}_report")
    script = [str(REPOSITORY / "tools" / "bench_probe.py"), str(report), repr(time.time()), which]
    words = command(
        arguments.experiment, settings_of(arguments), folder, arguments.ds_config, arguments.ranks, steps, script
    )
    with open(folder.with_name(f"{folder.name}.log"), "w", encoding="utf-8") as log:
        failure = start(words, log)
    if failure is not None:
        raise BenchmarkFailed(f"the run of {arguments.experiment} ({which}) failed: {failure}")
    ranks = [Path(f"{report}.{rank}.json") for rank in range(arguments.ranks)]
    return Measured(read_run(folder), [json.loads(path.read_text(encoding="utf-8")) for path in ranks])


def counted(run: Run) -> list[dict[str, Any]]:
    """The records of its steps after the warm-up."""
    return [record for record in run.of("train") if record["step"] > WARM_UP]


def prepared_data(experiment: Experiment) -> Path:
    """The folder of its tokenised data."""
    model = experiment.model
    return prepare_data(experiment.data, model.vocab_size, model.max_seq_len, experiment.seed)


def batch_times(experiment: Experiment, run: Run) -> list[float]:
    """Milliseconds that rank 0 needs for the batches of each counted step, and for nothing else."""
    dataset, how = open_data(prepared_data(experiment)), run.start
    order, times = train_order(experiment, dataset), []
    for step in range(run.step):
        began = time.perf_counter()
        micro_batches(dataset.train, order.sequence_ids(step), 0, how["world_size"], how["micro_batch"])
        if step >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - began))
    return times


def _why_not_straightforward(experiment: Experiment, ranks: int) -> str | None:
    """Why there is nothing to compare this experiment with; None if there is."""
    if experiment.model.channel_mixer != "some":
        return "the experiment has no SoME layers"
    if ranks > 1:
        return "it runs in one process; give --ranks 1"
    return why_not_pairwise(experiment.model.some.rules)
