"""The SLURM launchers without SLURM: what they tell srun and scontrol. `tests/cluster/` has real jobs on a cluster."""

import os
import pwd
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.jobs import B3, SERIES, SWEEP, job_environment, write_program
from tests.launch import REPOSITORY, SCRIPT
from tools import grid
from trainer.config import load_experiment
from trainer.paths import local_path

SLURM = REPOSITORY / "slurm"
LAUNCHERS = {"a4_64experts.sh": 1, "b1_128experts.sh": 1, "b2_256experts.sh": 2, "b3_512experts.sh": 2}
"""Each launcher and its nodes."""
ZERO2 = str(REPOSITORY / "ds_configs" / "zero2.json")
GRID = ["a4", "--grid", "train.learning_rate=3e-4,6e-4", "--grid", "seed=0,1,2"]


COMMON = ["#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=USR2@180"]


@pytest.mark.parametrize(("name", "nodes"), LAUNCHERS.items())
def test_a_launcher_is_sound_and_names_its_experiment(name, nodes):
    path = SLURM / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    header, commands = split_header(path)
    assert f"#SBATCH --nodes={nodes}" in header
    assert set(COMMON) <= set(header)
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
    for script in (SERIES, SWEEP):
        assert os.access(script, os.X_OK) and set(COMMON) <= set(split_header(Path(script))[0])
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
        keep = "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS RANK SLURM_GPUS_PER_TASK VIRTUAL_ENV SOME_CACHE_DIR"
        write_program(
            self.folder / "bin" / "srun",
            f'#!/bin/bash\nprintf "%s\\n" "$@" >"{self.folder}/arguments"\n'
            f'for name in {keep}; do echo "$name=${{!name-}}"; done >"{self.folder}/variables"\n'
            '[[ -z ${SRUN_VERDICT-} ]] || echo -n "$SRUN_VERDICT" >"$SOME_VERDICT_FILE"\n'
            '[[ -z ${SRUN_SAVES-} ]] || mkdir -p "$SRUN_SAVES"\nexit "${SRUN_CODE:-0}"\n',
        )
        write_program(
            self.folder / "bin" / "scontrol",
            '#!/bin/bash\nif [ "$1" = requeue ]; then echo "$2" >>"'
            f'{self.folder}/requeued"; exit "${{REQUEUE_CODE:-0}}"; fi\n'
            '[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n',
        )

    def launch(self, *arguments: str, launcher: str = B3, **variables: str) -> subprocess.CompletedProcess:
        """Run a launcher as the batch shell of job 123456 on two nodes would."""
        job = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NAME": "some-b3",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_JOB_CPUS_PER_NODE": "16(x2)",
            "SLURM_SUBMIT_DIR": str(self.home),
        }
        settings = job_environment(**job) | variables
        return subprocess.run(["bash", launcher, *arguments], env=settings, cwd=self.folder, capture_output=True, text=True)

    @property
    def requeued(self) -> list[str]:
        """The jobs that SLURM was asked to start again."""
        path = self.folder / "requeued"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def notes(self) -> list[str]:
        """What jobs left in their working folder."""
        return [path.name for path in self.folder.glob(".slurm-*")]

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
        "--set", "data.path=a folder/*", "--max_steps", "3", "--output_dir", "runs/b3",
    ]  # fmt: skip
    assert fake.variables == {
        "MASTER_ADDR": "n3", "MASTER_PORT": "23456", "OMP_NUM_THREADS": "2", "RANK": "", "SLURM_GPUS_PER_TASK": "",
        "VIRTUAL_ENV": os.environ.get("VIRTUAL_ENV", ""), "SOME_CACHE_DIR": f"{fake.folder}/.cache/some",
    }  # fmt: skip
    assert fake.notes == fake.requeued == []
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
        ({"SOME_MAX_RESTARTS": "abc"}, "SOME_MAX_RESTARTS=abc is no number; give one from 0"),
        ({"SOME_MAX_RESTARTS": "-1"}, "SOME_MAX_RESTARTS=-1 is no number"),
        ({"SLURM_JOB_ID": ""}, "not inside a SLURM job; submit the script with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "/nowhere/slurm/body.sh not found; call sbatch in the repository's folder"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(fake, variables, named):
    result = fake.launch(**variables)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and named in result.stderr and result.stderr.count("\n") == 1
    assert not (fake.folder / "arguments").exists() and fake.notes == []


def test_a_job_starts_itself_again_until_restarts_bring_no_new_checkpoint(fake):
    saves = {name: str(fake.folder / "runs" / "b3" / "checkpoints" / name) for name in ("step_00000005", "step_00000010")}
    attempts = [
        {"SRUN_CODE": "75", "SRUN_SAVES": saves["step_00000005"]},  # stopped by a signal
        {"SRUN_CODE": "143"},
        {"SRUN_CODE": "1", "SRUN_SAVES": saves["step_00000010"]},
        {"SRUN_CODE": "1"},
        {"SRUN_CODE": "1", "SRUN_SAVES": saves["step_00000010"]},  # written again
        {"SRUN_CODE": "1"},
    ]
    for number, attempt in enumerate(attempts):
        restarts = {"SLURM_RESTART_COUNT": str(number)} if number else {}
        result = fake.launch("--resume", "never", **restarts, **attempt, SOME_MAX_RESTARTS="2")
        is_last = number == len(attempts) - 1
        assert result.returncode == (1 if is_last else int(attempt["SRUN_CODE"])), result.stderr
        assert fake.requeued == ["123456"] * (number + (not is_last))
        expected = ["--resume", "never", "--output_dir", "runs/b3", *(["--resume", "auto"] if number else [])]
        assert fake.arguments[-len(expected) :] == expected
        assert fake.notes == ([] if is_last else [".slurm-some-b3-123456.attempts"])
    assert "error: job 123456: 3 attempt(s) in a row began at checkpoint step_00000010" in result.stderr
    # A new job of that number knows nothing of them.
    assert fake.launch("--resume", "never", SRUN_CODE="1").returncode == 1
    assert len(fake.requeued) == 6 and fake.arguments[-4:-2] == ["--resume", "never"]


def test_attempts_that_end_without_a_word_count_too(fake):
    (fake.folder / ".slurm-some-b3-123456.attempts").write_text("none none 9\n", encoding="utf-8")
    result = fake.launch(SLURM_RESTART_COUNT="9", SOME_MAX_RESTARTS="08")
    assert result.returncode == 1 and "10 attempt(s) in a row began at checkpoint none" in result.stderr
    assert not (fake.folder / "arguments").exists() and fake.notes == []


@pytest.mark.parametrize(
    ("srun", "code", "requeued"),
    [
        ({"SRUN_CODE": "0"}, 0, []),
        ({"SRUN_CODE": "2"}, 2, []),
        # Ranks that are ended with the one that knows better have the higher code.
        ({"SRUN_CODE": "143", "SRUN_VERDICT": "2"}, 2, []),
        ({"SRUN_CODE": "143", "SRUN_VERDICT": "3"}, 3, []),
        ({"SRUN_CODE": "3"}, 3, []),
        ({"SRUN_CODE": "7", "REQUEUE_CODE": "1"}, 7, ["123456"]),
        ({"SRUN_CODE": "75", "SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}, 75, ["123456_3"]),
    ],
)
def test_exit_codes_say_whether_the_job_starts_again(fake, srun, code, requeued):
    assert fake.launch(**srun).returncode == code
    assert fake.requeued == requeued
    assert bool(fake.notes) == (code == 75)


@pytest.mark.parametrize(
    ("arguments", "experiment", "run"),
    [
        (("--output_dir", "a b", "--max_steps", "1"), "b3", "a b"),
        (("--output_dir=x", "--output_dir=y"), "b3", "y"),
        ((), "configs/my.tiny.yaml", "runs/my.tiny"),
    ],
)
def test_the_body_looks_for_checkpoints_where_the_trainer_writes_them(fake, arguments, experiment, run):
    saved = {"SRUN_SAVES": str(fake.folder / run / "checkpoints" / "step_00000005"), "SRUN_CODE": "1"}
    result = fake.launch(*arguments, SOME_EXPERIMENT=experiment, **saved)
    assert fake.arguments[-2:] == ["--output_dir", run]
    assert "ended with exit code 1 at checkpoint step_00000005; it starts again" in result.stdout


@pytest.mark.parametrize("text", ["~/x", f"~{pwd.getpwuid(os.getuid()).pw_name}/x", "~nobody_at_all/x"])
def test_a_tilde_means_the_same_folder_to_the_body_and_the_trainer(fake, text):
    """That of an unknown user is left for the trainer to refuse."""
    fake.launch(f"--output_dir={text}", HOME="/home/of/mine")
    expected = local_path(text, "--output_dir") if "nobody" not in text else text
    assert fake.arguments[-2:] == ["--output_dir", "/home/of/mine/x" if text == "~/x" else expected]


def test_each_task_of_the_series_is_one_experiment(fake):
    for task, experiment in enumerate(("a4", "b1", "b2", "b3")):
        assert fake.launch("--max_steps", "1", launcher=SERIES, SLURM_ARRAY_TASK_ID=str(task)).returncode == 0
        expected = ["--experiment", experiment, "--max_steps", "1", "--output_dir", f"runs/{experiment}"]
        assert fake.arguments[-6:] == expected
    for arguments, variables, named in [
        ((), {"SLURM_ARRAY_TASK_ID": "4"}, "task 4 of the series does not exist; give --array=0-3"),
        ((), {}, "task (no array) of the series does not exist"),
        (("--output_dir=x",), {"SLURM_ARRAY_TASK_ID": "0"}, "--output_dir=x would be one for all runs"),
        ((), {"SLURM_ARRAY_TASK_ID": "0", "SOME_EXPERIMENT": "x"}, "SOME_EXPERIMENT would be one for all runs"),
    ]:
        result = fake.launch(*arguments, launcher=SERIES, **variables)
        assert result.returncode == 2 and result.stderr.startswith(f"error: {named}"), result.stderr


def test_each_task_of_a_sweep_is_one_run_of_the_grid(fake):
    python = write_program(fake.folder / "python", f'#!/bin/bash\nPYTHONPATH= exec "{sys.executable}" "$@"\n')
    array = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MAX": "5", "SLURM_ARRAY_TASK_COUNT": "6"}
    sweep = [*GRID, "--set", "data.path=a b", "--max_steps", "3"]
    assert fake.launch(*sweep, launcher=SWEEP, SOME_PYTHON=str(python), **array).returncode == 0
    assert fake.arguments[fake.arguments.index("--experiment") + 1 :] == [
        "a4", "--set", "data.path=a b", "--set", "train.learning_rate=6e-4", "--set", "seed=1", "--max_steps", "3",
        "--output_dir", "runs/sweep/a4/train.learning_rate=6e-4,seed=1",
        "--output_dir", "runs/sweep/a4/train.learning_rate=6e-4,seed=1",
    ]  # fmt: skip


def test_a_grid_is_listed_with_the_command_that_submits_it(capsys):
    grid.main([*GRID, "--set", "data.path=a b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "runs/sweep/a4/train.learning_rate=3e-4,seed=1"]
    assert len(lines) == 7 and lines[6] == (
        "6 runs: sbatch --array=0-5 slurm/sweep.sh a4 --grid train.learning_rate=3e-4,6e-4 --grid seed=0,1,2 "
        "--set 'data.path=a b'"
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a4", "--grid", "seed"], "--grid seed: write it as key=value,value"),
        (["a4", "--grid", "seed=0,,1"], "--grid seed=0,,1: write it as key=value,value"),
        (["a4", "--grid", "seed=1,01"], "seed=1 and seed=01 are one run; leave one out"),
        (
            ["a4", "--grid", "train.learning_rate=1e-3,3e-4,0.001", "--grid", "seed=0"],
            "train.learning_rate=1e-3,seed=0 and train.learning_rate=0.001,seed=0 are one run",
        ),
        (["a4", "--grid", 'data.text_field=a,"a"'], "are one run; leave one out"),
        (["a4", "--grid", f"sample.prompt={'ü' * 200},b"], "is too long to name a folder; put what all runs share"),
        (["a4", "--grid", "seed=0,0"], "two runs would go to runs/sweep/a4/seed=0"),
        (["a4", "--grid", "seed=0", "--set", "seed=1"], "seed is given twice"),
        (["a4", "--grid", "sede=0,1"], "sede: unknown key; did you mean seed?"),
        (["a5", "--grid", "seed=0,1"], "--experiment a5: unknown"),
        (["a\x1b5", "--grid", "seed=0,1"], "--experiment a\\x1b5: unknown"),
        (["a4", "--grid", "seed=0,1", "--task"], "not a task of a job array; submit with sbatch --array=0-1"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_in_one_line(capsys, monkeypatch, arguments, named):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(SystemExit) as ended:
        grid.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("runs", "is_part", "extra", "error"),
    [
        (6, True, {}, None),
        (
            6,
            False,
            {},
            "--array has 2 tasks up to 3 and the grid 6 runs; submit with --array=0-5, or a part of it and --part",
        ),
        (3, True, {}, "--array has 2 tasks up to 3 and the grid 3 runs; submit with --array=0-2"),
        (6, True, {"SOME_EXPERIMENT": "x"}, "SOME_EXPERIMENT = x would replace the grid's experiment; unset it"),
    ],
)
def test_an_array_must_fit_the_grid(runs, is_part, extra, error):
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "2"} | extra
    if error is None:
        assert grid.array_task(array, runs, is_part) == 2
    else:
        with pytest.raises(ValueError) as refused:
            grid.array_task(array, runs, is_part)
        assert str(refused.value).endswith(error)


def test_variables_replace_experiment_configuration_threads_and_home(fake):
    result = fake.launch(
        SOME_HOME=str(REPOSITORY), SLURM_SUBMIT_DIR="/nowhere", SOME_EXPERIMENT="my.yaml", SOME_DS_CONFIG="my.json",
        OMP_NUM_THREADS="5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = [SCRIPT, "--ds_config", "my.json", "--experiment", "my.yaml", "--output_dir", "runs/my"]
    assert fake.arguments[-7:] == expected
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
