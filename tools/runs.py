"""Runs as tools see them: started as a program of their own, read from the files that they leave."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class RunRecord:
    """What a run's folder says of it."""

    folder: Path
    """Where it lies."""
    how: dict[str, Any] = field(default_factory=dict)
    """`run` of config.yaml: versions, commit, device, ranks, data."""
    experiment: dict[str, Any] = field(default_factory=dict)
    """The resolved experiment."""
    total_steps: int = 0
    """Length of the whole run."""
    trains: list[dict[str, Any]] = field(default_factory=list)
    """Train records, in order of steps."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    """Eval records, in order of steps."""
    finished: bool = False
    """Whether it came to its own end."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.trains[-1]["step"] if self.trains else 0

    @property
    def seconds(self) -> float:
        """Time in steps and evaluations."""
        return sum(record["seconds"] for record in [*self.trains, *self.evals])


def read_run(folder: Path) -> RunRecord | None:
    """The record of a run; None where none has begun. A last line that a crash cut short is left out."""
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config.exists() or not metrics.exists():
        return None
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    record = RunRecord(folder, how=values.pop("run", {}), experiment=values)
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind = event["event"]
        if kind == "start":
            record.total_steps = event["total_steps"]
        elif kind == "train":
            record.trains.append(event)
        elif kind == "eval":
            record.evals.append(event)
        elif kind == "end":
            record.finished = event["finished"]
    return record


def launch(
    experiment: str,
    settings: list[str],
    folder: Path,
    ds_config: str,
    ranks: int = 1,
    threads: int | None = None,
    max_steps: int | None = None,
) -> str | None:
    """Start or resume one run and wait for its end; what it prints goes to `<folder>.log`.

    Args:
        experiment: name or YAML path.
        settings: `a.b=c` overrides.
        folder: the run's folder.
        ds_config: DeepSpeed JSON.
        ranks: processes on this machine; more than one start under torchrun.
        threads: CPU threads a rank; None = the launcher's default.
        max_steps: stop early.

    Returns:
        None if it went well, else the last line that it printed.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(REPOSITORY / "trainer" / "run.py"), "--experiment", experiment, "--ds_config", ds_config]
    command += ["--output_dir", str(folder)]
    for setting in settings:
        command += ["--set", setting]
    if max_steps is not None:
        command += ["--max_steps", str(max_steps)]
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no output'} (see {log})"
