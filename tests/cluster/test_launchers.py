"""Every launcher on the cluster: what sbatch says of it, and what its ranks find."""

import re
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Ending
from tests.cluster.jobs import (
    B3,
    SWEEP,
    job_environment,
    stand_in_environment,
    trainer_environment,
    write_program,
    write_tiny,
)
from tests.launch import REPOSITORY, losses

LAUNCHERS = {"a4_64experts": 1, "b1_128experts": 1, "b2_256experts": 2, "b3_512experts": 2, "series_b": 2, "sweep": 1}
"""Each launcher and its nodes."""
GRID = ["--grid", "train.learning_rate=3e-4,6e-4"]


def test_sbatch_accepts_every_launcher(cluster):
    for name, nodes in {**LAUNCHERS, "reproduce": 1}.items():
        answer = cluster.run("sbatch", "--test-only", str(REPOSITORY / "slurm" / f"{name}.sh"))
        assert re.search(rf"to start at .* on nodes node{re.escape('[0-1]' if nodes == 2 else '0')} ", answer), answer


def test_every_task_sees_all_gpus_of_the_job_on_its_node(cluster, tmp_path):
    show = "echo task $SLURM_PROCID/$SLURM_NTASKS local $SLURM_LOCALID on $(hostname) sees ${CUDA_VISIBLE_DEVICES:-none}"
    python = write_program(tmp_path / "python", f"#!/bin/bash\n{show} with $OMP_NUM_THREADS threads\n")
    cases = [
        ([], 2, "none", 1),
        (["--gpus-per-node=2", "--cpus-per-gpu=1"], 4, "0,1", 1),
        (["--exclusive"], 4, "0,1", 2),
        (["--exclusive", "--gpus-per-node=1"], 2, "0", 4),
        (["--ntasks=4", "--gpus-per-task=1"], 4, "0,1", 1),
        (["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2"], 4, "0,1", 2),
    ]
    variables = job_environment(SOME_HOME=str(REPOSITORY), SOME_PYTHON=str(python))
    jobs = [cluster.submit(*options, B3, cwd=tmp_path, environment=variables) for options, *_ in cases]
    for job, (options, ranks, gpus, threads) in zip(jobs, cases, strict=True):
        ending, per_node = cluster.wait(job, 240), ranks // 2
        output = (tmp_path / f"slurm-some-b3-{job}.out").read_text(encoding="utf-8")
        assert ending == Ending("COMPLETED", "0:0", restarts=0), output
        assert sorted(line for line in output.splitlines() if line.startswith("task")) == [
            f"task {r}/{ranks} local {r % per_node} on node{r // per_node} sees {gpus} with {threads} threads"
            for r in range(ranks)
        ], options


def test_every_launcher_runs_its_experiments(cluster, tmp_path):
    """With a stand-in for the trainer; one launcher after the other with the trainer itself takes --long."""
    expected = {
        "a4_64experts": ["a4"], "b1_128experts": ["b1"], "b2_256experts": ["b2"], "b3_512experts": ["b3"],
        "series_b": ["a4", "b1", "b2", "b3"],
        "sweep": ["sweep/a4/train.learning_rate=3e-4", "sweep/a4/train.learning_rate=6e-4"],
    }  # fmt: skip
    jobs = {}
    for name in LAUNCHERS:
        settings = stand_in_environment(tmp_path / name, "steps=2 every=2")
        arguments = ["--array=0-1", SWEEP, "a4", *GRID] if name == "sweep" else [str(REPOSITORY / "slurm" / f"{name}.sh")]
        jobs[name] = cluster.submit(*arguments, cwd=tmp_path / name, environment=settings)
    for name, runs in expected.items():
        tasks = [f"{jobs[name]}_{task}" for task in range(len(runs))] if len(runs) > 1 else [jobs[name]]
        assert [cluster.wait(task, 240).state for task in tasks] == ["COMPLETED"] * len(tasks)
        found = sorted(path.parent for path in (tmp_path / name / "runs").glob("**/checkpoints"))
        assert found == [tmp_path / name / "runs" / run for run in runs]
        for run in found:
            assert (run / "log").read_text(encoding="utf-8").count("is done") == LAUNCHERS[name]


@pytest.mark.long
def test_every_launcher_trains(cluster, tmp_path):
    small = [word for setting in flat_settings(write_tiny(tmp_path, steps=4)) for word in ("--set", setting)]
    for name in LAUNCHERS:
        script, variables = str(REPOSITORY / "slurm" / f"{name}.sh"), trainer_environment()
        if name == "sweep":
            arguments, last = ["--array=0-1", script, "tiny.yaml", *GRID], "_1"
        elif name == "series_b":
            arguments, last = [script, *small], "_3"
        else:
            arguments, last = [script, "--output_dir", f"runs/of_{name}"], ""
            variables["SOME_EXPERIMENT"] = "tiny.yaml"
        job = cluster.submit(*arguments, cwd=tmp_path, environment=variables)
        assert cluster.wait(job + last, 600).state == "COMPLETED"
    runs = sorted(path.parent.name for path in (tmp_path / "runs").glob("**/metrics.jsonl"))
    rates = ["train.learning_rate=3e-4", "train.learning_rate=6e-4"]
    assert runs == sorted(["a4", "b1", "b2", "b3", *rates, *(f"of_{name}" for name in list(LAUNCHERS)[:4])])
    for path in (tmp_path / "runs").glob("**/metrics.jsonl"):
        assert len(losses(path.parent)) == 4


def flat_settings(experiment: Path) -> list[str]:
    """What an experiment's YAML sets, as `--set` takes it; its name and experts left out."""
    values = yaml.safe_load(experiment.read_text(encoding="utf-8"))
    some = values["model"].pop("some") | {"num_experts": None}
    sections = values | {"model.some": some}
    return [
        f"{section}.{key}={value}"
        for section, keys in sections.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value is not None
    ]
