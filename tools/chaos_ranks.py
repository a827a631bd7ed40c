"""One start of the trainer on several ranks of this machine, which a fault may end; for `tools/chaos.py`.

Every rank is a process of its own that runs the trainer's command line. They are forked from a server that has the libraries
imported, so that a start takes a second and not ten.
"""

import multiprocessing as mp
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

from trainer.exit_codes import DONE, REQUEUE

PRELOADED = ["trainer.training", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx"]
"""What a rank imports at its start, or with its first engine."""
POLL_SECONDS = 0.05
SECONDS_TO_STOP = 60
"""For ranks that were asked to save and stop."""
SECONDS_TO_RUN = 600
"""For a start of a short training, after which it counts as hanging."""


SERVER = mp.get_context("forkserver")


def prepare() -> None:
    """Start the server, and wait until it has imported everything."""
    SERVER.set_forkserver_preload(PRELOADED)
    process = SERVER.Process(target=os.getpid)
    process.start()
    process.join()


class Ranks:
    """The ranks of one start.

    Args:
        arguments: of `trainer/run.py`.
        world_size: how many.
        log: file that all their output is appended to.
    """

    def __init__(self, arguments: list[str], world_size: int, log: Path):
        port = get_free_port()
        self.processes = [
            SERVER.Process(target=_rank, args=(rank, world_size, port, arguments, log)) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, after: float = 0.0, rank: int = 0, number: int | None = None) -> list[int | None]:
        """Until all have ended, or one has by an error or a signal; then the others are killed, as a launcher does.

        Args:
            after: seconds from now on, when a signal is sent.
            rank: to whom, if it lives.
            number: the signal; None = none.

        Returns:
            The exit code of every rank (negative: a signal); None = it had not ended by then.

        Raises:
            TimeoutError: they do not come to an end.
        """
        began, ending = time.monotonic(), None
        try:
            while True:
                wait([process.sentinel for process in self.processes if process.is_alive()], timeout=POLL_SECONDS)
                codes = [process.exitcode for process in self.processes]
                if None not in codes or not {*codes} <= {None, DONE, REQUEUE}:
                    return codes
                seconds = time.monotonic() - began
                if REQUEUE in codes:
                    ending = ending or seconds
                if seconds > SECONDS_TO_RUN or (ending is not None and seconds > ending + SECONDS_TO_STOP):
                    raise TimeoutError(f"ranks hang after {seconds:.0f} s with exit codes {codes}")
                if number is not None and seconds >= after:
                    if self.processes[rank].is_alive():
                        os.kill(self.processes[rank].pid, number)
                    number = None
        finally:
            for process in self.processes:
                process.kill()
                process.join()


def _rank(rank: int, world_size: int, port: int, arguments: list[str], log: Path) -> None:
    from trainer import run

    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    world = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in world.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.argv = ["trainer/run.py", *arguments]
    run.main()
