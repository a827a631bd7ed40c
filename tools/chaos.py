"""Repeat a short training under faults, restart it until it ends, and compare the end with the unbroken run.

    python tools/chaos.py --ranks 2 --kills 50 --seed 0
    python tools/chaos.py --ranks 2 --kills 20 --seed 0 --linked    # checkpoints behind a link, as on another file system

Faults are drawn from the seed: SIGKILL of any rank at the beginning of a step, before, inside and after every stage of a
save, and at any moment; SIGTERM at any moment; a rank that stops answering, until the watchdog ends the others; a slow rank;
a loss that is not a number; a disk that is full amid a file. When one rank has ended the others are killed, as a launcher
does, and the same command is given again. That the ranks ended by the fault and nothing else is told from their exit codes
and what they print. A run that has had its share of faults is let to its end, where losses, evaluations and the last
checkpoint must be bitwise those of the unbroken run, and nothing else may lie in its folder.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.chaos_faults import Card, Fault, arrange, deck
from tools.chaos_ranks import Ranks, prepare
from tools.outputs import check_writable, read_paths, write_output
from tools.runs import EXIT_FAILED, EXIT_REFUSED, Run, read_run
from trainer.checkpoint import MANIFEST, TENSORS, checkpoint_folders
from trainer.config import load_experiment
from trainer.console import guard_streams
from trainer.ds_config import load_ds_config
from trainer.exit_codes import DONE
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.paths import local_path, make_folder
from trainer.resume import NoCheckpoint, checkpoint_at
from trainer.text import error_line

TINY = [
    "model.vocab_size=512", "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=64",
    "model.some.num_experts=8", "model.some.d_ffn=64", "data.train_documents=200", "data.val_documents=20",
    "train.batch_size=8", "train.steps=12", "train.warmup_steps=2", "train.eval_every=4", "checkpoint.every=3",
    "log.tensorboard=false", "sample.tokens=0",
]  # fmt: skip
"""Makes the quickstart a matter of seconds. A restart every few seconds needs no longer training."""
NO_MERCY = "train.max_skipped=0"
"""Ends a run at the first step that is not finite, before a checkpoint has gone on from it."""
TIMINGS = {"seconds", "tokens_per_second"}


@dataclass
class Row:
    """What came of one kind of fault."""

    tried: int = 0
    """It happened."""
    went_on: int = 0
    """The run went on from its newest whole checkpoint, or was at its end."""
    same_end: int = 0
    """The run that it happened to ended as the unbroken one."""


@dataclass
class Chaos:
    """Runs of one experiment, and what has come of their faults."""

    arguments: list[str]
    """Of `trainer/run.py`, without the folder."""
    ranks: int
    folder: Path
    draw: random.Random
    linked: bool = False
    """Whether checkpoints lie elsewhere, behind a link in the run's folder."""
    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        reference = self.folder / "unbroken"
        prepare()
        began = time.monotonic()
        codes = self._start(reference)
        if any(codes):
            raise RuntimeError(f"the unbroken run failed with exit codes {codes}; see {_log(reference)}")
        self.seconds = time.monotonic() - began
        self.unbroken = read_run(reference)
        end = self.unbroken.of("end")[-1]
        self.total_steps, self.every = end["step"], self.unbroken.experiment.checkpoint.every

    def run(self, number: int, cards: list[Card]) -> list[Card]:
        """One run under faults, in turn, and then to its end; those that did not happen, the run having ended before."""
        output_dir, missed = self.folder / f"run_{number}", list(cards)
        if self.linked:
            link_checkpoints(output_dir)
        happened: list[Card] = []
        waiting: list[Card] = []  # for the next start that comes so far as to say where it begins
        is_done = False
        while not is_done:
            newest, starts = _newest_step(output_dir), len(read_run(output_dir).of("start"))
            card = missed[0] if missed and newest < self.total_steps else None
            fault = card and arrange(card, self.draw, newest, self.every, self.total_steps, self.seconds)
            said = _size(_log(output_dir))
            try:
                codes = self._start(output_dir, fault)
            except TimeoutError as error:
                self.problems.append(f"run {number}, {card}: {error}; see {_log(output_dir)}")
                return missed
            is_done, after = codes == [DONE] * self.ranks, read_run(output_dir)
            began = [record["step"] for record in after.of("start")[starts:]]
            if began or is_done:
                if began not in ([newest], []):
                    self.problems.append(f"run {number} went on from step {began[0]} instead of {newest}")
                    return missed
                for earlier in waiting:
                    self.rows[str(earlier)].went_on += 1
                waiting = []
            seconds = {record["step"]: record["seconds"] for record in after.of("train")}
            if fault is not None and fault.happened(codes, _log(output_dir).read_text(errors="replace")[said:], seconds):
                happened.append(missed.pop(0))
                waiting.append(card)
                self.rows.setdefault(str(card), Row()).tried += 1
            elif not is_done or (fault is not None and fault.sends is None):
                what = "did not go on" if card is None else f"was to meet {' '.join([str(card), *fault.settings])}"
                self.problems.append(f"run {number} {what}: exit codes {codes}; see {_log(output_dir)}")
                return missed
        for card in waiting:
            self.rows[str(card)].went_on += 1
        differences = compare(self.unbroken, read_run(output_dir))
        self.problems += [f"run {number}: {difference}" for difference in differences]
        for card in happened:
            self.rows[str(card)].same_end += not differences
        if not differences:
            shutil.rmtree(output_dir)
            shutil.rmtree(_elsewhere(output_dir), ignore_errors=True)
        return missed

    def _start(self, output_dir: Path, fault: Fault | None = None) -> list[int | None]:
        """The exit code of every rank of one start, during which `fault` is to happen."""
        settings = [word for setting in (fault.settings if fault else ()) for word in ("--set", setting)]
        ranks = Ranks([*self.arguments, "--output_dir", str(output_dir), *settings], self.ranks, _log(output_dir))
        return ranks.wait(*((fault.after, fault.rank, fault.sends) if fault and fault.sends else ()))


def link_checkpoints(output_dir: Path) -> None:
    """Make a run's folder whose checkpoints lie beside it, as on another file system; their folder is the run's to make."""
    output_dir.mkdir()
    (output_dir / "checkpoints").symlink_to(_elsewhere(output_dir))


def _elsewhere(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}_checkpoints")


def _log(output_dir: Path) -> Path:
    return output_dir.with_suffix(".log")


def _size(path: Path) -> int:
    return len(path.read_text(errors="replace")) if path.exists() else 0


def _newest_step(output_dir: Path) -> int:
    try:
        return checkpoint_at(output_dir).state.step
    except NoCheckpoint:
        return 0


def compare(unbroken: Run, run: Run) -> list[str]:
    """In what a run's end differs from the unbroken one's; nothing if every bit is the same."""
    differences = []
    for event in ("train", "eval"):
        ours, theirs = ([_untimed(record) for record in each.of(event)] for each in (run, unbroken))
        if ours != theirs:
            differences.append(f"{event} records differ")
    (state, hashes, names), (their_state, their_hashes, their_names) = _end(run.folder), _end(unbroken.folder)
    differences += [f"{key} in the last checkpoint's state differs" for key in state if state[key] != their_state[key]]
    differences += [f"{name} in the last checkpoint differs" for name in TENSORS if hashes[name] != their_hashes[name]]
    if names != their_names:
        differences.append(f"left behind or missing: {', '.join(sorted(names ^ their_names))}")
    asides = [path.name for path in run.folder.parent.glob(f"{run.folder.name}.*") if path.is_dir()]
    return differences + [f"left behind: {name}" for name in asides]


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMINGS}


def _end(folder: Path) -> tuple[dict[str, Any], dict[str, str], set[str]]:
    """State and hashes of a run's last checkpoint, verified, and the names of everything in the run's folder but the logs of
    TensorBoard, which has one a start. Checkpoints are numbered from the newest: one that was written because of a signal
    may be among those that are kept."""
    found = checkpoint_at(folder)
    manifest = json.loads((found.folder / MANIFEST).read_text(encoding="utf-8"))
    state = {key: value for key, value in vars(found.state).items() if key != "experiment"}
    names = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if Path(path).name != "tensorboard":
            names |= {str(Path(path, name).relative_to(folder)) for name in (*folders, *files)}
    if (folder / "checkpoints").is_symlink():
        names.discard("checkpoints/.lock")  # of checkpoints that another run's folder may lead to as well
    for number, path in enumerate(checkpoint_folders(folder / "checkpoints")):
        names = {name.replace(f"checkpoints/{path.name}", f"checkpoints/{number}") for name in names}
    return state, {name: manifest["files"][name]["sha256"] for name in TENSORS}, names


def table(rows: dict[str, Row]) -> str:
    """Markdown, one line a kind of fault."""
    lines = ["| fault | tried | went on | same end |", "|---|---|---|---|"]
    total = Row(*(sum(getattr(row, name) for row in rows.values()) for name in ("tried", "went_on", "same_end")))
    for name, row in [*sorted(rows.items()), ("all", total)]:
        lines.append(f"| {name} | {row.tried} | {row.went_on} | {row.same_end} |")
    return "\n".join(lines)


def wanted_cards(arguments: argparse.Namespace) -> list[Card]:
    """The kinds of faults that `--only` leaves."""
    return [card for card in deck(arguments.ranks) if arguments.only in str(card)]


def check(arguments: argparse.Namespace, settings: list[str]) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: naming the flag.
        OSError: a folder that cannot be read.
    """
    if min(arguments.ranks, arguments.kills, arguments.kills_a_run) < 1:
        raise ValueError("--ranks, --kills and --kills_a_run: must be at least 1")
    read_paths(arguments, "folder", "json")
    arguments.ds_config = local_path(arguments.ds_config, "--ds_config")
    experiment, launch = load_experiment(arguments.experiment, settings), Launch(0, arguments.ranks, 0, arguments.ranks)
    load_ds_config(arguments.ds_config, experiment, Layout.of(experiment, launch), arguments.ranks)
    if not wanted_cards(arguments):
        kinds = "; ".join(sorted({card.kind for card in deck(arguments.ranks)}))
        raise ValueError(f"--only {arguments.only}: no fault has this in its name; there are: {kinds}")
    if arguments.folder is not None and arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ValueError(f"--folder {arguments.folder}: is not empty; give another")
    if arguments.json is not None:
        check_writable(arguments.json, "--json")


def figures(arguments: argparse.Namespace, chaos: Chaos, runs: int) -> dict[str, Any]:
    """What was asked for and what came of it."""
    names = ("experiment", "set", "ranks", "kills", "kills_a_run", "seed", "linked")
    rows = {name: vars(row) for name, row in chaos.rows.items()}
    how = {name: getattr(arguments, name) for name in names}
    return {**how, "runs": runs, "rows": rows, "problems": chaos.problems}


def main() -> int:
    """The command line."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="tools/chaos.py", description="Train under faults and compare with no faults.")
    parser.add_argument("--experiment", default="quickstart", help="what to train (default: quickstart, made tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key")
    parser.add_argument("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2_fp32.json"), metavar="FILE")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks on this machine (default: 2)")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="faults (default: 50)")
    parser.add_argument("--kills_a_run", type=int, default=10, metavar="N", help="faults of one run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="decides the faults; moments are as the clock has it")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name has this in it")
    parser.add_argument("--folder", metavar="DIR", help="for the runs (default: a temporary one)")
    parser.add_argument("--linked", action="store_true", help="keep checkpoints elsewhere, behind a link")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    settings = (TINY if arguments.experiment == "quickstart" else []) + [NO_MERCY, *arguments.set]
    try:
        check(arguments, settings)
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
        make_folder(folder)
    except OSError as error:
        print(error_line(ValueError(f"--folder {arguments.folder}: {error.strerror}; give another")), file=sys.stderr)
        return EXIT_REFUSED
    except ValueError as error:
        print(error_line(error), file=sys.stderr)
        return EXIT_REFUSED
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = ["--experiment", arguments.experiment, "--ds_config", arguments.ds_config]
    for setting in settings:
        command += ["--set", setting]
    draw, number, cards = random.Random(arguments.seed), 0, []
    try:
        chaos = Chaos(command, arguments.ranks, folder, draw, arguments.linked)
    except (RuntimeError, TimeoutError) as error:
        print(error_line(error), file=sys.stderr)
        return EXIT_FAILED
    while sum(row.tried for row in chaos.rows.values()) < arguments.kills and not chaos.problems:
        wanted = min(arguments.kills_a_run, arguments.kills - sum(row.tried for row in chaos.rows.values()))
        while len(cards) < wanted:
            more = wanted_cards(arguments)
            draw.shuffle(more)
            cards += more
        number += 1
        cards = chaos.run(number, cards[:wanted]) + cards[wanted:]
        print(f"run {number}: {sum(row.tried for row in chaos.rows.values())} faults so far", file=sys.stderr, flush=True)
    print(table(chaos.rows))
    for problem in chaos.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if arguments.json is not None:
        try:
            write_output(arguments.json, json.dumps(figures(arguments, chaos, number), indent=1), "--json")
        except ValueError as error:
            print(error_line(error), file=sys.stderr)
            return EXIT_FAILED
    if arguments.folder is None and not chaos.problems:
        shutil.rmtree(folder)
    return EXIT_FAILED if chaos.problems else 0


if __name__ == "__main__":
    sys.exit(main())
