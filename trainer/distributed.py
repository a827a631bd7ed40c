"""Ranks: who we are under any launcher, the process group, and how a global batch is laid out over the ranks."""

import ipaddress
import os
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from modeling.some.placement import Placement
from trainer.config import Experiment

EXTRA_MINUTES = 30
"""What collectives have beyond `parallel.timeout_minutes`, so that the watchdog speaks first and data can be prepared."""


@dataclass(frozen=True)
class Launch:
    """This process's place in the job, as its launcher tells it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Launch":
        """Read the variables of deepspeed and torchrun, or of a SLURM step; a plain process is rank 0 of 1.

        The batch shell of a SLURM job carries SLURM_PROCID as well, so only SLURM_STEP_ID tells that srun started us.

        Raises:
            ValueError: half a set of variables.
        """
        if "RANK" in environment or "WORLD_SIZE" in environment:
            names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
            local_world = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
        elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
            names = {"rank": "SLURM_PROCID", "world_size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}
            local_world = _tasks_on_node(environment)
        else:
            return Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
        missing = [name for name in names.values() if name not in environment]
        if missing:
            raise ValueError(f"environment: {', '.join(missing)} not set; start with deepspeed, torchrun or srun")
        values = {field: _number(environment[name], name) for field, name in names.items()}
        here = _number(local_world, "ranks on this node") if local_world else values["world_size"]
        for field, most in (("rank", values["world_size"]), ("local_rank", here)):
            if values[field] >= most:
                raise ValueError(
                    f"environment: {names[field]} = {values[field]} of {most} ranks, counted from 0; start with deepspeed, "
                    f"torchrun or srun"
                )
        return Launch(**values, local_world_size=here)

    def export(self) -> None:
        """Set the variables that torch.distributed and DeepSpeed read, where the launcher did not.

        Raises:
            ValueError: several ranks and no way to tell where they meet.
        """
        settings = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        for name, value in {**settings, "LOCAL_WORLD_SIZE": self.local_world_size}.items():
            os.environ.setdefault(name, str(value))
        if self.world_size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # A lone process meets nobody: port 0 lets the system choose, so runs side by side cannot collide. (Under
            # torchrun it meets torchrun, whose port it must keep.)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            if "SLURM_STEP_NODELIST" not in os.environ:
                raise ValueError("environment: MASTER_ADDR or MASTER_PORT not set; start with deepspeed, torchrun or srun")
            os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
        _number(os.environ["MASTER_PORT"], "MASTER_PORT", most=65535)


def _number(text: str, name: str, most: int = 2**31) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= most):
        raise ValueError(
            f"environment: {name} = {text!r} is no number between 0 and {most}; start with deepspeed, torchrun or srun"
        )
    return int(text)


def _first_host(nodes: str) -> str:
    """The first of a SLURM list such as `node[3-7,9]`."""
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ValueError(f"environment: scontrol cannot expand SLURM_STEP_NODELIST = {nodes}; set MASTER_ADDR") from None


def _tasks_on_node(environment: Mapping[str, str]) -> str:
    """This node's entry of a list such as `2(x3),1` (two tasks on each of three nodes, then one)."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_NTASKS"]).split(","):
        count, _, repeat = part.partition("(x")
        counts += [count] * int(repeat.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


@dataclass(frozen=True)
class Layout:
    """How the experiment's global batch and pool are spread over the ranks."""

    ep_size: int
    micro_batch: int
    accumulation: int

    @staticmethod
    def of(experiment: Experiment, launch: Launch) -> "Layout":
        """The layout of `experiment` on this job's ranks.

        Raises:
            ValueError: a batch or an ep_size that does not divide, with the nearest that do, or replicas without room.
        """
        ep_size = _ep_size(experiment, launch)
        _check_replicas(experiment, ep_size)
        batch, world = experiment.train.batch_size, launch.world_size
        if batch % world:
            nearest = sorted({max(world, batch // world * world), (batch // world + 1) * world})
            raise ValueError(
                f"train.batch_size = {batch} does not divide over {world} ranks; nearest that do: "
                f"{', '.join(map(str, nearest))}"
            )
        share = batch // world
        largest = min(share, experiment.train.max_micro_batch)
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
        return Layout(ep_size=ep_size, micro_batch=micro, accumulation=share // micro)


def _ep_size(experiment: Experiment, launch: Launch) -> int:
    asked, experts, world = experiment.parallel.ep_size, experiment.model.some.num_experts, launch.world_size
    if asked == "auto":
        node = launch.local_world_size
        return next(n for n in range(node, 0, -1) if node % n == 0 and world % n == 0 and experts % n == 0)
    if world % asked:
        sizes = [n for n in range(1, world + 1) if world % n == 0 and experts % n == 0]
        raise ValueError(
            f"parallel.ep_size = {asked} does not divide the {world} ranks; sizes that do: "
            f"{', '.join(map(str, sizes))}, or auto"
        )
    Placement.contiguous(experts, asked)
    return asked


def _check_replicas(experiment: Experiment, ep_size: int) -> None:
    """A rank holds an expert at most once, so a group has room for ep_size - 1 copies of each besides the first."""
    replicas, room = experiment.parallel.replicas, experiment.model.some.num_experts * (ep_size - 1)
    if replicas == "auto" or replicas <= room:
        return
    if ep_size == 1:
        raise ValueError(
            f"parallel.replicas = {replicas} has no effect where parallel.ep_size is 1 and every rank holds all experts; "
            f"set parallel.replicas=0 or auto, or parallel.ep_size to 2 or more"
        )
    raise ValueError(f"parallel.replicas = {replicas} is more than {ep_size} ranks can hold; set it between 0 and {room}")


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
