"""Jobs as the tests submit them, and what they leave behind."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.processes import wait_until
from tests.launch import FP32, REPOSITORY, environment

B3, SERIES, SWEEP = (str(REPOSITORY / "slurm" / f"{name}.sh") for name in ("b3_512experts", "series_b", "sweep"))
STAND_IN = REPOSITORY / "tests" / "cluster" / "stand_in.py"


def job_environment(**extra: str) -> dict[str, str]:
    """Ours, with nothing in it that steers a launcher but `extra`."""
    clean = {k: v for k, v in environment().items() if not k.startswith("SOME_") and k != "OMP_NUM_THREADS"}
    return clean | extra


def stand_in_environment(folder: Path, behaviour: str, **extra: str) -> dict[str, str]:
    """What makes a launcher run `stand_in.py` instead of the trainer."""
    choose = (
        f'[[ $1 == */trainer/run.py ]] || exec "{sys.executable}" "$@"\nexec "{sys.executable}" -I -S "{STAND_IN}" "$@"\n'
    )
    python = write_program(folder / "python", f"#!/bin/bash\n{choose}")
    return job_environment(SOME_HOME=str(REPOSITORY), SOME_PYTHON=str(python), STAND_IN=behaviour, **extra)


def trainer_environment(**extra: str) -> dict[str, str]:
    """What makes a launcher train in fp32 on CPUs with this Python."""
    own = {"SOME_HOME": str(REPOSITORY), "SOME_PYTHON": sys.executable, "SOME_DS_CONFIG": FP32, "OMP_NUM_THREADS": "1"}
    return job_environment(CUDA_VISIBLE_DEVICES="", **own, **extra)


def write_tiny(folder: Path, steps: int) -> Path:
    """`tiny.yaml` in `folder`: an experiment whose steps take milliseconds."""
    experiment = {
        "name": "tiny",
        "seed": 4,  # in its first steps no token's second and third best experts are tied but for rounding
        "model": {
            "vocab_size": 512, "d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64,
            "some": {"num_experts": 8, "d_ffn": 64, "top_k": 2},
        },
        "data": {"name": "stories", "train_documents": 200, "val_documents": 20},
        "train": {"batch_size": 8, "steps": steps, "warmup_steps": 1},
        "log": {"tensorboard": False},
        "sample": {"tokens": 0},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return folder / "tiny.yaml"


def steps_of(run: Path, event: str) -> list[int]:
    """The steps of a live run's records of one kind, so far as they are whole."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return [record["step"] for record in found if record["event"] == event]


def last_step(run: Path) -> int:
    """The last training step in a run's metrics; 0 before the first."""
    return max(steps_of(run, "train"), default=0)


def write_program(path: Path, text: str) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


class StandInJob:
    """A job of b3's launcher on both nodes, with `stand_in.py` for the trainer."""

    def __init__(
        self, cluster: Cluster, folder: Path, behaviour: str, *arguments: str, sbatch: Sequence[str] = (), **variables: str
    ) -> None:
        self.folder, self.run = folder, folder / "runs" / "b3"
        settings = stand_in_environment(folder, behaviour, **variables)
        self.id = cluster.submit(*sbatch, B3, *arguments, cwd=folder, environment=settings)

    @property
    def log(self) -> list[str]:
        """What the ranks wrote of themselves."""
        path = self.run / "log"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def checkpoints(self) -> list[str]:
        """Names of the run's checkpoints, in order."""
        return sorted(path.name for path in self.run.glob("checkpoints/step_*"))

    @property
    def output(self) -> str:
        """What the job printed."""
        return (self.folder / f"slurm-some-b3-{self.id}.out").read_text(encoding="utf-8")

    @property
    def notes(self) -> list[Path]:
        """What the batch script left in the working folder."""
        return list(self.folder.glob(".slurm-*"))

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until the ranks have so often written a line that begins with `line`."""
        wait_until(lambda: sum(written.startswith(line) for written in self.log) >= times, 240, f"{times} x {line!r}")

    def wait_for_begin(self, times: int = 1) -> None:
        """Wait until both ranks have begun so often."""
        wait_until(lambda: begins_of_both(self.log) >= times, 240, f"{times} x the begin of both ranks")


def begins_of_both(lines: list[str]) -> int:
    """How often both ranks have begun, by their log: the nodes start them one after the other."""
    return min(sum(line.startswith(f"rank {rank} begins") for line in lines) for rank in (0, 1))
