"""Launchers' variables, and how a batch and a pool are laid out."""

import os

import pytest

from tests.distributed import run_ranks
from trainer.config import load_experiment
from trainer.distributed import check_gpus, demand_agreement
from trainer.launch import Launch
from trainer.layout import Layout

SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, Launch(1, 2, 1, 2)),  # deepspeed
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, Launch(5, 7, 1, 2)),
        (
            {**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"},
            Launch(6, 7, 0, 1),
        ),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, Launch(0, 1, 0, 1)),  # a batch shell
    ],
)
def test_launch_reads_every_launcher(environment, expected):
    assert Launch.from_environment(environment) == expected


def step(number: int, tasks: int, per_node: str, rank: int = 0, local: int = 0, node: int = 0, **job: str) -> dict[str, str]:
    """What a task of a step finds in its environment, and what the job adds."""
    own = {"SLURM_STEP_ID": number, "SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": per_node}
    own |= {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node, "SLURM_JOB_ID": 41977008}
    return {name: str(value) for name, value in own.items()} | job


INTERACTIVE, BATCH = 0xFFFFFFFA, 0xFFFFFFFB
JOB_OF_4 = {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "3,1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}, Launch(0, 1, 0, 1)),  # salloc -N2
        ({"SLURM_JOB_ID": "1", **JOB_OF_4}, Launch(0, 1, 0, 1)),  # salloc -n4
        (step(INTERACTIVE, 1, "1", SLURM_TASKS_PER_NODE="1(x2)"), Launch(0, 1, 0, 1)),  # salloc, use_interactive_step
        (step(INTERACTIVE, 1, "1", **JOB_OF_4), Launch(0, 1, 0, 1)),  # salloc -n4, use_interactive_step
        (step(INTERACTIVE, 4, "4", **JOB_OF_4), Launch(0, 1, 0, 1)),  # never a rank of several
        (step(BATCH, 4, "4", **JOB_OF_4), Launch(0, 1, 0, 1)),
        (step(0, 4, "3,1", rank=3, node=1, **JOB_OF_4), Launch(3, 4, 0, 1)),  # srun in each of these
        (step(0, 4, "3,1", rank=2, local=2, **JOB_OF_4), Launch(2, 4, 2, 3)),
        (step(1, 2, "1(x2)", rank=1, node=1), Launch(1, 2, 0, 1)),  # srun in salloc -N2: no SLURM_NTASKS of the job
        (step(0, 1, "1", SLURM_NTASKS="1", SLURM_PTY_PORT="40005"), Launch(0, 1, 0, 1)),  # srun --pty bash
        (step(7, 1, "1", **JOB_OF_4), Launch(0, 1, 0, 1)),  # srun -n1 --overlap beside others
    ],
)
def test_the_step_counts_and_not_the_job(environment, expected):
    """Environments as SLURM 22.05 to 25.05 makes them; tests/cluster/test_interactive.py asks a real one."""
    assert Launch.from_environment(environment) == expected


def test_half_a_step_is_refused():
    with pytest.raises(ValueError, match="SLURM_NTASKS not set; start with deepspeed, torchrun or srun"):
        Launch.from_environment({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    with pytest.raises(ValueError, match="SLURM_STEP_ID = 'x' is no number"):
        Launch.from_environment({"SLURM_STEP_ID": "x", "SLURM_PROCID": "0"})


def test_half_an_environment_is_refused():
    with pytest.raises(ValueError, match="WORLD_SIZE, LOCAL_RANK not set; start with deepspeed, torchrun or srun"):
        Launch.from_environment({"RANK": "1"})


def test_srun_tells_where_the_ranks_meet(monkeypatch, tmp_path):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "unset")  # so that monkeypatch puts back what export() sets
        monkeypatch.delenv(name)
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$3" = "node[3-4]" ] && echo node3 && echo node4\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match="MASTER_ADDR or MASTER_PORT not set; start with"):
        Launch(1, 2, 0, 1).export()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[3-4]")
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    Launch(1, 2, 0, 1).export()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node3", "23456")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "2", "0")


def test_a_rank_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_gpus(Launch(1, 4, 1, 2))
    with pytest.raises(ValueError, match="local rank 2 has no GPU, 2 visible"):
        check_gpus(Launch(2, 4, 2, 4))


def _disagree(rank: int) -> str:
    demand_agreement("the same")
    try:
        demand_agreement(f"step {rank}")
    except ValueError as error:
        return str(error)
    return "nothing"


def test_ranks_that_decided_differently_all_stop():
    for message in run_ranks(_disagree, 2):
        assert message.startswith("rank 0 would run step 0 and rank 1 step 1; put --output_dir on storage")


def layout(ranks: int, per_node: int, *settings: str) -> Layout:
    return Layout.of(load_experiment("quickstart", list(settings)), Launch(0, ranks, 0, per_node))


@pytest.mark.parametrize(
    ("ranks", "per_node", "settings", "expected"),
    [
        (1, 1, [], Layout(1, 16, 2)),
        (2, 2, [], Layout(2, 16, 1)),
        (8, 4, [], Layout(4, 4, 1)),
        (6, 3, ["train.batch_size=36"], Layout(1, 6, 1)),  # 3 does not divide 16 experts
        (12, 6, ["train.batch_size=48"], Layout(2, 4, 1)),
        (2, 2, ["parallel.placement=balanced", "parallel.replicas=16"], Layout(2, 16, 1)),
        (1, 1, ["parallel.placement=balanced", "parallel.replicas=auto"], Layout(1, 16, 2)),  # none are wanted there
        (3, 3, ["train.batch_size=42", "train.max_micro_batch=8", "parallel.ep_size=1"], Layout(1, 7, 2)),
        (1, 1, ["train.max_micro_batch=5"], Layout(1, 4, 8)),
    ],
)
def test_layout(ranks, per_node, settings, expected):
    ours = layout(ranks, per_node, *settings)
    assert ours == expected


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (3, [], "train.batch_size = 32 does not divide over 3 ranks; nearest that do: 30, 33"),
        (64, [], "train.batch_size = 32 does not divide over 64 ranks; nearest that do: 64"),
        (4, ["parallel.ep_size=3"], "parallel.ep_size = 3 does not divide the 4 ranks; sizes that do: 1, 2, 4, or auto"),
        (
            6,
            ["train.batch_size=36", "parallel.ep_size=3"],
            "parallel.ep_size = 3 does not divide model.some.num_experts = 16",
        ),
        (
            1,
            ["parallel.placement=balanced", "parallel.replicas=1"],
            "parallel.replicas = 1 has no effect where parallel.ep_size is 1 .*; set parallel.replicas=0",
        ),
        (
            2,
            ["parallel.placement=balanced", "parallel.replicas=17"],
            "parallel.replicas = 17 is more than 2 ranks can hold; set it between 0 and 16",
        ),
    ],
)
def test_refused_layouts_name_what_would_do(ranks, settings, message):
    with pytest.raises(ValueError, match=message):
        layout(ranks, ranks, *settings)
