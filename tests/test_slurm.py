"""The SLURM launchers: what they tell srun, and real jobs on a cluster of two emulated nodes.

The cluster comes from `slurm-sandbox.sh` in the folder SOME_SHARED_DIR (`shared/` beside the repository), which needs root.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.distributed import free_port
from tests.launch import FP32, REPOSITORY, SCRIPT, environment, losses, records, succeed
from trainer.config import load_experiment

SLURM = REPOSITORY / "slurm"
LAUNCHERS = {"a4_64experts.sh": 1, "b1_128experts.sh": 1, "b2_256experts.sh": 2, "b3_512experts.sh": 2}
"""Each launcher and its nodes."""
B3 = str(SLURM / "b3_512experts.sh")
ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")
TINY = {
    "name": "tiny",
    "model": {
        "vocab_size": 512, "d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64,
        "some": {"num_experts": 8, "d_ffn": 64, "top_k": 2},
    },
    "data": {"name": "stories", "train_documents": 200, "val_documents": 20},
    "train": {"batch_size": 8, "steps": 4, "warmup_steps": 1},
    "log": {"tensorboard": False},
    "sample": {"tokens": 0},
}  # fmt: skip


def job_environment(**extra: str) -> dict[str, str]:
    """Ours, with nothing in it that steers a launcher but `extra`."""
    clean = {k: v for k, v in environment().items() if not k.startswith("SOME_") and k != "OMP_NUM_THREADS"}
    return clean | extra


def write_program(path: Path, text: str) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


# Without SLURM


@pytest.mark.parametrize(("name", "nodes"), LAUNCHERS.items())
def test_a_launcher_is_sound_and_names_its_experiment(name, nodes):
    path = SLURM / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    header, commands = split_header(path)
    assert f"#SBATCH --nodes={nodes}" in header
    assert not [line for line in commands if line.startswith("#SBATCH")], "sbatch ignores these"
    experiment = re.fullmatch(r'source "\$body" (\w+) "\$@"', commands[-1])[1]
    assert f"#SBATCH --job-name=some-{experiment}" in header
    assert load_experiment(experiment).model.some.num_experts == int(re.search(r"_(\d+)experts", name)[1])


def split_header(path: Path) -> tuple[list[str], list[str]]:
    """A script's lines before its first command, and from there on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    return lines[:first], lines[first:]


def test_launchers_differ_in_their_experiment_alone_and_start_no_second_launcher():
    bodies = [split_header(SLURM / name)[1] for name in LAUNCHERS]
    assert len({tuple(body[:-1]) for body in bodies}) == 1
    for path in SLURM.glob("*.sh"):
        commands = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
        assert not re.search(r"\b(deepspeed|torchrun|mpirun|accelerate)\b", "\n".join(commands))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", "-x", *sorted(SLURM.glob("*.sh"))], check=True, cwd=REPOSITORY)


@dataclass
class FakeSlurm:
    """`srun` and `scontrol` that write down what they were asked, for a launcher that runs without a cluster."""

    folder: Path
    home: Path = REPOSITORY

    def __post_init__(self) -> None:
        keep = "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS RANK SLURM_GPUS_PER_TASK VIRTUAL_ENV"
        write_program(
            self.folder / "bin" / "srun",
            f'#!/bin/bash\nprintf "%s\\n" "$@" >"{self.folder}/arguments"\n'
            f'for name in {keep}; do echo "$name=${{!name-}}"; done >"{self.folder}/variables"\nexit "${{SRUN_CODE:-0}}"\n',
        )
        write_program(
            self.folder / "bin" / "scontrol",
            '#!/bin/bash\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n',
        )

    def launch(self, *arguments: str, launcher: str = B3, **variables: str) -> subprocess.CompletedProcess:
        """Run a launcher as the batch shell of job 123456 on two nodes would."""
        job = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
            "SLURM_SUBMIT_DIR": str(self.home),
        }
        settings = job_environment(**job) | variables
        return subprocess.run(["bash", launcher, *arguments], env=settings, cwd=self.folder, capture_output=True, text=True)

    @property
    def arguments(self) -> list[str]:
        """What srun was given."""
        return (self.folder / "arguments").read_text(encoding="utf-8").splitlines()

    @property
    def variables(self) -> dict[str, str]:
        """What srun's tasks would inherit; empty text where unset."""
        return dict(line.split("=", 1) for line in (self.folder / "variables").read_text(encoding="utf-8").splitlines())


@pytest.fixture
def fake(tmp_path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def test_srun_gets_one_task_a_gpu_and_the_users_arguments_word_for_word(fake):
    result = fake.launch(
        "--set", "data.path=a folder/*", "--max_steps", "3",
        SOME_PYTHON="/opt/my python", SLURM_GPUS_PER_NODE="h100:8", SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_TASK="1",
        RANK="5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert fake.arguments == [
        "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=2", "--gpus-per-node=8",
        "--export=ALL", "--kill-on-bad-exit=1", "/opt/my python", SCRIPT, "--ds_config", ZERO2, "--experiment", "b3",
        "--set", "data.path=a folder/*", "--max_steps", "3",
    ]  # fmt: skip
    assert fake.variables == {
        "MASTER_ADDR": "n3", "MASTER_PORT": "23456", "OMP_NUM_THREADS": "2", "RANK": "", "SLURM_GPUS_PER_TASK": "",
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", ""),
    }  # fmt: skip
    assert "job 123456: b3, 2 node(s) with 8 task(s) of 2 CPU(s), rendezvous at n3:23456" in result.stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16"]),
        ({"SLURM_JOB_CPUS_PER_NODE": "16,4"}, ["--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4"]),
        ({"SLURM_GPUS_ON_NODE": "4"}, ["--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=4", "--gpus-per-node=4"]),
        (
            {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "3"},
            ["--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3"],
        ),
    ],
)
def test_tasks_and_their_cpus_follow_from_what_the_job_was_given(fake, variables, expected):
    result = fake.launch(**variables)
    assert result.returncode == 0, result.stderr
    assert fake.arguments[: fake.arguments.index("--export=ALL")] == expected
    assert fake.variables["OMP_NUM_THREADS"] == expected[2].removeprefix("--cpus-per-task=")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "9,7"}, "8 task(s) a node do not fit the job's 7 CPU(s)"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "4"}, "8 task(s) a node do not fit the job's 16 CPU(s)"),
        ({"SLURM_NTASKS": "6"}, "--ntasks=6 is not 1 task(s) on each of 2 node(s); give --ntasks-per-node instead"),
        ({"SLURM_JOB_ID": ""}, "not inside a SLURM job; submit the script with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere/slurm/body.sh not found; call sbatch in the repository's folder"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(fake, variables, named):
    result = fake.launch(**variables)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and named in result.stderr and result.stderr.count("\n") == 1
    assert not (fake.folder / "arguments").exists()


def test_the_exit_code_of_srun_is_the_jobs(fake):
    assert fake.launch(SRUN_CODE="7").returncode == 7


def test_variables_replace_experiment_configuration_threads_and_home(fake):
    result = fake.launch(
        SOME_HOME=str(REPOSITORY), SLURM_SUBMIT_DIR="/nowhere", SOME_EXPERIMENT="my.yaml", SOME_DS_CONFIG="my.json",
        OMP_NUM_THREADS="5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert fake.arguments[-5:] == [SCRIPT, "--ds_config", "my.json", "--experiment", "my.yaml"]
    assert fake.variables["OMP_NUM_THREADS"] == "5"


def test_the_repositorys_environment_is_used_unless_a_python_is_given(tmp_path):
    home = tmp_path / "repository"
    shutil.copytree(SLURM, home / "slurm")
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "activate").write_text("export VIRTUAL_ENV=ours\n", encoding="utf-8")
    fake = FakeSlurm(tmp_path, home)
    assert fake.launch(launcher=str(home / "slurm" / "a4_64experts.sh")).returncode == 0
    assert fake.variables["VIRTUAL_ENV"] == "ours"
    assert "python3" in fake.arguments
    assert fake.launch(SOME_PYTHON=sys.executable).returncode == 0
    assert fake.variables["VIRTUAL_ENV"] != "ours"
    assert sys.executable in fake.arguments


# On a cluster


@dataclass
class Cluster:
    """Two emulated nodes with 4 CPUs and 2 fake GPUs each."""

    sandbox: Path
    variables: dict[str, str]

    def __call__(self, *command: str, cwd: Path = REPOSITORY, **variables: str) -> str:
        """The output of a command that must succeed, `run sbatch ...` for example."""
        result = subprocess.run(
            [self.sandbox, *command],
            env=job_environment(**self.variables) | variables,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        return result.stdout

    def submit(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """The id of a new job."""
        return self("run", "sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def wait(self, job: str, seconds: int = 240) -> str:
        """How a job ended, as `JobState=... ExitCode=...`."""
        command = [self.sandbox, "wait", job, str(seconds)]
        said = subprocess.run(command, env=job_environment(**self.variables), capture_output=True, text=True).stdout
        fields = dict(field.split("=", 1) for field in said.split() if "=" in field)
        return f"JobState={fields.get('JobState')} ExitCode={fields.get('ExitCode')}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    shared = Path(os.environ.get("SOME_SHARED_DIR") or REPOSITORY.parent / "shared")
    sandbox = shared / "slurm-sandbox.sh"
    if not sandbox.exists():
        pytest.skip(f"no {sandbox}: set SOME_SHARED_DIR to the folder with slurm-sandbox.sh")
    if os.geteuid() != 0:
        pytest.skip("slurm-sandbox.sh needs root")
    # Not a folder of pytest: munged wants parents that others may enter, and sockets want short paths.
    folder, pid = tempfile.mkdtemp(prefix="some-slurm-"), os.getpid()
    variables = {
        "SLURMBOX_DIR": folder,
        "SLURMBOX_NAME": f"t{pid % 1_000_000}",
        "SLURMBOX_SUBNET": f"10.{200 + pid % 50}.{pid // 50 % 250}",
        "SLURMBOX_PORT": str(free_port()),
        "SLURMBOX_CPUS": "4",
        "SLURMBOX_GPUS": "2",
    }
    cluster = Cluster(sandbox, variables)
    try:
        cluster("up", "2")
        yield cluster
    finally:
        cluster("down")
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "nodes"), LAUNCHERS.items())
def test_sbatch_accepts_a_launcher(cluster, name, nodes):
    answer = cluster("run", "sbatch", "--test-only", f"slurm/{name}")
    assert re.search(rf"to start at .* on nodes node{re.escape('[0-1]' if nodes == 2 else '0')} ", answer), answer


@pytest.mark.parametrize(
    ("options", "ranks", "gpus", "threads"),
    [
        ((), 2, "none", 1),
        (("--gpus-per-node=2", "--cpus-per-gpu=1"), 4, "0,1", 1),
        (("--exclusive",), 4, "0,1", 2),
        (("--exclusive", "--gpus-per-node=1"), 2, "0", 4),
        (("--ntasks=4", "--gpus-per-task=1"), 4, "0,1", 1),
        (("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2"), 4, "0,1", 2),
    ],
)
def test_every_task_sees_all_gpus_of_the_job_on_its_node(cluster, tmp_path, options, ranks, gpus, threads):
    show = "echo task $SLURM_PROCID/$SLURM_NTASKS local $SLURM_LOCALID on $(hostname) sees ${CUDA_VISIBLE_DEVICES:-none}"
    python = write_program(tmp_path / "python", f"#!/bin/bash\n{show} with $OMP_NUM_THREADS threads\n")
    output = tmp_path / "out.txt"
    job = cluster.submit(*options, f"--output={output}", B3, cwd=REPOSITORY, SOME_PYTHON=str(python))
    assert cluster.wait(job) == "JobState=COMPLETED ExitCode=0:0", output.read_text(encoding="utf-8")
    per_node = ranks // 2
    assert sorted(line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("task")) == [
        f"task {r}/{ranks} local {r % per_node} on node{r // per_node} sees {gpus} with {threads} threads"
        for r in range(ranks)
    ]


def test_two_nodes_train_what_one_process_trains(cluster, tmp_path):
    for name in ("job", "plain"):
        settings = TINY | {"data": TINY["data"] | {"cache_dir": str(tmp_path / name / "cache")}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    job = cluster.submit(
        "-N2", B3, "--set", "parallel.ep_size=2", cwd=tmp_path / "job",
        SOME_HOME=str(REPOSITORY), SOME_PYTHON=sys.executable, SOME_EXPERIMENT="tiny.yaml", SOME_DS_CONFIG=FP32,
        OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    plain = tmp_path / "plain" / "run"
    succeed("--ds_config", FP32, "--experiment", str(tmp_path / "plain" / "tiny.yaml"), "--output_dir", str(plain))

    ending = cluster.wait(job)
    output = (tmp_path / "job" / f"slurm-some-b3-{job}.out").read_text(encoding="utf-8")
    assert ending == "JobState=COMPLETED ExitCode=0:0", output
    run = tmp_path / "job" / "runs" / "tiny"
    [start] = records(run, "start")
    assert (start["world_size"], start["ep_size"]) == (2, 2)
    assert len(losses(run)) == TINY["train"]["steps"]
    assert losses(run)[:3] == pytest.approx(losses(plain)[:3], rel=2e-6)


def test_a_refused_setting_fails_the_job_and_says_why_once(cluster, tmp_path):
    job = cluster.submit(
        B3, "--set", "model.some.top_k=0", cwd=tmp_path, SOME_HOME=str(REPOSITORY), SOME_PYTHON=sys.executable
    )
    assert cluster.wait(job).startswith("JobState=FAILED ")
    output = (tmp_path / f"slurm-some-b3-{job}.out").read_text(encoding="utf-8")
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "top_k = 0" in error
    assert "Traceback" not in output
