"""The runs of a grid over settings: every combination of values, each with a folder of its own.

    python tools/grid.py a4 --grid train.learning_rate=3e-4,6e-4 --grid seed=0,1,2 --set data.path=DIR

prints the runs and the command that submits them as a job array. slurm/sweep.sh asks with --task for the run of its task.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.runs import EXIT_FAILED, EXIT_REFUSED
from trainer.config import load_experiment
from trainer.console import all_printed, guard_streams
from trainer.paths import local_path
from trainer.text import error_line, shown, visible

MAX_NAME = 255
"""Bytes that file systems give a name."""


@dataclass(frozen=True)
class GridRun:
    """One combination."""

    settings: tuple[str, ...]
    """`a.b=c` for every key of the grid."""
    folder: Path
    """Where it goes, named by its settings."""


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what is not of this tool and goes to trainer/run.py."""
    parser = argparse.ArgumentParser(prog="tools/grid.py", description="The runs of a grid.", allow_abbrev=False)
    add = parser.add_argument
    add("experiment", metavar="NAME|FILE.yaml", help="what to train; trainer/run.py --list names what there is")
    add("--grid", action="append", required=True, metavar="a.b=x,y", help="values of one key, as often as you like")
    add("--set", action="append", default=[], metavar="a.b=c", help="change one key of every run")
    add("--output_dir", default="runs/sweep", metavar="DIR", help="folder of all runs (default runs/sweep)")
    add("--part", action="store_true", help="allow an array that is only a part of the grid")
    add("--task", action="store_true", help="print the trainer's arguments for this task of a job array, for slurm/sweep.sh")
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    guard_streams()
    words = sys.argv[1:] if arguments is None else arguments
    chosen, others = parse_arguments(words)
    try:
        runs = plan(chosen)
        if chosen.task:
            task = array_task(os.environ, len(runs), chosen.part)
            # For a program, which wants a folder's very name and not what the terminal's encoding can show of it.
            words = [os.fsencode(word) + b"\0" for word in trainer_arguments(chosen, runs[task], others)]
            sys.stdout.buffer.write(b"".join(words))
            if not all_printed():
                sys.exit(EXIT_FAILED)
            return
    except ValueError as error:
        print(error_line(error), file=sys.stderr, flush=True)
        sys.exit(EXIT_REFUSED)
    for number, run in enumerate(runs):
        print(visible(f"{number:4}  {run.folder}"))
    print(visible(f"{len(runs)} runs: sbatch --array=0-{len(runs) - 1} slurm/sweep.sh {shlex.join(words)}"))
    if not all_printed():
        sys.exit(EXIT_FAILED)


def plan(chosen: argparse.Namespace) -> list[GridRun]:
    """Every run, the last key changing fastest.

    Raises:
        ValueError: a setting that the trainer would refuse, a run that is given twice, or runs that would share a folder.
    """
    axes = [parse_axis(text) for text in chosen.grid]
    keys = [axis[0].partition("=")[0] for axis in axes] + [text.partition("=")[0].strip() for text in chosen.set]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice; put all its values into one --grid")
    parent = Path(local_path(chosen.output_dir, "--output_dir")) / Path(chosen.experiment).stem
    # A value may be a path.
    runs = [GridRun(settings, parent / ",".join(settings).replace("/", "_")) for settings in itertools.product(*axes)]
    folders, found = Counter(run.folder for run in runs), {}
    for run in runs:
        name = run.folder.name
        if folders[run.folder] > 1:
            raise ValueError(f"--grid: two runs would go to {run.folder}; give each value once")
        if len(os.fsencode(name)) > MAX_NAME:
            raise ValueError(f"--grid: {shown(name)} is too long to name a folder; put what all runs share into --set")
        experiment = load_experiment(chosen.experiment, [*chosen.set, *run.settings])
        # Values may be equal in other spelling, such as 1e-3 and 0.001.
        twin = found.setdefault(json.dumps(experiment.to_dict()), run)
        if twin is not run:
            raise ValueError(f"--grid: {','.join(twin.settings)} and {','.join(run.settings)} are one run; leave one out")
    return runs


def parse_axis(text: str) -> list[str]:
    """`seed=0,1` as `seed=0` and `seed=1`. A comma within brackets belongs to a value."""
    key, separator, values = text.partition("=")
    found = re.findall(r"(?:\[[^\]]*\]|[^,])+", values)
    if not separator or not key.strip() or len(found) != len(re.split(r",(?![^\[]*\])", values)):
        raise ValueError(f"--grid {text}: write it as key=value,value, for example --grid seed=0,1,2")
    return [f"{key.strip()}={value.strip()}" for value in found]


def array_task(environment: Mapping[str, str], runs: int, is_part: bool) -> int:
    """This task's number, from the variables of a SLURM job array.

    Raises:
        ValueError: no array, or one of another size than the grid.
    """
    if environment.get("SOME_EXPERIMENT"):
        raise ValueError(f"SOME_EXPERIMENT = {environment['SOME_EXPERIMENT']} would replace the grid's experiment; unset it")
    if "SLURM_ARRAY_TASK_ID" not in environment:
        raise ValueError(f"not a task of a job array; submit with sbatch --array=0-{runs - 1}")
    count, last = int(environment["SLURM_ARRAY_TASK_COUNT"]), int(environment["SLURM_ARRAY_TASK_MAX"])
    if last >= runs or (count != runs and not is_part):
        part = ", or a part of it and --part" if last < runs else ""
        raise ValueError(
            f"--array has {count} tasks up to {last} and the grid {runs} runs; submit with --array=0-{runs - 1}{part}"
        )
    return int(environment["SLURM_ARRAY_TASK_ID"])


def trainer_arguments(chosen: argparse.Namespace, run: GridRun, others: list[str]) -> list[str]:
    """The experiment, and what follows it for slurm/body.sh."""
    settings = [word for setting in (*chosen.set, *run.settings) for word in ("--set", setting)]
    return [chosen.experiment, *settings, *others, "--output_dir", str(run.folder)]


if __name__ == "__main__":
    main()
