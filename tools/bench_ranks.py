"""Ranks to measure: processes with one thread each and gloo between them. Between two questions they wait on a pipe, so that
who is not measured takes no time.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.bench_table import BenchmarkFailed

SECONDS_TO_ANSWER = 600


@contextmanager
def started(ranks: int, serve: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """A pipe to each of `ranks` processes that run `serve(pipe, *arguments)` inside a process group; ended afterwards."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                meeting_point = (Path(folder) / "meet").as_uri()
                process = context.Process(
                    target=_run, args=(rank, ranks, meeting_point, serve, theirs, *arguments), daemon=True
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            yield pipes
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(rank: int, ranks: int, meeting_point: str, serve: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS_TO_ANSWER)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=ranks, timeout=timeout)
    serve(pipe, *arguments)


def ask(pipes: list[Connection], question: Any) -> list[Any]:
    """Every rank's answer.

    Raises:
        BenchmarkFailed: a rank ended early or does not answer.
    """
    answers = []
    try:
        for pipe in pipes:
            pipe.send(question)
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(SECONDS_TO_ANSWER):
                raise BenchmarkFailed(f"rank {rank} did not answer within {SECONDS_TO_ANSWER} s")
            answers.append(pipe.recv())
    except (EOFError, ConnectionError):
        raise BenchmarkFailed(f"a rank ended early; what it printed stands above (asked for: {question})") from None
    return answers
