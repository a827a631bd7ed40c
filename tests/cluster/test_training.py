"""The trainer itself in jobs of two nodes: whatever happens to a job, one training curve comes out of it."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, Ending
from tests.cluster.jobs import B3, last_step, steps_of, trainer_environment, write_tiny
from tests.cluster.processes import wait_until
from tests.launch import FP32, losses, records, succeed

STEPS = 100
EVERY = 10


class TrainingJob:
    """A run of `STEPS` tiny steps by b3's launcher on both nodes, with experts on both."""

    def __init__(self, cluster: Cluster, folder: Path, *settings: str, sbatch: Sequence[str] = ()) -> None:
        self.folder, self.run = folder, folder / "runs" / "tiny"
        write_tiny(folder, STEPS)
        changes = ["parallel.ep_size=2", f"checkpoint.every={EVERY}", "train.eval_every=1000", *settings]
        words = [word for change in changes for word in ("--set", change)]
        environment = trainer_environment(SOME_EXPERIMENT="tiny.yaml")
        self.id = cluster.submit(*sbatch, B3, *words, cwd=folder, environment=environment)

    @property
    def output(self) -> str:
        """What the job printed."""
        return (self.folder / f"slurm-some-b3-{self.id}.out").read_text(encoding="utf-8")

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        """Wait until a step was recorded."""
        wait_until(lambda: last_step(self.run) >= step, seconds, f"step {step}", every=0.1)

    def outlast(self, what: str, fault: Callable[[], object]) -> str:
        """Bring about a fault and wait until the job has been started again and got further.

        Returns:
            A row of the table of `lost`: what was done, seconds until the checkpoint that the ranks wrote for it was whole,
            seconds until a step was recorded again, and steps that were done twice.
        """
        starts, reached, began = len(steps_of(self.run, "start")), 0, time.time()
        fault()

        def started_again() -> bool:
            nonlocal reached
            is_again = len(steps_of(self.run, "start")) > starts
            # Steps that are to be done twice are taken out of the metrics before the start is noted there.
            reached = reached if is_again else max(reached, last_step(self.run))
            return is_again

        wait_until(started_again, 400, f"another start after: {what}", every=0.1)
        pointer = self.run / "checkpoints" / "latest"
        saved, step = pointer.stat().st_mtime - began, steps_of(self.run, "start")[-1]
        wait_until(lambda: last_step(self.run) > step, 400, f"a step after: {what}", every=0.1)
        written = f"{saved:.1f}" if saved > 0 else "-"
        return f"| {what} | {written} | {time.time() - began:.0f} | {reached - step} |"

    def freeze_amid_a_save(self) -> None:
        """Stop the rank that writes while it writes a checkpoint."""
        pid = self.first_rank
        while True:
            wait_until(self._saves, 240, "a save", every=0.001)
            os.kill(pid, signal.SIGSTOP)
            if self._saves():
                return
            os.kill(pid, signal.SIGCONT)

    @property
    def first_rank(self) -> int:
        """The process of the rank that writes."""
        [pid] = [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_first_rank(path)]
        return pid

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


@pytest.fixture(scope="module")
def lost() -> Iterator[list[str]]:
    """What each fault cost, which is printed at the end: pytest -s shows it."""
    rows: list[str] = []
    yield rows
    print(
        "", "| what was done | s to the checkpoint | s to the next step | steps done twice |", "|---|---|---|---|", sep="\n"
    )
    print(*rows, sep="\n")


def test_two_nodes_train_what_one_process_trains(unbroken, tmp_path):
    experiment = write_tiny(tmp_path, STEPS)
    changes = ["--set", f"data.cache_dir={tmp_path / 'cache'}", "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    succeed("--ds_config", FP32, "--experiment", str(experiment), *changes)
    assert unbroken[:3] == pytest.approx(losses(tmp_path / "run"), rel=2e-6)


def test_a_job_started_again_and_then_cut_off_amid_a_save_trains_the_same(cluster, unbroken, lost, tmp_path):
    job = TrainingJob(cluster, tmp_path)
    job.wait_for_step(EVERY + 5)
    lost.append(job.outlast("scontrol requeue", lambda: cluster.run("scontrol", "requeue", job.id)))
    job.wait_for_step(3 * EVERY)
    job.freeze_amid_a_save()
    lost.append(job.outlast("power cut amid a save", lambda: cut(cluster, "node0")))
    assert cluster.wait(job.id, 240) == Ending("COMPLETED", "0:0", restarts=2), job.output
    assert losses(job.run) == unbroken
    begins = [start["step"] for start in records(job.run, "start")]
    assert begins[0] == 0 and begins[1] >= EVERY + 5, "it was to save before SLURM started it again"
    assert begins[2] >= 2 * EVERY and begins[2] % EVERY == 0
    assert not list(job.run.glob("**/.tmp-*"))


def test_a_refused_setting_fails_the_job_and_says_why_once(cluster, tmp_path):
    job = TrainingJob(cluster, tmp_path, "model.some.top_k=0")
    assert cluster.wait(job.id, 240) == Ending("FAILED", "2:0", restarts=0)
    [error] = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert "top_k = 0" in error
    assert "Traceback" not in job.output


def has_heard(stopped: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that was stopped, or has set it going: SLURM sends SIGCONT, too."""
    status = Path(f"/proc/{stopped}/status").read_text(encoding="utf-8")
    pending = int(re.search(r"ShdPnd:\t(\w+)", status)[1], 16)
    return bool(pending >> (number - 1) & 1) or "State:\tT" not in status


def cut(cluster: Cluster, node: str) -> None:
    """Cut a node's power, and give it back."""
    cluster.crash(node)
    cluster.boot(node)


@pytest.mark.long
def test_a_job_told_to_stop_then_cut_off_then_preempted_trains_the_same(cluster, unbroken, lost, tmp_path):
    """The first notice comes amid an evaluation. Step 80 is long enough for SLURM to find the urgent job."""
    job = TrainingJob(cluster, tmp_path, "data.val_documents=600", "faults.slow=step=80 seconds=5")

    def notify() -> None:
        cluster.run("scancel", "--signal=USR2", job.id)

    def preempt() -> None:
        urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
        assert cluster.wait(urgent, 240).state == "COMPLETED"

    wait_until(lambda: steps_of(job.run, "start"), 200, "the first evaluation")
    lost.append(job.outlast("scancel --signal=USR2 in an evaluation", notify))
    job.wait_for_step(EVERY + 5)
    lost.append(job.outlast("scancel --signal=USR2 in a step", notify))
    job.wait_for_step(3 * EVERY)
    lost.append(job.outlast("power cut in a step", lambda: cut(cluster, "node1")))
    job.wait_for_step(79)
    lost.append(job.outlast("preemption", preempt))
    assert cluster.wait(job.id, 400) == Ending("COMPLETED", "0:0", restarts=4), job.output
    assert losses(job.run) == unbroken
    begins = [start["step"] for start in records(job.run, "start")]
    assert begins[:2] == [0, 0], "the evaluation was not given up"
    assert begins[2] >= EVERY + 5 and begins[4] >= 79, "they were to save before SLURM started them again"
    assert begins[3] % EVERY == 0


@pytest.mark.long
def test_a_job_near_its_time_limit_goes_on_after_it(cluster, unbroken, lost, tmp_path):
    """SLURM counts limits in minutes and looks at them every half. The first rank is held until the notice is there."""
    job = TrainingJob(cluster, tmp_path, sbatch=["--signal=USR2@30"])
    job.wait_for_step(EVERY + 5)
    rank = job.first_rank
    os.kill(rank, signal.SIGSTOP)
    minutes, seconds = map(int, cluster.show(job.id)["RunTime"].split(":")[1:])
    cluster.run("scontrol", "update", f"jobid={job.id}", f"timelimit={minutes + 1 + (seconds + 45) // 60}")
    wait_until(lambda: has_heard(rank, signal.SIGUSR2), 150, "the notice")
    lost.append(job.outlast("notice before the time limit", lambda: os.kill(rank, signal.SIGCONT)))
    cluster.run("scontrol", "update", f"jobid={job.id}", "timelimit=60")
    ending = cluster.wait(job.id, 400)
    assert ending.state == "COMPLETED" and ending.restarts >= 1, job.output
    assert losses(job.run) == unbroken
    assert "ended with exit code 75" in job.output


@pytest.mark.long
def test_the_watchdog_names_a_rank_whose_cable_is_pulled_and_the_job_starts_again(cluster, unbroken, lost, tmp_path):
    """Before SLURM itself misses the node."""
    job = TrainingJob(cluster, tmp_path, "parallel.timeout_minutes=0.15")

    def pull() -> None:
        cluster.unplug("node1")
        named = re.compile(r"no rank has moved for 9 s .*suspect: rank 1 \(host node1, pid \d+\) no longer reports")
        wait_until(lambda: named.search(job.output), 240, "the watchdog's word")
        cluster.plug("node1")

    job.wait_for_step(EVERY + 5)
    lost.append(job.outlast("cable pulled until the watchdog says so", pull))
    ending = cluster.wait(job.id, 400)
    assert ending.state == "COMPLETED" and ending.restarts >= 1, job.output
    assert losses(job.run) == unbroken


@pytest.mark.long
@pytest.mark.parametrize(("node", "fault"), [("node0", "unplug"), ("node1", "unplug"), ("node1", "crash")])
def test_a_job_whose_node_is_lost_until_slurm_misses_it_trains_the_same(cluster, unbroken, lost, tmp_path, node, fault):
    """Ranks on both sides of a pulled cable live on, amid a step; the batch script and the rank that writes are on node0."""
    job = TrainingJob(cluster, tmp_path)

    def lose() -> None:
        getattr(cluster, fault)(node)
        wait_until(lambda: cluster.node_states()[node] == "down*", 150, f"SLURM to miss {node}", every=0.5)
        getattr(cluster, {"unplug": "plug", "crash": "boot"}[fault])(node)

    job.wait_for_step(EVERY + 5)
    lost.append(job.outlast(f"{fault} of {node} until SLURM misses it", lose))
    ending = cluster.wait(job.id, 400)
    assert ending.state == "COMPLETED" and ending.restarts >= 1, job.output
    assert losses(job.run) == unbroken
