"""Run published experiments, or any that is shipped, and put what they measured beside what was published.

    python tools/reproduce.py v3-1-v1 cmp-dense-tinystories --seeds 3 --set data.path=DIR
    python tools/reproduce.py v4-a4 --control none --control attention_only
    python tools/reproduce.py v3-1-v1 v7-clamp --scale small    # a minute each, built-in stories, no network
    python tools/reproduce.py --collect                         # only the table of what is there

Every run is one process of trainer/run.py with its own folder, so it can be stopped and called again at any time: what
is finished stays, what is not goes on.
"""

import argparse
import difflib
import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.outputs import check_writable, make_output_folder, read_paths, write_output
from tools.results import SMALL, Row, changed_settings
from tools.results_table import CONVENTIONS, RULE, brief, markdown
from tools.runs import (
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    FAILED,
    command,
    read_run,
    start,
    stop_on_signals,
)
from trainer.config import Experiment, experiment_names, load_experiment
from trainer.console import guard_streams
from trainer.controls import CONTROLS
from trainer.ds_config import load_ds_config, read_precision
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.paths import local_path
from trainer.precision import AUTO
from trainer.runfolder import check_writable as check_folder
from trainer.text import error_line

SMALL_STEPS = 40


@dataclass(frozen=True)
class Entry:
    """One run of the list."""

    experiment_id: str
    control: str | None
    seed: int

    @property
    def name(self) -> str:
        """Folder of all seeds."""
        return f"{self.experiment_id}+{self.control}" if self.control else self.experiment_id

    @property
    def folder(self) -> str:
        """Folder of the run in the output folder."""
        return f"{self.name}/seed_{self.seed}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tools/reproduce.py",
        description="Run experiments and compare with what was published.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("ids", nargs="*", metavar="ID", help="published run or other shipped experiment; trainer/run.py --list names them")
    add("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 of each (default 1)")
    add("--control", action="append", metavar="NAME", help="run this control, as often as you like; none = the experiment")
    add("--scale", choices=["full", "small"], default="full", help="small: a reduction that takes about a minute")
    add("--set", action="append", default=[], metavar="a.b=c", help="change one key of every experiment")
    add("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2.json"), metavar="FILE", help="DeepSpeed JSON")
    add("--output_dir", metavar="DIR", help="folder of all runs (default runs/reproduce, small: runs/reproduce_small)")
    add("--max_steps", type=int, metavar="N", help="stop every run early; the schedule stays the experiment's")
    add("--allow_fewer_documents", action="store_true", help="run also where the data has fewer; the table marks it")
    add("--ranks", type=int, default=1, metavar="N", help="processes of each run, on this machine (default 1)")
    add("--collect", action="store_true", help="run nothing; write the table of what is there")
    add("--task", metavar="N|list", help="run only number N of the list, from 0, and write no table; list = print the list")
    add("--json", metavar="FILE", help="where the results go, and beside it as .md (default DIR/results.json)")
    chosen = parser.parse_intermixed_args(arguments)
    # A run at one scale does not go on at the other.
    chosen.output_dir = chosen.output_dir or ("runs/reproduce" if chosen.scale == "full" else "runs/reproduce_small")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    guard_streams()
    try:
        code = reproduce(parse_arguments(arguments))
    except ValueError as error:
        print(error_line(error), file=sys.stderr, flush=True)
        code = EXIT_REFUSED
    sys.exit(code)


def reproduce(arguments: argparse.Namespace) -> int:
    """Everything that was asked for; the exit code.

    Raises:
        ValueError: what cannot work, before anything runs.
    """
    read_paths(arguments, "output_dir", "json")
    arguments.ds_config = local_path(arguments.ds_config, "--ds_config")
    entries = plan(arguments)
    if arguments.task == "list":
        for number, entry in enumerate(entries):
            print(f"{number:4}  {entry.folder}")
        print(f"{len(entries)} runs: --task 0 to {len(entries) - 1}")
        return 0
    code = 0
    if not arguments.collect:
        chosen = entries if arguments.task is None else [pick(entries, arguments.task)]
        experiments = [check(entry, arguments) for entry in chosen]
        # The tasks of an array write no results, and would test the same file at the same time.
        if arguments.task is None:
            make_output_folder(arguments.output_dir, "--output_dir")
            check_results(arguments)
        try:
            with stop_on_signals():
                for number, (entry, experiment) in enumerate(zip(chosen, experiments, strict=True), 1):
                    print(f"[{number}/{len(chosen)}] {entry.folder}: ", end="", flush=True)
                    if not carry_out(entry, experiment, arguments):
                        code = EXIT_FAILED
        except KeyboardInterrupt:
            print("stopped; the same command goes on from the last checkpoint", flush=True)
            code = EXIT_STOPPED
    # The tasks of an array end at any time and would overwrite each other's tables.
    if arguments.task is None:
        write_results(entries, arguments)
    return code


def plan(arguments: argparse.Namespace) -> list[Entry]:
    """The list of runs."""
    for name, value in (("seeds", arguments.seeds), ("ranks", arguments.ranks), ("max_steps", arguments.max_steps)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    if arguments.json is not None and Path(arguments.json).suffix == ".md":
        raise ValueError(f"--json {arguments.json}: the table goes beside it as .md, over it; name it .json")
    if arguments.collect and arguments.task is not None:
        raise ValueError(f"--task {arguments.task} runs and --collect runs nothing; give one of them")
    if not arguments.ids and not arguments.collect:
        raise ValueError("no experiment named; give one or more, for example v3-1-v1, or --collect")
    known, controls = experiment_names(), ["none", *CONTROLS]
    for kind, names, choices in (("experiment", arguments.ids, known), ("--control", arguments.control or [], controls)):
        for name in names:
            if name not in choices:
                close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
                raise ValueError(f"{kind} {name}: unknown; {f'did you mean {close[0]}' if close else f'known: {choices}'}?")
    for text in arguments.set:
        key = text.partition("=")[0].strip()
        if key in ("seed", "control", "name"):
            raise ValueError(f"--set {text}: this tool sets {key} itself; use --seeds, --control or --output_dir")
    chosen = [None if name == "none" else name for name in arguments.control or ["none"]]
    return [
        Entry(experiment_id, control, seed)
        for experiment_id in dict.fromkeys(arguments.ids)
        for control in dict.fromkeys(chosen)
        for seed in range(arguments.seeds)
    ]


def pick(entries: list[Entry], task: str) -> Entry:
    """Number `task` of the list."""
    if not re.fullmatch(r"\d+", task) or int(task) >= len(entries):
        raise ValueError(f"--task {task}: the list has {len(entries)} runs; give 0 to {len(entries) - 1}, or list")
    return entries[int(task)]


def overrides(entry: Entry, arguments: argparse.Namespace) -> list[str]:
    """The --set of one run; later ones count."""
    own = arguments.set
    has_data = any(text.partition("=")[0].strip() == "data.path" for text in own)
    small = small_scale(load_experiment(entry.experiment_id), has_data) if arguments.scale == "small" else []
    fewer = ["data.allow_fewer=true"] if arguments.allow_fewer_documents else []
    control = [f"control={entry.control}"] if entry.control else []
    return [*small, *fewer, *own, *control, f"seed={entry.seed}"]


def small_scale(experiment: Experiment, has_data: bool) -> list[str]:
    """A reduction of the same kind: rules, conventions and routing stay, sizes shrink.

    Without data of the user's own it learns built-in stories. The rules' own clocks (warm-up of the decay) stay, so what
    they switch on after hundreds of steps does not happen in it.
    """
    model, some, data, train = experiment.model, experiment.model.some, experiment.data, experiment.train
    sizes = {f"model.{key}": value for key, value in SMALL.items()}
    sizes["model.max_seq_len"] = min(model.max_seq_len, 128)
    if model.channel_mixer == "some":
        experts = min(some.num_experts, 16)
        sizes |= {"model.some.num_experts": experts, "model.some.top_k": min(some.top_k, 4), "model.some.d_ffn": 64}
    elif model.d_ffn is not None:
        sizes["model.d_ffn"] = 128
    steps = min(train.steps or SMALL_STEPS, SMALL_STEPS)
    values = sizes | {
        "data.train_documents": min(data.train_documents or 1000, 1000),
        "data.val_documents": min(data.val_documents or 200, 200),
        "data.tokenizer_documents": "null",
        "data.tokenizer_from": "null",
        "train.batch_size": min(train.batch_size, 32),
        "train.max_micro_batch": 32,
        "train.steps": steps,
        "train.warmup_steps": min(train.warmup_steps, steps // 10),
        "train.eval_every": steps,
        "log.tensorboard": "false",
        "sample.tokens": 0,
    }
    if not has_data:
        values |= {"data.name": "stories", "data.path": "null"}
    return [f"{key}={value}" for key, value in values.items()]


def check(entry: Entry, arguments: argparse.Namespace) -> Experiment:
    """The run's experiment, checked as the trainer will."""
    try:
        experiment = load_experiment(entry.experiment_id, overrides(entry, arguments))
        without = [setting for setting in overrides(entry, arguments) if not setting.startswith("control=")]
        if entry.control and load_experiment(entry.experiment_id, without).model == experiment.model:
            raise ValueError(f"--control {entry.control} changes nothing here; leave it out")
        layout = Layout.of(experiment, Launch(0, arguments.ranks, 0, arguments.ranks))
        load_ds_config(arguments.ds_config, experiment, layout, arguments.ranks)
        check_folder(Path(arguments.output_dir) / entry.folder)
    except ValueError as error:
        raise ValueError(f"{entry.name}: {error}") from None
    return experiment


def carry_out(entry: Entry, experiment: Experiment, arguments: argparse.Namespace) -> bool:
    """Start or continue one run, unless it is done; whether all is well."""
    folder = Path(arguments.output_dir) / entry.folder
    run, failed = read_run(folder, entry.seed), folder / FAILED
    precision = read_precision(arguments.ds_config)
    is_ours = run.experiment is not None and not changed_settings(experiment, run.experiment)
    failed.unlink(missing_ok=True)
    # A run with other settings is left to the trainer, which refuses to mix them.
    if is_ours and precision in (AUTO, run.start.get("precision")) and run.is_done(arguments.max_steps):
        print("finished" if run.finished else f"stopped as asked at {run.progress}", flush=True)
        return True
    print(f"found at {run.progress}" if run.records else "new", flush=True)
    settings = overrides(entry, arguments)
    words = command(entry.experiment_id, settings, folder, arguments.ds_config, arguments.ranks, arguments.max_steps)
    reason = start(words)
    if reason is None:
        return True
    print(f"{entry.folder} failed: {reason}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    failed.write_text(reason + "\n", encoding="utf-8")
    return False


def collect(entries: list[Entry], output_dir: Path) -> list[Row]:
    """A row for everything that was asked for, then for everything else in the folder."""
    seeds: dict[tuple[str, str | None], set[int]] = {}
    for entry in entries:
        seeds.setdefault((entry.experiment_id, entry.control), set()).add(entry.seed)
    known = experiment_names()
    for folder in sorted(output_dir.glob("*/seed_*")):
        experiment_id, plus, control = folder.parent.name.partition("+")
        number = folder.name.removeprefix("seed_")
        if number.isdecimal() and experiment_id in known and (control in CONTROLS or not plus):
            seeds.setdefault((experiment_id, control or None), set()).add(int(number))
    return [
        Row(key[0], key[1], [read_run(output_dir / Entry(*key, seed).folder, seed) for seed in sorted(numbers)])
        for key, numbers in seeds.items()
    ]


def check_results(arguments: argparse.Namespace) -> None:
    """Refuse results that could not be written."""
    for path in results_paths(arguments):
        check_writable(path, "--output_dir" if arguments.json is None else "--json")


def results_paths(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where the results go, as JSON and as Markdown."""
    path = Path(arguments.json or Path(arguments.output_dir) / "results.json")
    return path, path.with_suffix(".md")


def write_results(entries: list[Entry], arguments: argparse.Namespace) -> None:
    """The table as JSON and Markdown, and its gist on the terminal."""
    output_dir = Path(arguments.output_dir)
    rows = collect(entries, output_dir)
    if not rows:
        raise ValueError(f"--output_dir {output_dir}: holds no runs; name an experiment to run")
    check_results(arguments)
    as_json, as_markdown = results_paths(arguments)
    values = {
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "rule": RULE,
        "conventions": CONVENTIONS,
        "rows": [row.to_dict() for row in rows],
    }
    flag = "--output_dir" if arguments.json is None else "--json"
    write_output(as_json, json.dumps(values, indent=1) + "\n", flag)
    write_output(as_markdown, markdown(rows), flag)
    print("\n".join(brief(row) for row in rows))
    print(f"results: {as_json} and {as_markdown}", flush=True)


if __name__ == "__main__":
    main()
