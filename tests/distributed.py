"""Run a test function on real ranks: one process each, gloo between them."""

import io
import itertools
import multiprocessing
import os
import socket
import time
import traceback
import zlib
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from tools.chaos_ranks import PRELOADED

SECONDS = 240
"""Until ranks count as hanging: long, since tests run side by side on machines of any speed."""
FIRST_PORT, PORTS = 10_240, 500
"""Ports of tests lie below those that the system deals out by itself; each process that runs tests has 500 of its own."""


def _own_ports() -> range:
    """Those of this process: workers of one test run are neighbours, and test runs beside each other far apart by chance."""
    test_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    blocks = (32_768 - FIRST_PORT) // PORTS
    first = FIRST_PORT + (zlib.crc32(test_run.encode()) + worker) % blocks * PORTS
    return range(first, first + PORTS)


_ports = itertools.cycle(_own_ports())


def free_port() -> int:
    """A TCP port that nobody listens on, and that no test beside this one is given either."""
    for port in _ports:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("a cycle has no end")


def start_process(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process of its own for `function(*arguments)`, with one thread unless it asks for more.

    It is forked off a server that has imported once what takes a rank some ten seconds: one server for all tests of this
    process, whichever of them comes first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "tests.warm", *PRELOADED])
    process = context.Process(target=function, args=arguments, daemon=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read once, when the server imports torch
    process.start()
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
    return process


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """`function(rank, *arguments)` on every rank of a gloo world; the ranks' results (tensors and plain values) in order.

    A rank that fails, or does not answer within `seconds`, fails the test with what it said.
    """
    port = free_port()
    answers, processes = [], []
    for rank in range(world_size):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        processes.append(start_process(_rank, function, rank, world_size, port, theirs, arguments))
        theirs.close()
        answers.append(ours)
    try:
        deadline, results, failures = time.monotonic() + seconds, [], []
        for rank, answer in enumerate(answers):
            try:
                assert answer.poll(max(0, deadline - time.monotonic())), f"rank {rank} did not answer"
                value, error = answer.recv()
            except EOFError:
                value, error = None, "ended without an answer"
            failures += [f"rank {rank}: {error}"] if error else []
            results.append(value)
        assert not failures, "\n".join(failures)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(io.BytesIO(value), weights_only=True) for value in results]


def _rank(function, rank, world_size, port, answer, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=SECONDS))
        value = function(rank, *arguments)
        dist.barrier()
        # As bytes: a tensor sent as such lives in memory that its rank frees when it ends.
        saved = io.BytesIO()
        torch.save(value, saved)
        answer.send((saved.getvalue(), None))
    except BaseException:
        answer.send((None, traceback.format_exc()))
        raise
