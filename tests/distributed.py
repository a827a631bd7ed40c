"""Run a test function on real ranks: one process each, gloo between them."""

import io
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on every rank of a gloo world; the ranks' results in order.

    A rank that fails, or a world that does not end within two minutes, fails the test with the rank's traceback.
    """
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    gathered = {}
    while not results.empty():
        rank, value, error = results.get()
        assert error is None, f"rank {rank} failed:\n{error}"
        gathered[rank] = torch.load(io.BytesIO(value), weights_only=True)
    assert not hung, f"ranks {hung} did not end"
    assert len(gathered) == world_size, f"only ranks {sorted(gathered)} answered"
    return [gathered[rank] for rank in range(world_size)]


def _rank(function, rank, world_size, port, results, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        value = function(rank, *arguments)
        # As bytes: a tensor put into a queue lives in memory that its rank frees when it ends.
        saved = io.BytesIO()
        torch.save(value, saved)
        results.put((rank, saved.getvalue(), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
