"""Run a study: variants of one experiment over several seeds, compared in pairs.

    python tools/study.py --set data.path=DIR                 # tools/study.yaml, the study of docs/results.md
    python tools/study.py --study my_study.yaml --seeds 5 --jobs 4

Runs are resumed, or left alone if they are finished. Equal seeds share data, data order and the initial values of embedding,
attention and head, so differences are taken seed by seed.
"""

import argparse
import json
import math
import os
import statistics
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.outputs import check_writable, make_output_folder, read_paths, write_output
from tools.results import changed_settings
from tools.runs import EXIT_FAILED, EXIT_REFUSED, Run, command, read_run, start, stop_all, stop_on_signals
from trainer.config import load_experiment
from trainer.console import guard_streams
from trainer.ds_config import read_precision
from trainer.paths import local_path
from trainer.plain_yaml import as_written, is_spelled, type_name
from trainer.precision import AUTO
from trainer.runfolder import check_writable as check_folder
from trainer.text import error_line, read_yaml, shown
from trainer.typed import nearest

# Two-sided 95 % quantiles of Student's t by degrees of freedom (any statistics textbook).
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

RESULTS = ("results.json", "results.md")
MAX_NAME = 200
"""Bytes of a variant's name."""
MAX_VALUES = 10_000
"""Values in a variant's overrides, which aliases of YAML may repeat without end."""


@dataclass(frozen=True)
class Study:
    """What `study.yaml` holds."""

    experiment: str
    """The experiment that all variants change."""
    variants: dict[str, dict]
    """Name of a variant: its overrides, key path to value."""
    groups: list[dict]
    """Tables: title, question, baseline, variants."""

    @staticmethod
    def read(path: Path) -> "Study":
        """Raises:
        ValueError: a file that cannot be read, or a group that names an unknown variant.
        """
        values = read_yaml(path, f"--study {path}")
        try:
            study = Study(values["experiment"], dict(values["variants"]), list(values["groups"]))
            named = [(g["title"], g["question"], g["baseline"], g["variants"]) for g in study.groups]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"--study {path}: needs experiment, variants and groups of title, question, baseline and variants "
                f"({type(error).__name__}: {error}); see tools/study.yaml"
            ) from None
        try:
            if not isinstance(study.experiment, str):
                raise ValueError(f"experiment = {shown(study.experiment)} is not text; put it in quotes")
            check_folders(study.variants)
            for name, changes in study.variants.items():
                check_changes(name, changes)
            for title, question, baseline, variants in named:
                if not (isinstance(title, str) and isinstance(question, str) and isinstance(variants, list)):
                    raise ValueError(f"group {shown(title)}: title and question must be texts, and variants a list of names")
                for name in [baseline, *variants]:
                    check_known(f"group {title!r} names", name, study.variants)
        except ValueError as error:
            raise ValueError(f"--study {path}: {error}") from None
        return study

    def settings(self, variant: str) -> list[str]:
        """The variant as --set overrides."""
        return [
            f"{key}={value.text if is_spelled(value) else json.dumps(value)}"
            for key, value in (self.variants[variant] or {}).items()
        ]


def folder_name(variant: str) -> str:
    """The folder of a variant's runs, in that of the study."""
    return variant.replace(" ", "_")


def check_folders(variants: dict[Any, Any]) -> None:
    """Refuse names that no folder can have, and two variants of one folder, on whatever file system.

    Raises:
        ValueError: naming them.
    """
    taken = {name: f"the study's {name}" for name in RESULTS}
    for variant in variants:
        if not isinstance(variant, str):
            raise ValueError(f"variant {shown(as_written(variant))} is {type_name(variant)}, not text; put it in quotes")
        folder = folder_name(variant)
        is_name = folder.isprintable() and "/" not in folder and not folder.startswith(".") and not folder.endswith(".")
        if not folder or not is_name or len(os.fsencode(folder)) > MAX_NAME:
            raise ValueError(
                f"variant {shown(variant)} cannot name a folder; give it 1 to {MAX_NAME} bytes that print, without / and "
                f"with no dot at either end"
            )
        place = unicodedata.normalize("NFC", folder).casefold()
        if place in taken:
            raise ValueError(f"variant {variant!r} and {taken[place]} would share the folder {folder}; rename one")
        taken[place] = f"variant {variant!r}"


def check_changes(name: str, changes: Any) -> None:
    """Raises ValueError where a variant's overrides are not keys and plain values of a reasonable size."""
    if not isinstance(changes, dict | None):
        raise ValueError(f"variant {name!r} = {shown(changes)}; write its overrides as keys and values")
    left, count = [changes], 0
    while left:
        value, count = left.pop(), count + 1
        left += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if not isinstance(value, dict | list | str | int | float | None) or count > MAX_VALUES:
            what = f"has over {MAX_VALUES:,} values" if count > MAX_VALUES else f"holds {shown(value)}, {type_name(value)}"
            raise ValueError(f"variant {name!r} {what}; write plain texts and numbers")


def check_known(where: str, name: Any, variants: dict[str, Any]) -> None:
    """Raises ValueError where a name is no variant's."""
    if not isinstance(name, str):
        raise ValueError(f"{where} {shown(as_written(name))}, {type_name(name)}, not text; put it in quotes")
    if name not in variants:
        raise ValueError(f"{where} {name!r}, no variant; {nearest(name, list(variants))}add it, or correct the group")


def main() -> None:
    """The command line."""
    guard_streams()
    try:
        code = run(parse_arguments())
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        code = EXIT_REFUSED
    sys.exit(code)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="tools/study.py", description="Variants of one experiment, compared in pairs.")
    parser.add_argument("--study", default=str(REPOSITORY / "tools" / "study.yaml"), metavar="FILE")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants alone")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 .. N-1 (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key in every run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (default 1)")
    parser.add_argument("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2.json"), metavar="FILE")
    parser.add_argument("--output_dir", default="runs/study", metavar="DIR")
    parser.add_argument("--collect", action="store_true", help="run nothing; write the tables of what is there")
    chosen = parser.parse_args(arguments)
    read_paths(chosen, "study", "output_dir")
    chosen.ds_config = local_path(chosen.ds_config, "--ds_config")
    return chosen


def run(arguments: argparse.Namespace) -> int:
    """Check everything, run what is missing, write `results.json` and `results.md` in the output folder; the exit code."""
    study = Study.read(arguments.study)
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise ValueError(f"--seeds {arguments.seeds} and --jobs {arguments.jobs} must be at least 1")
    for name in arguments.only or []:
        if name not in study.variants:
            raise ValueError(f"--only {name}: unknown; known: {', '.join(map(repr, study.variants))}")
    for name in study.variants:
        try:
            load_experiment(study.experiment, [*study.settings(name), *arguments.set])
        except ValueError as error:
            raise ValueError(f"variant {name!r}: {error}") from None
    read_precision(arguments.ds_config)
    check_folder(arguments.output_dir)
    make_output_folder(arguments.output_dir, "--output_dir")
    as_json, as_markdown = (arguments.output_dir / name for name in RESULTS)
    for path in (as_json, as_markdown):
        check_writable(path, "--output_dir")
    failures = [] if arguments.collect else run_missing(study, arguments)
    results = collect(study, arguments)
    text = tables(study, results)
    print(text)
    try:
        write_output(as_json, json.dumps(results, indent=1) + "\n", "--output_dir")
        write_output(as_markdown, text, "--output_dir")
    except ValueError as error:
        failures.append(f"{error}; --collect writes the tables of what is there")
        print(error_line(ValueError(failures[-1])), file=sys.stderr)
    return EXIT_FAILED if failures else 0


def run_missing(study: Study, arguments: argparse.Namespace) -> list[str]:
    """Run every variant and seed that is not finished, and say what failed.

    Seed by seed, so that a study cut short is a smaller study.
    """
    names = arguments.only or list(study.variants)
    chosen = [(name, seed) for seed in range(arguments.seeds) for name in names]
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)

    def one(job: tuple[str, int]) -> None:
        name, seed = job
        folder, settings = _folder(arguments, name, seed), [*study.settings(name), *arguments.set, f"seed={seed}"]
        # A run with other settings is left to the trainer, which refuses to mix them.
        if not _is_stale(folder, study, name, seed, arguments) and read_run(folder, seed).is_done(None):
            print(f"{name}, seed {seed}: was finished", flush=True)
            return
        if is_stopping.is_set():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8") as log:
            failure = start(command(study.experiment, settings, folder, arguments.ds_config), log, threads)
        print(f"{name}, seed {seed}: {failure or 'finished'}", flush=True)
        if failure:
            failures.append(f"{name}, seed {seed}: {failure}")

    failures: list[str] = []
    is_stopping = threading.Event()
    pool = ThreadPoolExecutor(arguments.jobs)
    with stop_on_signals():
        try:
            list(pool.map(one, chosen))
        except KeyboardInterrupt:
            is_stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            pool.shutdown()  # what the runs ended with is said before the last word
            failures.append("stopped; the same command goes on from the last checkpoints")
            print(failures[-1], flush=True)
    pool.shutdown()
    return failures


def _is_stale(folder: Path, study: Study, name: str, seed: int, arguments: argparse.Namespace) -> bool:
    """Whether the folder holds a run of other settings or another precision than are asked for."""
    found = read_run(folder, seed)
    if found.experiment is None:
        return False
    asked = load_experiment(study.experiment, [*study.settings(name), *arguments.set, f"seed={seed}"])
    precision = read_precision(arguments.ds_config)
    other_precision = found.start.get("precision") not in (None, precision) and precision != AUTO
    return bool(changed_settings(asked, found.experiment)) or other_precision


def _folder(arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    return arguments.output_dir / folder_name(variant) / f"seed_{seed}"


def collect(study: Study, arguments: argparse.Namespace) -> dict:
    """What the finished runs left: per variant its seeds' figures."""
    variants = {}
    for name in study.variants:
        experiment = load_experiment(study.experiment, [*study.settings(name), *arguments.set])
        counts = experiment.model.num_parameters()
        seeds = {}
        for seed in range(arguments.seeds):
            folder = _folder(arguments, name, seed)
            found = read_run(folder, seed)
            if found.finished and not _is_stale(folder, study, name, seed, arguments):
                seeds[seed] = _figures(found)
        variants[name] = {
            "settings": study.variants[name] or {},
            "trained": counts.trainable,
            "frozen": counts.frozen,
            "flops_per_token": experiment.model.num_flops_per_token(experiment.model.max_seq_len),
            "seeds": seeds,
        }
    return {"experiment": study.experiment, "set": arguments.set, "variants": variants}


def _figures(run: Run) -> dict:
    last, layers, steps = run.evals[-1], run.evals[-1]["layers"], run.of("train")

    def mean(key: str) -> float | None:
        return statistics.fmean(layer[key] for layer in layers) if layers else None

    return {
        "val_loss": last["val_loss"],
        "val_tokens": last["val_tokens"],
        "bits_per_byte": last["bits_per_byte"],
        "step": last["step"],
        "trained_tokens": steps[-1]["tokens"] if steps else None,  # log.every may be more than the run's steps
        **{
            key: mean(key)
            for key in ("coselected_cosine", "effective_experts", "largest_gate", "output_over_residual", "gini", "respawns")
        },
        "seconds": run.seconds,
        "commit": run.how.get("git_commit"),
        "device": run.how.get("device"),
        "precision": run.start.get("precision"),
        "torch": run.how.get("torch"),
    }


def paired(ours: dict[int, dict], baseline: dict[int, dict]) -> tuple[float, float | None, list[float]] | None:
    """Mean difference of validation loss over shared seeds, half its 95 % interval (None with one seed), the differences."""
    seeds = sorted(s for s in ours.keys() & baseline.keys() if None not in (ours[s]["val_loss"], baseline[s]["val_loss"]))
    if not seeds:
        return None
    differences = [ours[s]["val_loss"] - baseline[s]["val_loss"] for s in seeds]
    if len(seeds) == 1:
        return differences[0], None, differences
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    return statistics.fmean(differences), T_95[min(len(seeds) - 1, max(T_95))] * error, differences


def tables(study: Study, results: dict) -> str:
    """Markdown: one table a group; negative differences are better than the baseline."""
    parts = []
    for group in study.groups:
        parts.append(f"### {group['title']}\n\n{group['question']}\n\n{_table(group, results['variants'])}\n")
    return "\n".join(parts)


def _table(group: dict, variants: dict) -> str:
    lines = [
        f"| variant | trained | val loss (nats/token) | minus {group['baseline']} (95 % interval) | by seed | "
        "cosine of co-selected keys | effective experts | largest gate | RMS experts / residual | respawns a layer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    baseline = variants[group["baseline"]]["seeds"]
    for name in [group["baseline"], *group["variants"]]:
        row = variants[name]
        seeds = row["seeds"]
        if not seeds:
            lines.append(f"| {name} | {row['trained']:,} | not run |" + " |" * 7)
            continue
        losses = [figures["val_loss"] for figures in seeds.values()]
        finite = [loss for loss in losses if loss is not None]
        loss = f"{statistics.fmean(finite):.4f} ({min(finite):.4f} to {max(finite):.4f})" if finite else ""
        loss += f" {len(losses) - len(finite)} of {len(losses)} not finite" if len(finite) < len(losses) else ""
        found = paired(seeds, baseline)
        if name == group["baseline"]:
            difference, by_seed = "baseline", ""
        elif found is None:
            difference, by_seed = "no shared seed", ""
        else:
            half = "one seed" if found[1] is None else f"± {found[1]:.4f}"
            difference, by_seed = f"{found[0]:+.4f} {half}", " ".join(f"{d:+.4f}" for d in found[2])
        means = [
            _mean_or_dash(seeds, key, digits)
            for key, digits in (
                ("coselected_cosine", 2),
                ("effective_experts", 1),
                ("largest_gate", 2),
                ("output_over_residual", 3),
                ("respawns", 1),
            )
        ]
        lines.append(f"| {name} | {row['trained']:,} | {loss} | {difference} | {by_seed} | " + " | ".join(means) + " |")
    found = {figures.get("precision") for name in [group["baseline"], *group["variants"]] for figures in
             variants[name]["seeds"].values()} - {None}  # fmt: skip
    if len(found) > 1:
        lines.append(f"\nThese runs differ in precision ({', '.join(sorted(found))}), which may move losses too.")
    return "\n".join(lines)


def _mean_or_dash(seeds: dict[int, dict], key: str, digits: int) -> str:
    values = [figures[key] for figures in seeds.values() if figures[key] is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else "–"


if __name__ == "__main__":
    main()
