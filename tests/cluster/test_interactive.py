"""Shells of `salloc` and `srun --pty`, on a terminal: plain `python` there is rank 0 of 1, `srun` makes ranks."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, why_not
from tests.cluster.jobs import trainer_environment, write_program, write_tiny
from tests.launch import FP32, REPOSITORY, SCRIPT

ASK = f"{sys.executable} -c 'from trainer.launch import Launch; print(\"found\", Launch.from_environment())'"
ALONE = "found Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)"
SHELLS = {"salloc -N2": 2, "salloc -N2 -n4": 4, "srun -n1 --pty bash": 1}
"""Commands that give a shell, and how many tasks a plain `srun` in it starts."""


@pytest.fixture(scope="module", params=["", "use_interactive_step"], ids=["plain", "use_interactive_step"])
def interactive_cluster(request) -> Iterator[Cluster]:
    """A cluster of its own: where the shell of salloc runs is a setting of the whole cluster."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="some-cluster-"))
    cluster = Cluster.up(folder, nodes=2, cpus=4, launch_parameters=request.param)
    cluster.uses_interactive_step = bool(request.param)
    yield cluster
    cluster.down()
    shutil.rmtree(folder)


def type_into(cluster: Cluster, shell: str, commands: list[str], folder: Path) -> list[str]:
    """What `commands` print in the shell that the command `shell` gives on a terminal, line by line."""
    # In a file: what reads a shell's input, such as srun, would eat what is typed ahead.
    program = write_program(folder / "commands", "\n".join(["#!/bin/bash", *commands, "exit 0\n"]))
    environment = trainer_environment(
        SLURM_CONF=str(cluster.configuration), PYTHONPATH=str(REPOSITORY), SHELL="/bin/bash", TERM="dumb"
    )
    result = subprocess.run(
        ["script", "--quiet", "--return", "--command", shell, "/dev/null"],
        input=f"exec {program}\n", cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=240,
    )  # fmt: skip
    return result.stdout.replace("\r", "").splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_plain_python_is_alone_and_srun_makes_ranks(interactive_cluster, tmp_path, shell):
    lines = type_into(interactive_cluster, shell, [ASK, f"srun --overlap {ASK}", "echo in step $SLURM_STEP_ID."], tmp_path)
    found, tasks = [line for line in lines if line.startswith("found")], SHELLS[shell]
    assert found[0] == ALONE, lines
    ranks = sorted(int(line.split("rank=")[1].split(",")[0]) for line in found[1:])
    assert ranks == list(range(tasks)) and all(f"world_size={tasks}," in line for line in found[1:]), lines
    is_interactive_step = shell.startswith("salloc") and interactive_cluster.uses_interactive_step
    step = "4294967290" if is_interactive_step else "" if shell.startswith("salloc") else "0"
    assert f"in step {step}." in lines, "the shell runs where this test means it to"


def test_a_plain_run_in_an_allocation_of_several_tasks_trains(interactive_cluster, tmp_path):
    experiment, run = write_tiny(tmp_path, steps=2), tmp_path / "run"
    train = f"{sys.executable} {SCRIPT} --ds_config {FP32} --experiment {experiment} --output_dir {run}"
    lines = type_into(interactive_cluster, "salloc -N2 -n4", [train], tmp_path)
    assert f"finished at step 2: {run}" in lines, lines
