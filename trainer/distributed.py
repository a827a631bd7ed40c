"""Ranks: their devices, the process groups, and what they tell each other."""

import ipaddress
import os
import socket
from collections.abc import MutableMapping
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from trainer.launch import Launch

EXTRA_MINUTES = 30
"""What collectives have beyond `parallel.timeout_minutes`, so that the watchdog speaks first and data can be prepared."""


def check_gpus(launch: Launch) -> None:
    """Refuse more ranks on a node than GPUs that each of them can see.

    Raises:
        ValueError: this rank has no GPU of its own.
    """
    visible = torch.cuda.device_count()
    if visible and launch.local_rank >= visible:
        raise ValueError(
            f"environment: local rank {launch.local_rank} has no GPU, {visible} visible; start one rank a GPU, "
            f"and let every rank see all GPUs of its node (no --gpus-per-task)"
        )


def choose_device(launch: Launch) -> torch.device:
    """This rank's GPU, or the CPU with its share of the cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        return torch.device("cuda", launch.local_rank)
    threads = os.environ.get("OMP_NUM_THREADS")
    # torchrun sets one thread a rank whatever the machine has; share the cores instead.
    if threads is None or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    return torch.device("cpu")


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name gloo's interface where the host's own name leads to itself only, as Debian sets it up (127.0.1.1).

    Gloo listens at the address of that name, where ranks of other nodes cannot reach it. The address for them is the one
    with which this host would call the node that srun runs on; SLURM names that.
    """
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None or "GLOO_SOCKET_IFNAME" in environment:
        return
    try:
        if not ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback:
            return
    except OSError:
        pass  # a name that nobody knows is of no more use
    family, *_, target = socket.getaddrinfo(launcher, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses the way and sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in (address.address for address in addresses):
            environment["GLOO_SOCKET_IFNAME"] = name


def init_process_group(device: torch.device, timeout_minutes: float) -> None:
    """Form the world: NCCL on GPUs, gloo on CPUs."""
    choose_interface()
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=timeout_minutes + EXTRA_MINUTES),
        device_id=device if device.type == "cuda" else None,
    )


def expert_parallel_group(ep_size: int, timeout_minutes: float) -> dist.ProcessGroup | None:
    """The group of `ep_size` consecutive ranks that this rank belongs to; None when every rank holds the whole pool.

    Every rank creates every group, in the same order.
    """
    if ep_size == 1:
        return None
    mine = None
    for first in range(0, dist.get_world_size(), ep_size):
        ranks = list(range(first, first + ep_size))
        group = dist.new_group(ranks, timeout=timedelta(minutes=timeout_minutes + EXTRA_MINUTES))
        if dist.get_rank() in ranks:
            mine = group
    return mine


def key_store_group(timeout_minutes: float) -> dist.ProcessGroup:
    """All ranks once more: the key stores' sums travel while other collectives run, and must not mix with them."""
    return dist.new_group(timeout=timedelta(minutes=timeout_minutes + EXTRA_MINUTES))


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank."""
    return gather_texts(text)[0]


def demand_agreement(decision: str) -> None:
    """Compare over all ranks what each decided on its own.

    Raises:
        ValueError: on every rank, with two of the decisions.
    """
    decisions = gather_texts(decision)
    for rank, other in enumerate(decisions):
        if other != decisions[0]:
            raise ValueError(
                f"rank 0 would run {decisions[0]} and rank {rank} {other}; put --output_dir on storage that all ranks "
                f"share, and set parallel.ep_size where nodes have different numbers of ranks"
            )


def gather_texts(text: str) -> list[str]:
    """Every rank's text, by rank; a collective.

    Sent as UTF-8 in tensors: torch's collectives of objects unpickle what arrives, which can run a peer's code.
    """
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    data = text.encode("utf-8", "surrogateescape")
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.tensor(list(data.ljust(longest, b"\0")), dtype=torch.uint8, device=device)
    received = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return [
        bytes(row.tolist())[: int(size)].decode("utf-8", "surrogateescape")
        for row, size in zip(received, sizes, strict=True)
    ]
