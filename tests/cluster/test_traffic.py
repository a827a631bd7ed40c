"""What a job sends over slow links and how long its steps take, beside what the plan says."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import Cluster, Ending, why_not
from tests.cluster.jobs import B3, trainer_environment
from tests.launch import FP32, REPOSITORY, losses, records
from trainer.config import load_experiment
from trainer.ds_config import load_ds_config
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.plan import Deployment, Sharding, traffic

NODES, RATE = 4, "200mbit"
SETTINGS = ["parallel.ep_size=4", "data.train_documents=1500", "data.val_documents=16", "train.eval_every=1000",
            "checkpoint.every=1000", "sample.tokens=0", "log.tensorboard=false", "train.batch_size=16"]  # fmt: skip
STEPS = (2, 12)
RATES = {"100mbit": 0.0125, "200mbit": 0.025, "1gbit": 0.125}
"""Of the links, and in 1e9 bytes/s."""


@pytest.mark.long
def test_four_nodes_send_over_slow_links_what_the_plan_says(tmp_path):
    """Ten steps of quickstart in fp32, the difference of two jobs, so that starting and ending do not count."""
    with _cluster(NODES) as cluster:
        cluster.network.shape(RATE)
        jobs = [_sent_by_a_job(cluster, tmp_path / str(steps), steps) for steps in STEPS]
    (sent_early, tokens_early), (sent_late, tokens_late) = jobs
    measured = [(late - early) / (STEPS[1] - STEPS[0]) for early, late in zip(sent_early, sent_late, strict=True)]
    tokens = (tokens_late - tokens_early) / (STEPS[1] - STEPS[0])

    experiment, launch = load_experiment("quickstart", SETTINGS), Launch(0, NODES, 0, 1)
    layout = Layout.of(experiment, launch)
    sharding = Sharding.of(load_ds_config(FP32, experiment, layout, NODES))
    deployment = Deployment(layout=layout, ranks=NODES, ranks_per_node=1, sharding=sharding, device="cpu", replicas=0)
    plan = traffic(experiment, deployment)
    # The plan is for full rows; only tokens that there are travel.
    fullness = tokens / (experiment.train.batch_size * experiment.model.max_seq_len)
    planned = fullness * plan.tokens.total + plan.gradients.total + plan.keys.total
    nodes = ", ".join(f"{node / 1e6:.2f}" for node in measured)
    print(
        f"\nsent a step and node over {RATE}: planned {plan.total / 1e6:.2f} MB for full rows, "
        f"{planned / 1e6:.2f} MB for rows {fullness:.3f} full; on the wire with all headers {nodes} MB, "
        f"mean {sum(measured) / NODES / planned:.3f} of the plan"
    )
    # Headers and acknowledgements of TCP take some percent, and tokens do not spread evenly over the ranks.
    assert 0.95 * planned < sum(measured) / NODES < 1.15 * planned


@pytest.mark.long
def test_a_step_over_slow_links_is_timed_beside_the_plan(tmp_path):
    """Two nodes that share the pool, each with a core: `-s` shows predicted and measured, which depend on the machine."""
    with _cluster(2) as cluster:
        for rate, gigabytes in RATES.items():
            cluster.network.shape(rate)
            found = tmp_path / f"{rate}.yaml"
            plan = [sys.executable, str(REPOSITORY / "tools" / "plan.py"), "quickstart", "--set", "parallel.ep_size=2"]
            job = ["srun", "--nodes=2", "--ntasks-per-node=1", *plan, "--ds_config", FP32, "--machine", "xeon2"]
            said = cluster.run(*job, "--calibrate", str(found), cwd=tmp_path, environment=trainer_environment(), timeout=300)
            print(f"\n{rate}\n{said}")
            assert "step: predicted" in said
            link = yaml.safe_load(found.read_text(encoding="utf-8"))["between_nodes_gb_s"]
            # The bucket of the shaper lets a first part through at once.
            assert 0 < link < 1.1 * gigabytes


@contextmanager
def _cluster(nodes: int) -> Iterator[Cluster]:
    """One of its own, since links of it are slow."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="some-traffic-"))
    cluster = Cluster.up(folder, nodes=nodes, cpus=2)
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


def _sent_by_a_job(cluster: Cluster, folder: Path, steps: int) -> tuple[list[int], int]:
    """Bytes that each node sent while a job of so many steps ran, and the tokens that it trained on."""
    folder.mkdir()
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    before = [cluster.network.traffic(node).sent for node in range(NODES)]
    environment = trainer_environment(SOME_EXPERIMENT="quickstart")
    sbatch = [f"--nodes={NODES}", B3, *words, "--max_steps", str(steps)]
    job = cluster.submit(*sbatch, cwd=folder, environment=environment)
    ending = cluster.wait(job, 400)
    output = (folder / f"slurm-some-b3-{job}.out").read_text(encoding="utf-8")
    assert ending == Ending("COMPLETED", "0:0", restarts=0), output
    run = folder / "runs" / "quickstart"
    [start] = records(run, "start")
    assert (start["world_size"], start["ep_size"]) == (NODES, NODES) and len(losses(run)) == steps
    sent = [cluster.network.traffic(node).sent - sent for node, sent in enumerate(before)]
    return sent, records(run, "train")[-1]["tokens"]
