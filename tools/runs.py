"""Runs as tools see them: read from the files that they leave, started as programs of their own."""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import psutil

from trainer.config import Experiment, experiment_from_dict
from trainer.exit_codes import REQUEUE
from trainer.plain_yaml import as_written
from trainer.runfolder import MAX_CONFIG_BYTES
from trainer.text import read_yaml, shown

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "trainer" / "run.py"
EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED = 1, 2, 130
SECONDS_TO_STOP = 600
"""What a run has to end its step and save when it is asked to stop; a published step takes about a minute on CPUs."""
MARKS = ("config.yaml", "metrics.jsonl")
"""By either of these a run's folder is known."""
FAILED = "failed.txt"
"""In a run's folder: why it failed when it was last started; absent where it did not."""
_COUNTS = ("world_size", "ep_size", "micro_batch", "accumulation")
_TEXTS = ("git_commit", "device", "python", "torch", "deepspeed", "precision", "validation_sha256", "tokenizer_sha256")


@dataclass
class Run:
    """What one run's folder holds."""

    seed: int
    folder: Path
    experiment: Experiment | None = None
    """As it was run; None where there is nothing yet."""
    how: dict[str, Any] = field(default_factory=dict)
    """Section `run` of its config.yaml."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """Its metrics.jsonl."""
    unreadable_lines: int = 0
    """Lines of it that are no records: cut short by a crash, being written, or damaged."""
    failure: str | None = None
    """Why it failed when it was last started."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [record for record in self.records if record["event"] == event]

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """The evaluations."""
        return self.of("eval")

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def start(self) -> dict[str, Any]:
        """How it was last started."""
        return next(reversed(self.of("start")), {})

    @property
    def finished(self) -> bool:
        """Whether the whole schedule was run and measured; the trainer may have been stopped between that and its end."""
        return bool(self.evals) and self.evals[-1]["step"] == self.start.get("total_steps")

    @property
    def progress(self) -> str:
        """`step 100 of 624`."""
        return f"step {self.step} of {self.start.get('total_steps', '?')}"

    @property
    def seconds(self) -> float:
        """Time in the steps and evaluations that were recorded."""
        return sum(record.get("seconds", 0) for record in [*self.of("train"), *self.evals])

    def is_done(self, max_steps: int | None) -> bool:
        """Whether it has come to its end, that of the schedule or `max_steps`, and written it."""
        return any(
            record["finished"] or (max_steps is not None and record["step"] >= max_steps) for record in self.of("end")
        )

    def at_epoch(self, epoch: int) -> dict[str, Any] | None:
        """The evaluation after an epoch, counted from 1."""
        return next((record for record in self.evals if abs(record["epoch"] - epoch) < 1e-9), None)

    def train_loss(self, epoch_end: dict[str, Any]) -> float | None:
        """Mean loss over the steps of the epoch that ended at an evaluation; None where not all were recorded."""
        end, steps = epoch_end["step"], round(epoch_end["step"] / epoch_end["epoch"])
        losses = [record["loss"] for record in self.of("train") if end - steps < record["step"] <= end]
        return statistics.fmean(losses) if len(losses) == steps and None not in losses else None


def read_run(folder: Path, seed: int = 0) -> Run:
    """Read a run's folder, whatever state it is in; where a file of it is damaged, `failure` says so and no experiment is
    known. What is returned has the types that every reader relies on."""
    run = Run(seed, folder)
    try:
        if (folder / FAILED).exists():
            run.failure = (folder / FAILED).read_text(encoding="utf-8", errors="replace").strip()
        if not (folder / "config.yaml").exists():
            return run
        values = read_yaml(folder / "config.yaml", "config.yaml", MAX_CONFIG_BYTES)
        how = _checked_how(values.pop("run", {}))
        experiment = experiment_from_dict(values)
        if (folder / "metrics.jsonl").exists():
            run.records, run.unreadable_lines = read_records(folder / "metrics.jsonl")
        run.how, run.experiment = how, experiment
    except (OSError, ValueError) as error:
        run.failure = f"cannot be read: {' '.join(str(error).split())}"
    return run


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records in a metrics.jsonl, and how many lines are none.

    Raises:
        OSError: it cannot be read.
    """
    records, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            _check_record(record)
            records.append(record)
        except (ValueError, RecursionError):
            unreadable += 1
    return records, unreadable


def run_folders(folder: Path) -> list[Path]:
    """The run that `folder` is, or those below it, by name, links followed; what is hidden is left out."""
    found, root = [], folder.resolve()
    seen = {root}

    def is_new(path: Path) -> bool:
        """Whether it is not one of those before, nor above them, which would have no end."""
        target = path.resolve()
        if target in seen or root.is_relative_to(target):
            return False
        seen.add(target)
        return True

    for path, below, files in os.walk(folder, followlinks=True):
        if any(mark in files for mark in MARKS):
            found.append(Path(path))
            below.clear()  # a run holds no runs
        below[:] = [name for name in sorted(below) if not name.startswith(".") and is_new(Path(path, name))]
    return sorted(found)


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file holds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 and math.isfinite(value) else None


def _check_record(record: Any) -> None:
    """Raises:
    ValueError: not what the trainer writes, in what every reader relies on.
    """
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise ValueError("no event")
    event, step = record["event"], record.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError("no step")
    if event == "train" and "loss" not in record or event == "end" and not isinstance(record.get("finished"), bool):
        raise ValueError("a step without a loss, or an end that does not say whether it is one")
    if event == "eval":
        layers = record.get("layers")
        if "val_loss" not in record or not isinstance(layers, list) or not all(isinstance(v, dict) for v in layers):
            raise ValueError("an evaluation without a loss or layers")
    if event == "start":
        _check_types(record, "start")
        if type(record.get("total_steps", 0)) is not int:
            raise ValueError("a start without a length")
    for key in ("loss", "val_loss"):  # null where not finite
        if record.get(key) is not None:
            _check_number(record[key])
    for key in ("epoch", "seconds", "tokens", "tokens_per_second"):
        _check_number(record.get(key, 0))


def _check_number(value: Any) -> None:
    # NaN and infinities are numbers here; a whole number of hundreds of digits is none that can be computed with.
    if not isinstance(value, float) and number(value) is None:
        raise ValueError(f"{shown(value)} is no number")


def _checked_how(how: Any) -> dict[str, Any]:
    """Section `run` of a config.yaml.

    Raises:
        ValueError: not what the trainer writes there.
    """
    if not isinstance(how, dict):
        raise ValueError(f"run = {shown(how)} holds no keys and values")
    _check_types(how, "run")
    for key in ("data", "ds_config"):
        if not isinstance(how.get(key, {}), dict):
            raise ValueError(f"run.{key} = {shown(how[key])} holds no keys and values")
    for split in ("train", "validation"):
        held = how.get("data", {}).get(split, {})
        if not isinstance(held, dict) or any(type(held.get(key, 0)) is not int for key in ("documents", "tokens", "bytes")):
            raise ValueError(f"run.data.{split} = {shown(held)} does not count documents, tokens and bytes")
    return how


def _check_types(values: dict[str, Any], what: str) -> None:
    for key in _COUNTS:
        if type(values.get(key, 1)) is not int or not 0 < values.get(key, 1) < 2**53:
            raise ValueError(f"{what}.{key} = {shown(values[key])} is not a number of 1 or more")
    for key in _TEXTS:
        if key in values:
            values[key] = as_written(values[key])
        if not isinstance(values.get(key), str | None):
            raise ValueError(f"{what}.{key} = {shown(values[key])} is no text")


def command(
    experiment: str,
    settings: list[str],
    folder: Path,
    ds_config: str,
    ranks: int = 1,
    max_steps: int | None = None,
    script: Sequence[str] = (str(SCRIPT),),
) -> list[str]:
    """The trainer's command line for one run.

    Args:
        experiment: name or YAML path.
        settings: `a.b=c` overrides; later ones count.
        folder: the run's folder.
        ds_config: DeepSpeed JSON.
        ranks: processes on this machine; more than one start under torchrun.
        max_steps: stop early.
        script: what takes the trainer's flags, with what comes before them.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, *script, "--experiment", experiment]
    for setting in settings:
        words += ["--set", setting]
    if max_steps is not None:
        words += ["--max_steps", str(max_steps)]
    return [*words, "--ds_config", ds_config, "--output_dir", str(folder)]


_running: list[subprocess.Popen] = []
"""What `start` has started, in whatever thread, and has not ended."""


def start(words: list[str], output: TextIO | None = None, threads: int | None = None) -> str | None:
    """Run a command; why it failed, or None. Whatever ends us ends it, as `stop_all` does.

    Args:
        words: the command.
        output: where it prints; None = where we do.
        threads: CPU threads of a rank; None = the launcher's default.
    """
    # torch.distributed.run would kill its ranks 30 s after it is asked to stop.
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_STOP)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    complaints = _Complaints(output or sys.stderr)
    # A group of its own, so that Ctrl-C reaches us alone and the process ends without a traceback.
    with subprocess.Popen(
        words, stdout=output, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", process_group=0, env=environment
    ) as process:
        _running.append(process)
        # A thread reads, so that nobody waits for a reader while the process is being stopped.
        reader = threading.Thread(target=complaints.read, args=(process.stderr,))
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            complaints.is_stopping = True
            _stop([process])
            raise
        finally:
            _running.remove(process)
            reader.join()
    if code == 0:
        return None
    if code == REQUEUE:
        return "stopped by a signal after saving; the same command goes on"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else complaints.reason or f"exit code {code}"


class _Complaints:
    """Passes on what a process prints on stderr, and keeps the line that says why it failed.

    Attributes:
        is_stopping: set it to pass on errors only: torch.distributed.run tells of a signal in a traceback.
    """

    def __init__(self, output: TextIO):
        self.is_stopping = False
        self._output = output
        self._refused = self._raised = self._last = ""

    @property
    def reason(self) -> str:
        """Why it failed, as far as it has said."""
        return self._refused or self._raised or self._last

    def read(self, lines: TextIO) -> None:
        """To the end."""
        for line in lines:
            if not self.is_stopping or line.startswith("error: "):
                with suppress(OSError, ValueError):  # a full disk must not keep the process from being read
                    print(line, end="", file=self._output, flush=True)
            self._last = line.strip() or self._last
            if line.startswith("error: "):
                self._refused = line.strip().removeprefix("error: ")
            # The end of a traceback; torchrun's own only says that a rank ended.
            elif re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b", line) and "ChildFailedError" not in line:
                self._raised = line.strip()


def stop_all() -> None:
    """Ask everything that `start` has running in other threads to save and end, all at once, and wait until it has.

    What takes longer than `SECONDS_TO_STOP` is killed, and so is everything at another Ctrl-C; then the last checkpoint
    stays the newest.
    """
    _stop(list(_running))


def _stop(processes: list[subprocess.Popen]) -> None:
    asked = [process for process in processes if process.poll() is None]
    for process in asked:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGTERM)
    if asked:
        limit = f"at most {SECONDS_TO_STOP} s; Ctrl-C kills"
        print(f"stopping: waiting for {len(asked)} run(s) to end a step and save, {limit}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + SECONDS_TO_STOP
    try:
        for process in asked:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in asked:
            if process.poll() is None:
                _kill(process)
        print("killed; the last checkpoint stays the newest", file=sys.stderr, flush=True)


def _kill(process: subprocess.Popen) -> None:
    """With all that it has started: torch.distributed.run's ranks have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for one in [*family.children(recursive=True), family]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM (SLURM's, near a time limit) and SIGHUP (a closed terminal) stop like Ctrl-C."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # What is ignored stays ignored: nohup wants to outlive its terminal.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
