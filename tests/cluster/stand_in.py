"""Stands in for the trainer where a test is about the batch script: steps, checkpoints, signals and exit codes in no time.

    STAND_IN='steps=10 every=5 fail=7' python stand_in.py trainer/run.py ... --output_dir DIR

It goes on from the newest checkpoint, saves and exits with 75 on SIGTERM or SIGUSR2, and writes into DIR/log how each
attempt began, was stopped and ended. With `fail=N` rank 0 exits with `code` (default 1) at step N, `refuse=1` refuses as
trainer/run.py does, and a step takes `seconds` (default 0.05).
"""

import os
import signal
import sys
import time
from pathlib import Path

settings = dict(word.split("=") for word in os.environ["STAND_IN"].split())
steps, every, fail = (int(settings.get(name, 0)) for name in ("steps", "every", "fail"))
rank, run = int(os.environ["SLURM_PROCID"]), Path(sys.argv[len(sys.argv) - 1 - sys.argv[::-1].index("--output_dir") + 1])
resume = sys.argv[len(sys.argv) - sys.argv[::-1].index("--resume")] if "--resume" in sys.argv else "default"


def log(text: str) -> None:
    """Add a line to DIR/log."""
    with open(run / "log", "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def save(step: int) -> None:
    """Write a checkpoint of nothing."""
    if rank == 0:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(exist_ok=True)


def end_together(code: int) -> None:
    """Exit when all ranks do, as ranks that have met do: srun kills those that are left, and takes the code of the killed.

    Not for long, since a rank may be gone with its node.
    """
    mark, deadline = f".ends-{os.environ.get('SLURM_RESTART_COUNT', '0')}", time.monotonic() + 4
    (run / f"{mark}-{rank}").touch()
    while len(list(run.glob(f"{mark}-*"))) < int(os.environ["SLURM_NTASKS"]) and time.monotonic() < deadline:
        time.sleep(0.001)
    os._exit(code)


if "refuse" in settings:
    if rank == 0:
        Path(os.environ["SOME_VERDICT_FILE"]).write_text("2", encoding="ascii")
        sys.exit(2)
    time.sleep(60)
stopped = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: stopped.append(signal.Signals(number).name))
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
step = max((int(path.name[5:]) for path in run.glob("checkpoints/step_*")), default=0)
log(f"rank {rank} begins at {step} resume {resume} on {os.uname().nodename}")
while step < steps:
    if stopped:
        # As long as a small save may take on slow storage, and longer than SLURM's tools take to tell everybody.
        time.sleep(2)
        log(f"rank {rank} saves at {step} for {stopped[0]}")
        save(step)
        end_together(75)
    time.sleep(float(settings.get("seconds", 0.05)))
    step += 1
    if every and step % every == 0:
        save(step)
    if step == fail and rank == 0:
        sys.exit(int(settings.get("code", 1)))
log(f"rank {rank} is done")
