"""What the launchers' common body makes of signals, failures and restarts, with a stand-in for the trainer.

A restart takes SLURM six seconds here, so jobs run beside each other.
"""

import re

import pytest

from tests.cluster.cluster import Ending
from tests.cluster.jobs import SERIES, StandInJob, begins_of_both, stand_in_environment
from tests.cluster.processes import wait_until

FOREVER = "steps=100000 every=10"


def test_ranks_that_a_signal_stops_save_and_the_job_goes_on_from_there(cluster, tmp_path):
    """The notice before the time limit, TERM for the ranks, and a notice that reaches the shell instead."""
    cases = {"SIGUSR2": ["--signal=USR2"], "SIGTERM": ["--signal=TERM"], "B": ["--batch", "--signal=USR2"]}
    jobs = {name: StandInJob(cluster, tmp_path / name, FOREVER) for name in cases}
    for name, job in jobs.items():
        job.wait_for_begin()
        cluster.run("scancel", *cases[name], job.id)
    for name, job in jobs.items():
        job.wait_for("rank", times=6)  # each began, saved and began again
        cluster.run("scancel", job.id)
        saved = next(line.split() for line in job.log if line.startswith("rank 0 saves"))
        step = int(saved[4])
        assert saved[-1] == ("SIGUSR2" if name == "B" else name)
        assert f"rank 0 begins at {step} resume auto on node0" in job.log
        assert f"ended with exit code 75 at checkpoint step_{step:08d}; it starts again" in job.output
    # scancel lets the ranks save too, but ends the job for good.
    for job in jobs.values():
        assert cluster.wait(job.id, 240) == Ending("CANCELLED", "75:0", restarts=1)
        assert job.notes == []


def test_a_job_that_slurm_starts_again_saves_first_and_starts_anew_only_once(cluster, tmp_path):
    """Requeued from outside, then preempted, without a time of grace: the ranks have KillWait from SIGTERM on."""
    first, second = (StandInJob(cluster, tmp_path / name, FOREVER, "--resume", "never") for name in ("first", "second"))
    for job in (first, second):
        job.wait_for_begin()
    cluster.run("scontrol", "requeue", first.id)
    first.wait_for_begin(times=2)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    assert cluster.wait(urgent, 240).state == "COMPLETED"
    for job, starts in ((first, 3), (second, 2)):
        job.wait_for_begin(times=starts)
        cluster.run("scancel", job.id)
        steps = ["0", *(line.split()[4] for line in job.log if line.startswith("rank 0 saves"))][:starts]
        begins = [line for line in job.log if line.startswith("rank 0 begins")]
        assert begins == [
            f"rank 0 begins at {step} resume {'auto' if i else 'never'} on node0" for i, step in enumerate(steps)
        ], "a restart must not obey --resume never again"
        assert cluster.wait(job.id, 240).restarts == starts - 1


def test_a_job_ends_when_it_is_done_refused_or_gets_no_further(cluster, tmp_path):
    jobs = {
        "done": StandInJob(cluster, tmp_path / "done", "steps=3"),
        "refused": StandInJob(cluster, tmp_path / "refused", "refuse=1"),
        # Its first attempt gets to checkpoint 5, which no later one passes.
        "stuck": StandInJob(cluster, tmp_path / "stuck", "steps=20 every=5 fail=7", SOME_MAX_RESTARTS="0"),
        "broken": StandInJob(cluster, tmp_path / "broken", "steps=20 fail=2 code=139", SOME_MAX_RESTARTS="0"),
    }
    endings = {name: cluster.wait(job.id, 240) for name, job in jobs.items()}
    assert endings == {
        "done": Ending("COMPLETED", "0:0", restarts=0),
        "refused": Ending("FAILED", "2:0", restarts=0),
        "stuck": Ending("FAILED", "1:0", restarts=1),
        "broken": Ending("FAILED", "1:0", restarts=0),
    }, jobs["stuck"].output
    for name, checkpoint in (("stuck", "step_00000005"), ("broken", "none")):
        said = rf"error: job \d+: 1 attempt\(s\) in a row began at checkpoint {checkpoint} and wrote no newer one; it is not"
        assert len(re.findall(said, jobs[name].output)) == 1
    assert [job.notes for job in jobs.values()] == [[], [], [], []]


def test_a_task_of_an_array_starts_itself_again_and_no_other(cluster, tmp_path):
    """The last task of an array has the array's id, by which SLURM would start all of them again."""
    array = cluster.submit("--array=2,3", SERIES, cwd=tmp_path, environment=stand_in_environment(tmp_path, FOREVER))
    logs = {name: tmp_path / "runs" / name / "log" for name in ("b2", "b3")}

    def begins(name: str) -> int:
        lines = logs[name].read_text(encoding="utf-8").splitlines() if logs[name].exists() else []
        return begins_of_both(lines)

    wait_until(lambda: begins("b2") and begins("b3"), 240, "both tasks")
    cluster.run("scancel", "--signal=USR2", f"{array}_3")
    wait_until(lambda: begins("b3") == 2, 240, "the restart of b3")
    cluster.run("scancel", array)
    assert [cluster.wait(f"{array}_{task}", 240).restarts for task in (2, 3)] == [0, 1]
    assert (tmp_path / f"slurm-some-series-b-{array}_3.out").exists()


def test_a_job_survives_a_power_cut(cluster, tmp_path):
    job = StandInJob(cluster, tmp_path, FOREVER)
    wait_until(lambda: len(job.checkpoints) > 1, 240, "checkpoints")
    cluster.crash("node1")
    cluster.boot("node1")
    job.wait_for_begin(times=2)
    cluster.run("scancel", job.id)
    assert cluster.wait(job.id, 240).restarts == 1
    # The other node's rank has saved when SLURM ended the job.
    [saved] = [line.split()[4] for line in job.log if line.startswith("rank 0 saves")][:1]
    assert f"rank 0 begins at {saved} resume auto on node0" in job.log


@pytest.mark.long
def test_the_notice_comes_before_the_time_limit(cluster, tmp_path):
    """SLURM counts limits in minutes and looks at them every half."""
    job = StandInJob(cluster, tmp_path, FOREVER, sbatch=["--time=2", "--signal=USR2@60"])
    job.wait_for_begin()
    wait_until(lambda: any(line.startswith("rank 0 saves") for line in job.log), 240, "the notice", every=1)
    job.wait_for_begin(times=2)
    cluster.run("scancel", job.id)
    assert cluster.wait(job.id, 240).restarts == 1
    assert next(line for line in job.log if line.startswith("rank 0 saves")).endswith("SIGUSR2")
