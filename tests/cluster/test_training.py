"""The trainer itself in jobs of two nodes: whatever happens to a job, one training curve comes out of it."""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Ending
from tests.cluster.jobs import B3, last_step, trainer_environment, write_tiny
from tests.cluster.processes import wait_until
from tests.launch import FP32, losses, records, succeed

STEPS = 100
EVERY = 10


class TrainingJob:
    """A run of `STEPS` tiny steps by b3's launcher on both nodes, with experts on both."""

    def __init__(self, cluster: Cluster, folder: Path, *settings: str) -> None:
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
        wait_until(lambda: last_step(self.run) >= step, seconds, f"step {step}", every=0.1)

    def freeze_amid_a_save(self) -> None:
        """Stop the rank that writes while it writes a checkpoint."""
        [pid] = [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_first_rank(path)]
        while True:
            wait_until(self._saves, 120, "a save", every=0.001)
            os.kill(pid, signal.SIGSTOP)
            if self._saves():
                return
            os.kill(pid, signal.SIGCONT)

    def _saves(self) -> bool:
        return any(self.run.glob("checkpoints/.tmp-step_*"))

    def _is_first_rank(self, process: Path) -> bool:
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            return process.joinpath("cwd").readlink() == self.folder and {b"SLURM_PROCID=0", b"SLURM_STEP_ID=0"} <= {
                *variables
            }
        except OSError:
            return False  # it has ended


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


def test_a_job_started_again_and_then_cut_off_amid_a_save_trains_the_same(cluster, unbroken, tmp_path):
    job = TrainingJob(cluster, tmp_path)
    job.wait_for_step(EVERY + 5)
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for_step(3 * EVERY)
    job.freeze_amid_a_save()
    cluster.crash("node0")
    cluster.boot("node0")
    assert cluster.wait(job.id, 240) == Ending("COMPLETED", "0:0", restarts=2), job.output
    assert losses(job.run) == unbroken
    begins = [start["step"] for start in records(job.run, "start")]
    assert begins[0] == 0 and begins[1] >= EVERY + 5, "it was to save before SLURM started it again"
    assert begins[2] >= 2 * EVERY and begins[2] % EVERY == 0
    assert not list(job.run.glob("**/.tmp-*"))


def test_a_refused_setting_fails_the_job_and_says_why_once(cluster, tmp_path):
    job = TrainingJob(cluster, tmp_path, "model.some.top_k=0")
    assert cluster.wait(job.id, 120) == Ending("FAILED", "2:0", restarts=0)
    [error] = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "top_k = 0" in error
    assert "Traceback" not in job.output


@pytest.mark.long
@pytest.mark.parametrize(("node", "fault"), [("node0", "unplug"), ("node1", "unplug"), ("node1", "crash")])
def test_a_job_whose_node_is_lost_until_slurm_misses_it_trains_the_same(cluster, unbroken, tmp_path, node, fault):
    """Ranks on both sides of a pulled cable live on, amid a step; the batch script and the rank that writes are on node0."""
    job = TrainingJob(cluster, tmp_path)
    job.wait_for_step(EVERY + 5)
    getattr(cluster, fault)(node)
    wait_until(lambda: cluster.node_states()[node] == "down*", 150, f"SLURM to miss {node}", every=0.5)
    getattr(cluster, {"unplug": "plug", "crash": "boot"}[fault])(node)
    assert cluster.wait(job.id, 400).state == "COMPLETED", job.output
    assert losses(job.run) == unbroken
