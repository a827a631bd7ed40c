"""Repeat a short training under faults, restart it until it ends, and compare the end with the unbroken run.

    python tools/chaos.py --ranks 2 --kills 50 --seed 0

Faults are drawn from the seed: SIGKILL of any rank at the beginning of a step, before, inside and after every stage of a
save, and at any moment; SIGTERM at any moment; a rank that stops answering. After each the other ranks are killed, as a
launcher does, and the same command is given again. A run that has had its share of faults is let to its end, where losses,
evaluations and the last checkpoint must be bitwise those of the unbroken run, and nothing else may lie in its folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)

from tools.chaos_ranks import Ranks, prepare
from tools.runs import EXIT_FAILED, EXIT_REFUSED, Run, read_run
from trainer.checkpoint import MANIFEST, TENSORS
from trainer.config import load_experiment
from trainer.exit_codes import DONE
from trainer.faults import FILE_STAGES, STAGES
from trainer.resume import NoCheckpoint, checkpoint_at

TINY = [
    "model.vocab_size=512", "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=64",
    "model.some.num_experts=8", "model.some.d_ffn=64", "data.train_documents=200", "data.val_documents=20",
    "train.batch_size=8", "train.steps=12", "train.warmup_steps=2", "train.eval_every=4", "checkpoint.every=3",
    "log.tensorboard=false", "sample.tokens=0",
]  # fmt: skip
"""Makes the quickstart a matter of seconds. A restart every few seconds needs no longer training."""
STEP, SAVE, MOMENT, TERM, STOP = "SIGKILL, rank {}, at a step", "SIGKILL, saving, {}", "SIGKILL, rank {}, at any moment", \
    "SIGTERM, rank {}, at any moment", "SIGSTOP, rank {}, at a step"  # fmt: skip
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
    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        reference = self.folder / "unbroken"
        prepare()
        began = time.monotonic()
        if (code := self._start(reference)) != DONE:
            raise RuntimeError(f"the unbroken run failed with exit code {code}; see {self._log(reference)}")
        self.seconds = time.monotonic() - began
        self.unbroken = read_run(reference)
        end = self.unbroken.of("end")[-1]
        self.total_steps, self.every = end["step"], self.unbroken.experiment.checkpoint.every

    def deck(self) -> list[str]:
        """Every kind of fault, those at a step or a moment more often, in random order."""
        stages = [f"{when} {stage}" for stage in STAGES for when in ("before", "after")]
        cards = [SAVE.format(stage) for stage in stages + [f"inside {stage}" for stage in FILE_STAGES]]
        for rank in range(self.ranks):
            cards += [STEP.format(rank)] * 4 + [MOMENT.format(rank)] * 4 + [TERM.format(rank), STOP.format(rank)]
        self.draw.shuffle(cards)
        return cards

    def run(self, number: int, faults: list[str]) -> list[str]:
        """One run under `faults`, in turn, and then to its end; those that did not happen, the run having ended before."""
        output_dir, missed = self.folder / f"run_{number}", list(faults)
        happened: list[str] = []
        waiting: list[str] = []  # for the next start that comes so far as to say where it begins
        while True:
            newest, starts = _newest_step(output_dir), len(read_run(output_dir).of("start"))
            fault = missed[0] if missed and newest < self.total_steps else None
            code = self._start(output_dir, fault, newest)
            began = [record["step"] for record in read_run(output_dir).of("start")[starts:]]
            if began or code == DONE:
                if began not in ([newest], []):
                    self.problems.append(f"run {number} went on from step {began[0]} instead of {newest}")
                    return missed
                for earlier in waiting:
                    self.rows[earlier].went_on += 1
                waiting = []
            if code == DONE:
                break
            if fault is None:
                self.problems.append(f"run {number} did not go on: exit code {code}; see {self._log(output_dir)}")
                return missed
            happened.append(missed.pop(0))
            waiting.append(fault)
            self.rows.setdefault(fault, Row()).tried += 1
        differences = compare(self.unbroken, read_run(output_dir))
        self.problems += [f"run {number}: {difference}" for difference in differences]
        for fault in happened:
            self.rows[fault].same_end += not differences
        if not differences:
            shutil.rmtree(output_dir)
        return missed

    def _log(self, output_dir: Path) -> Path:
        return output_dir.with_suffix(".log")

    def _start(self, output_dir: Path, fault: str | None = None, newest: int = 0) -> int:
        """The exit code of one start from the checkpoint of step `newest`, during which `fault` is to happen."""
        setting, meddle = self._arrange(fault, newest) if fault else ([], lambda ranks, seconds: None)
        ranks = Ranks([*self.arguments, "--output_dir", str(output_dir), *setting], self.ranks, self._log(output_dir))
        return ranks.wait(lambda seconds: meddle(ranks, seconds))

    def _arrange(self, fault: str, newest: int) -> tuple[list[str], Callable[[Ranks, float], None]]:
        """The flags that make a fault happen, and what has to be done from outside."""
        step = self.draw.randint(newest + 1, min(newest + self.every + 1, self.total_steps))
        saves = [*range(self.every, self.total_steps, self.every), self.total_steps]
        save = next(step for step in saves if step > newest)
        after = self.draw.uniform(0, self.seconds)
        for rank in range(self.ranks):
            if fault == STEP.format(rank):
                return ["--set", f"faults.kill=rank={rank} step={step}"], lambda ranks, seconds: None
            if fault == STOP.format(rank):
                return ["--set", f"faults.stop=rank={rank} step={step}"], lambda ranks, seconds: None
            for kind, number in ((MOMENT, signal.SIGKILL), (TERM, signal.SIGTERM)):
                if fault == kind.format(rank):
                    return [], _Once(after, rank, number)
        when, stage = fault.removeprefix(SAVE.format("")).split()
        return ["--set", f"faults.kill=step={save} stage={stage} when={when}"], lambda ranks, seconds: None


@dataclass
class _Once:
    """Sends one signal to one rank some seconds after the start."""

    after: float
    rank: int
    number: int
    sent: bool = False

    def __call__(self, ranks: Ranks, seconds: float) -> None:
        if not self.sent and seconds >= self.after:
            ranks.send(self.rank, self.number)
            self.sent = True


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
    TensorBoard, which has one a start."""
    found = checkpoint_at(folder)
    manifest = json.loads((found.folder / MANIFEST).read_text(encoding="utf-8"))
    state = {key: value for key, value in vars(found.state).items() if key != "experiment"}
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.parent.name != "tensorboard"}
    return state, {name: manifest["files"][name]["sha256"] for name in TENSORS}, names


def table(rows: dict[str, Row]) -> str:
    """Markdown, one line a kind of fault."""
    lines = ["| fault | tried | went on | same end |", "|---|---|---|---|"]
    total = Row(*(sum(getattr(row, name) for row in rows.values()) for name in ("tried", "went_on", "same_end")))
    for name, row in [*sorted(rows.items()), ("all", total)]:
        lines.append(f"| {name} | {row.tried} | {row.went_on} | {row.same_end} |")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/chaos.py", description="Train under faults and compare with no faults.")
    parser.add_argument("--experiment", default="quickstart", help="what to train (default: quickstart, made tiny)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key")
    parser.add_argument("--ds_config", default=str(REPOSITORY / "ds_configs" / "zero2_fp32.json"), metavar="FILE")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks on this machine (default: 2)")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="faults (default: 50)")
    parser.add_argument("--kills_a_run", type=int, default=10, metavar="N", help="faults of one run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="decides the faults; moments are as the clock has it")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name has this in it")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    settings = (TINY if arguments.experiment == "quickstart" else []) + arguments.set
    try:
        load_experiment(arguments.experiment, settings)
        if min(arguments.ranks, arguments.kills, arguments.kills_a_run) < 1:
            raise ValueError("--ranks, --kills and --kills_a_run: must be at least 1")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_REFUSED
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command = ["--experiment", arguments.experiment, "--ds_config", arguments.ds_config]
    for setting in settings:
        command += ["--set", setting]
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(command, arguments.ranks, folder, random.Random(arguments.seed))
    number, cards = 0, []
    while sum(row.tried for row in chaos.rows.values()) < arguments.kills and not chaos.problems:
        wanted = min(arguments.kills_a_run, arguments.kills - sum(row.tried for row in chaos.rows.values()))
        while len(cards) < wanted:
            cards += [card for card in chaos.deck() if arguments.only in card]
        number += 1
        cards = chaos.run(number, cards[:wanted]) + cards[wanted:]
        print(f"run {number}: {sum(row.tried for row in chaos.rows.values())} faults so far", file=sys.stderr, flush=True)
    print(table(chaos.rows))
    for problem in chaos.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if arguments.json is not None:
        how = {name: getattr(arguments, name) for name in ("experiment", "set", "ranks", "kills", "kills_a_run", "seed")}
        rows = {name: vars(row) for name, row in chaos.rows.items()}
        arguments.json.write_text(json.dumps({**how, "runs": number, "rows": rows, "problems": chaos.problems}, indent=1))
    if arguments.folder is None and not chaos.problems:
        shutil.rmtree(folder)
    return EXIT_FAILED if chaos.problems else 0


if __name__ == "__main__":
    sys.exit(main())
