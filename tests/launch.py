"""Run the trainer's command line as users do, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "trainer" / "run.py")
FP32 = str(REPOSITORY / "ds_configs" / "zero2_fp32.json")


def environment(**extra: str) -> dict[str, str]:
    """Ours without what a surrounding launcher or SLURM job may have set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return clean | {"OMP_NUM_THREADS": "1"} | extra


def launch(*arguments: str, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
    """`trainer/run.py` on `ranks` ranks, the variables set as a launcher would; rank 0's output.

    All ranks are ended when one fails, as launchers do.
    """
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **world) if ranks > 1 else environment()
        processes.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, *arguments],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        out, err = processes[0].communicate(timeout=timeout)
        if processes[0].returncode == 0:
            for process in processes[1:]:
                process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    code = (
        next((p.returncode for p in processes if p.returncode), 0)
        if processes[0].returncode == 0
        else processes[0].returncode
    )
    return subprocess.CompletedProcess(arguments, code, out, err)


def succeed(*arguments: str, ranks: int = 1) -> str:
    """Launch and demand success; the output."""
    result = launch(*arguments, ranks=ranks)
    assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def records(output_dir: Path, event: str) -> list[dict]:
    """The records of one kind in a run's metrics."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def losses(output_dir: Path) -> list[float]:
    """The loss of every training step; demands that each step was recorded once and in order."""
    train = records(output_dir, "train")
    assert [record["step"] for record in train] == list(range(1, len(train) + 1))
    return [record["loss"] for record in train]
