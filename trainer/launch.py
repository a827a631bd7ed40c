"""Who we are among the ranks, as any launcher tells it."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

FIRST_STEP_WITHOUT_SRUN = 0xFFFFFFF0
"""From here on SLURM's step ids mean no step that srun started: the shell of `salloc` (0xfffffffa, with
LaunchParameters=use_interactive_step), the batch script, processes from outside."""


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

        What the step says counts, not what the job says: a plain process in a shell of `salloc -n 4` is rank 0 of 1. The
        batch shell of a SLURM job carries SLURM_PROCID as well, so only SLURM_STEP_ID tells that srun started us.

        Raises:
            ValueError: half a set of variables.
        """
        if "RANK" in environment or "WORLD_SIZE" in environment:
            names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
            local_world = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
        elif "SLURM_PROCID" in environment and _is_started_by_srun(environment):
            total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
            names = {"rank": "SLURM_PROCID", "world_size": total, "local_rank": "SLURM_LOCALID"}
            local_world = _tasks_on_node(environment, environment.get(total))
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


def _is_started_by_srun(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return bool(step) and _number(step, "SLURM_STEP_ID", most=2**32 - 1) < FIRST_STEP_WITHOUT_SRUN


def _tasks_on_node(environment: Mapping[str, str], total: str | None) -> str | None:
    """This node's entry of a list such as `2(x3),1` (two tasks on each of three nodes, then one), else `total`."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", total)
    if tasks is None:
        return None
    counts: list[str] = []
    for part in tasks.split(","):
        count, _, repeat = part.partition("(x")
        counts += [count] * int(repeat.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]
