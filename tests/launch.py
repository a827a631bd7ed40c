"""Run the trainer's command line as users do, in processes of its own."""

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed import SECONDS, free_port, start_process
from trainer import precision

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = str(REPOSITORY / "trainer" / "run.py")
FP32 = str(REPOSITORY / "ds_configs" / "zero2_fp32.json")


def environment(**extra: str) -> dict[str, str]:
    """Ours without what a surrounding launcher or SLURM job may have set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return clean | {"OMP_NUM_THREADS": "1"} | extra


def launch(
    *arguments: str, ranks: int = 1, timeout: float = 2 * SECONDS, best: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    """`trainer/run.py` on `ranks` ranks, the variables set as a launcher would; rank 0's output.

    All ranks are ended when one fails, as launchers do. `best` has the precision that suits each rank's machine, whatever
    the real one is.
    """
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        processes = []
        for rank in range(ranks):
            world = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **world) if ranks > 1 else environment()
            files = (str(out), str(err)) if rank == 0 else (os.devnull, os.devnull)
            suits = best[rank] if best else None
            processes.append(start_process(_command_line, arguments, variables, *files, suits))
        try:
            processes[0].join(timeout)
            if processes[0].exitcode == 0:
                for process in processes[1:]:
                    process.join(SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        code = codes[0] or next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(arguments, code, out.read_text("utf-8"), err.read_text("utf-8"))


def _command_line(arguments: tuple[str, ...], variables: dict[str, str], out: str, err: str, suits: str | None) -> None:
    """This process becomes `python trainer/run.py ARGUMENTS`."""
    if suits is not None:
        pretend_best(suits)
    os.environ.clear()
    os.environ |= variables
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def pretend_best(name: str) -> None:
    """From now on this precision suits the machine of this process."""
    precision.best_precision = lambda *_: precision.Precision(name, "pretended")


def succeed(*arguments: str, ranks: int = 1, best: tuple[str, ...] = ()) -> str:
    """Launch and demand success; the output."""
    result = launch(*arguments, ranks=ranks, best=best)
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


@contextmanager
def interrupted(*moments: tuple[signal.Signals, Path]) -> Iterator[None]:
    """Each signal comes to this process once its file is there."""

    def interrupt() -> None:
        for number, file in moments:
            wait_for(file.exists)
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt)
    sender.start()
    yield
    sender.join()


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, for minutes at most."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
