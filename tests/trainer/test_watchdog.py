"""Hangs of real ranks: the others end the job and name the one to blame; slow ranks and suspended jobs go on."""

import os
import re
import signal
import threading
import time
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import SECONDS, free_port, start_process
from tests.trainer.test_stopping import TINY, wait_for
from tests.training import make_trainer
from trainer import loop, watchdog
from trainer.exit_codes import FAILED
from trainer.watchdog import Progress, Watchdog

LIMIT_S = 6.0
"""Longer than anything that a rank does between two signs of life, beside other tests on a slow machine."""


def _rank(rank: int, ranks: int, port: int, folder: Path, case: str) -> None:
    """One rank of a job of `ranks`; what it writes to stderr goes to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    watchdog.SECONDS_FOR_AN_ANSWER = 3.0
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    if case == "blocked loader":
        _train(rank == ranks - 1, folder)
    else:
        _reduce(rank, case, folder)


def _train(is_blocked: bool, folder: Path) -> None:
    trainer = make_trainer(folder / "run", "quickstart", [*TINY, f"data.cache_dir={folder}/cache"])
    load = loop.micro_batches

    def blocked(*arguments):
        if is_blocked and trainer.state.step == 2:
            threading.Event().wait()
        return load(*arguments)

    loop.micro_batches = blocked
    with Watchdog(trainer.progress, LIMIT_S / 60):
        trainer.run(stop=8)


def _reduce(rank: int, case: str, folder: Path) -> None:
    """Steps that are one collective, without end or until the file `enough` is there."""
    progress, step = Progress(), 0
    with Watchdog(progress, LIMIT_S / 60) as dog:
        enough = False
        while not enough:
            step += 1
            progress.mark("forward and backward", step)
            box = [rank == 0 and (folder / "enough").exists()]
            dist.broadcast_object_list(box)
            enough = box[0]
            if dog._posts > 2 and dog._first["step"] > 0:
                (folder / f"{rank}.going").touch()
        progress.mark("writing a checkpoint", step)
        until = time.monotonic() + 2 * LIMIT_S
        while rank == 0 and time.monotonic() < until:
            time.sleep(0.05)
            progress.alive()
        dist.barrier()


def start(folder: Path, case: str, ranks: int) -> list[BaseProcess]:
    port = free_port()
    return [start_process(_rank, rank, ranks, port, folder, case) for rank in range(ranks)]


def end_of(processes: list[BaseProcess], folder: Path) -> tuple[list[int], str]:
    """Exit codes and what was written to stderr, both of these processes together."""
    try:
        for process in processes:
            process.join(SECONDS)
        return [p.exitcode for p in processes], "".join(path.read_text() for path in sorted(folder.glob("*.err")))
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_ends_the_job_with_its_name(tmp_path, stopped):
    processes = start(tmp_path, "endless", ranks=2)
    try:
        wait_for(lambda: all((tmp_path / f"{rank}.going").exists() for rank in (0, 1)))
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        codes, said = end_of([processes[1 - stopped]], tmp_path)
    finally:
        processes[stopped].kill()
    assert codes == [FAILED]
    why = ["rank 0 .*, where the ranks met, does not answer", "rank 1 .* no longer reports"][stopped]
    assert re.search(rf"no rank has moved for 6 s \(parallel.timeout_minutes = 0.1.*suspect: {why}; start again", said), said
    for rank in (0, 1):
        assert re.search(
            rf"^  rank {rank} \(.*pid {processes[rank].pid}\): step \d+, forward and backward, \d+ s", said, re.M
        )
    assert said.count("silent") == 1 and said.count("error:") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loader_that_blocks_is_named(tmp_path, ranks):
    codes, said = end_of(start(tmp_path, "blocked loader", ranks), tmp_path)
    assert codes == [FAILED] * ranks
    assert said.count("error:") == 1 and "Traceback" not in said, "one rank speaks for all"
    guilty = ranks - 1
    assert re.search(rf"suspect: rank {guilty} \(host .*\) is the furthest behind; start again", said), said
    assert re.search(
        rf"^  rank {guilty} .*: step 3, loading data, \d+ s ago, at test_watchdog.py:\d+ in blocked$", said, re.M
    )
    assert ranks == 1 or re.search(r"^  rank 0 .*: step 3, forward and backward, ", said, re.M)


def test_a_suspended_job_and_a_rank_that_others_wait_for_go_on(tmp_path):
    processes = start(tmp_path, "until enough", ranks=2)
    wait_for(lambda: all((tmp_path / f"{rank}.going").exists() for rank in (0, 1)))
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * LIMIT_S)
    for process in processes:
        os.kill(process.pid, signal.SIGCONT)
    (tmp_path / "enough").touch()
    assert end_of(processes, tmp_path) == ([0, 0], "")
