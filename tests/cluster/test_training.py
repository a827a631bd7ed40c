"""The trainer itself in jobs of two nodes: whatever happens to a job, one training curve comes out of it."""

import pytest

from tests.cluster.cluster import Cluster, Ending
from tests.cluster.jobs import B3, last_step, trainer_environment, write_tiny
from tests.cluster.processes import wait_until
from tests.launch import FP32, losses, records, succeed

STEPS = 100
EVERY = 10


class TrainingJob:
    """A run of `STEPS` tiny steps by b3's launcher on both nodes, with experts on both."""

    def __init__(self, cluster: Cluster, folder, *settings: str) -> None:
        self.folder, self.run = folder, folder / "runs" / "tiny"
        write_tiny(folder, STEPS)
        changes = ["parallel.ep_size=2", f"checkpoint.every={EVERY}", "train.eval_every=1000", *settings]
        words = [word for change in changes for word in ("--set", change)]
        environment = trainer_environment(SOME_EXPERIMENT="tiny.yaml")
        self.id = cluster.submit(B3, *words, cwd=folder, environment=environment)

    @property
    def output(self) -> str:
        """What the job printed."""
        return (self.folder / f"slurm-some-b3-{self.id}.out").read_text(encoding="utf-8")

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        """Wait until a step was recorded."""
        wait_until(lambda: last_step(self.run) >= step, seconds, f"step {step}")


@pytest.fixture(scope="module")
def unbroken(session_cluster, tmp_path_factory) -> list[float]:
    """The losses of a job that nothing happens to."""
    session_cluster.wait_for_nodes()
    job = TrainingJob(session_cluster, tmp_path_factory.mktemp("unbroken"))
    ending = session_cluster.wait(job.id, 240)
    assert ending == Ending("COMPLETED", "0:0", restarts=0), job.output
    [start] = records(job.run, "start")
    assert (start["world_size"], start["ep_size"]) == (2, 2)
    assert len(losses(job.run)) == STEPS
    return losses(job.run)


def test_two_nodes_train_what_one_process_trains(unbroken, tmp_path):
    experiment = write_tiny(tmp_path, STEPS)
    changes = ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    succeed("--ds_config", FP32, "--experiment", str(experiment), *changes)
    assert unbroken[:3] == pytest.approx(losses(tmp_path / "run"), rel=2e-6)


def test_a_job_started_again_by_slurm_and_after_a_power_cut_trains_the_same(cluster, unbroken, tmp_path):
    job = TrainingJob(cluster, tmp_path)
    job.wait_for_step(EVERY + 5)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for_step(3 * EVERY + 5)
    cluster.crash("node0")
    cluster.boot("node0")
    assert cluster.wait(job.id, 240) == Ending("COMPLETED", "0:0", restarts=2), job.output
    assert losses(job.run) == unbroken
    resumed = [start["step"] for start in records(job.run, "start")]
    assert resumed[0] == 0 and all(step >= EVERY for step in resumed[1:])


def test_a_refused_setting_fails_the_job_and_says_why_once(cluster, tmp_path):
    job = TrainingJob(cluster, tmp_path, "model.some.top_k=0")
    assert cluster.wait(job.id, 120) == Ending("FAILED", "2:0", restarts=0)
    [error] = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "top_k = 0" in error
    assert "Traceback" not in job.output


@pytest.mark.long
@pytest.mark.parametrize("node", ["node0", "node1"])
def test_a_job_whose_node_loses_its_cable_trains_the_same(cluster, unbroken, tmp_path, node):
    """SLURM itself has to notice, while the ranks on both sides still run; node0 has the one that writes."""
    job = TrainingJob(cluster, tmp_path)
    job.wait_for_step(EVERY + 5)
    cluster.unplug(node)
    wait_until(lambda: cluster.node_states()[node] == "down*", 150, f"SLURM to miss {node}", every=0.5)
    cluster.plug(node)
    assert cluster.wait(job.id, 400).state == "COMPLETED", job.output
    assert losses(job.run) == unbroken
