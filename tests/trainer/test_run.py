"""The command line: refusals before the ranks meet, what a run leaves behind, and every launcher."""

import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster.jobs import last_step
from tests.cluster.processes import wait_until
from tests.distributed import free_port
from tests.launch import FP32, REPOSITORY, SCRIPT, environment, launch, losses, records, succeed
from trainer import run, training
from trainer.checkpoint import read_state
from trainer.config import experiment_names, load_experiment
from trainer.exit_codes import FAILED, NOT_FINITE, REFUSED, REQUEUE
from trainer.lock import FolderLock

SMALL = [
    "--ds_config", FP32, "--set", "data.train_documents=200", "--set", "data.val_documents=10",
    "--set", "train.batch_size=8", "--set", "sample.tokens=5", "--set", "log.tensorboard=false",
]  # fmt: skip


def call(monkeypatch, *arguments: str) -> None:
    """The command line in this process, where no world may form."""
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.setattr(training, "init_process_group", lambda *a, **k: pytest.fail("a process group formed"))
    try:
        run.main()
        return
    except SystemExit as ended:
        code = ended.code
    # What a process that ends lets go of, such as a lock, must not live on with the exception, nor in its circles.
    gc.collect()
    raise SystemExit(code)


def files(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "quikstart"], "did you mean quickstart?"),
        (["--set", "train.lerning_rate=1"], "train.lerning_rate: unknown key; did you mean learning_rate?"),
        (["--set", "train.batch_size=many"], "train.batch_size = 'many'"),
        (["--set", "parallel.ep_size=2"], "parallel.ep_size = 2 does not divide the 1 ranks; sizes that do: 1"),
        (["--set", "model.some.top_k=17"], "model.some.top_k = 17 is more than model.some.num_experts = 16"),
        (["--set", "data.name=text", "--set", "data.path={tmp}/none"], "none"),
        (["--set", "data.name=text", "--set", "data.path={tmp}/empty"], "empty"),
        (["--set", "data.name=text", "--set", "data.path={tmp}/empty_file/a.txt"], "a.txt"),
        (["--set", "data.train_documents=5", "--set", "data.allow_fewer=true"], "train.batch_size"),
        (["--set", "model.vocab_size=10"], "model.vocab_size"),
        (["--ds_config", "{tmp}/bad/ds.json"], "is not JSON"),
        (["--ds_config", "{tmp}/none.json"], "none.json: cannot be read"),
        (["--ds_config", "{tmp}/other/ds.json"], "train_batch_size = 7 contradicts 32 from train.batch_size on 1 ranks"),
        (["--ds_config", "{tmp}/typo/ds.json"], "zero_optimization.overlap_com"),
        (["--output_dir", "{tmp}/bad/ds.json/run"], "cannot be used"),
        (["--resume", "{tmp}/empty"], "holds no checkpoint"),
        (["--resume", "{tmp}/foreign"], "not a checkpoint of this trainer"),
        (["--max_steps", "0"], "--max_steps 0: must be at least 1"),
    ],
)
def test_refused_before_the_ranks_meet(monkeypatch, capsys, tmp_path, cache_dir, arguments, message):
    files(tmp_path / "empty")
    files(tmp_path / "empty_file", a_txt="")
    files(tmp_path / "bad", ds_json="{")
    files(tmp_path / "other", ds_json=json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": 7}))
    files(tmp_path / "foreign", state_json="{}")
    files(tmp_path / "typo", ds_json=json.dumps({"zero_optimization": {"stage": 2, "overlap_com": True}}))
    output_dir = tmp_path / "run"
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "--output_dir", str(output_dir), "--set", f"data.cache_dir={cache_dir}", *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not output_dir.exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("name", ["quickstart", "a4", "b3", "v4-b3", "cmp-dense-tinystories"])
def test_dry_run_prints_the_plan(monkeypatch, capsys, name):
    monkeypatch.setattr(
        "modeling.some.experts.FrozenExpertPool.__init__", lambda *a, **k: pytest.fail("a pool was allocated")
    )
    call(monkeypatch, "--experiment", name, "--dry_run")
    printed = capsys.readouterr().out
    counts = load_experiment(name).model.num_parameters()
    assert f"{counts.total:,} total, {counts.trainable:,} trained" in printed
    assert "memory a rank" in printed and "sent a step" in printed


def test_list_names_every_experiment(monkeypatch, capsys):
    call(monkeypatch, "--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == experiment_names()
    line = {name: " ".join(text.split()) for name, text in zip(experiment_names(), lines, strict=True)}
    assert "5,405,998,080 parameters 29,424,640 trained 10 layers, 512 experts, top 4 tinystories" in line["b3"]
    assert line["v4-a4"].endswith("published: val 0.7126 (ppl 2.04) after 4 epochs")
    assert line["v3-3-v3"].endswith("no published result") and "published" not in line["quickstart"]
    assert "8 layers, dense tinystories" in line["cmp-dense-tinystories"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir) -> tuple[Path, list[str], str]:
    """A finished run of four steps on one plain process, how it was started, and what it printed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [*SMALL, "--output_dir", str(output_dir), "--set", f"data.cache_dir={cache_dir}", "--set", "train.steps=4",
                 "--set", "train.eval_every=2", "--set", "checkpoint.every=2"]  # fmt: skip
    return output_dir, arguments, succeed(*arguments)


@pytest.mark.quick
def test_a_run_leaves_what_the_readme_says(finished):
    output_dir, _, printed = finished
    assert "Once upon a time" in printed and f"finished at step 4: {output_dir}" in printed
    config = yaml.safe_load((output_dir / "config.yaml").read_text())
    hashes = [config["run"][f"{what}_sha256"] for what in ("data", "validation", "tokenizer")]
    assert len({value for value in hashes if re.fullmatch("[0-9a-f]{64}", value)}) == 3
    assert config["run"]["world_size"] == 1 and config["run"]["torch"] and config["run"]["data"]["train"]["documents"] == 200
    again = load_experiment(str(output_dir / "config.yaml"), [f"data.cache_dir={config['data']['cache_dir']}"])
    assert again.train.steps == 4
    assert [r["step"] for r in records(output_dir, "eval")] == [0, 2, 4]
    assert [r["step"] for r in records(output_dir, "checkpoint")] == [2, 4]
    assert records(output_dir, "end") == [{"event": "end", "step": 4, "finished": True}]
    train = records(output_dir, "train")[0]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= set(train)
    evaluation = records(output_dir, "eval")[-1]
    assert {"val_loss", "val_ppl", "nats_per_story", "bits_per_byte", "layers"} <= set(evaluation)
    assert len(evaluation["layers"]) == 4 and {"gini", "entropy_bits", "experts_used"} <= set(evaluation["layers"][0])
    assert evaluation["val_loss"] < records(output_dir, "eval")[0]["val_loss"]
    served = json.loads((output_dir / "experts.json").read_text())
    assert served["step"] == 4 and [len(layer["tokens"]) for layer in served["layers"]] == [16] * 4


def test_a_finished_run_says_so_and_how_to_start_anew(finished, monkeypatch, capsys):
    output_dir, arguments, _ = finished
    call(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "is finished at step 4" in printed and "--resume never" in printed
    assert len(losses(output_dir)) == 4
    before = contents(output_dir)
    for more in ([], ["--set", "data.name=text", "--set", f"data.path={output_dir}/none"]):
        with suppress(SystemExit):
            call(monkeypatch, *arguments, "--set", "checkpoint.keep=1", *more)
    assert contents(output_dir) == before, "only a run that starts removes checkpoints that are too many"


def test_other_settings_in_the_same_folder_are_refused(finished, monkeypatch, capsys):
    _, arguments, _ = finished
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments, "--set", "train.learning_rate=0.1")
    assert "train.learning_rate = 0.1 but the checkpoint" in capsys.readouterr().err


def test_other_data_on_resume_are_refused(finished, monkeypatch, capsys, tmp_path):
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        state = json.loads((folder / "state.json").read_text()) | {"data_fingerprint": "other", "step": 3}
        content, manifest = json.dumps(state).encode(), json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "state.json").write_bytes(content)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments, "--output_dir", str(copy))
    assert "use the data it was trained on" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_named_and_skipped_and_never_silently_all(finished, monkeypatch, capsys, tmp_path):
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir, copy)
    (copy / "checkpoints" / ".tmp-step_00000004").mkdir()
    (copy / "checkpoints" / "step_00000004" / "core.safetensors").write_bytes(b"")
    call(monkeypatch, *arguments, "--output_dir", str(copy), "--max_steps", "2")
    printed = capsys.readouterr().out
    assert f"checkpoint {copy}/checkpoints/step_00000004 is skipped: core.safetensors has 0 bytes instead of" in printed
    assert "has reached --max_steps 2 at step 2" in printed
    assert not list(copy.glob("checkpoints/.tmp*")), "what a killed save left goes, also where nothing is left to do"
    (copy / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    before = contents(copy)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *arguments, "--output_dir", str(copy))
    error = capsys.readouterr().err
    assert ended.value.code == REFUSED and error.count("\n") == 1
    assert "none of the checkpoints is whole" in error and "start anew with --resume never" in error
    assert contents(copy) == before


def test_a_folder_of_another_live_run_is_refused_before_anything_is_touched(finished, monkeypatch, capsys, tmp_path):
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir, copy)
    owner = FolderLock(copy, create=False)
    owner.sign()
    before = contents(copy)
    for more in ([], ["--resume", "never"]):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *arguments, "--output_dir", str(copy), *more)
        assert ended.value.code == REFUSED and "belongs to a live run (host" in capsys.readouterr().err
    assert contents(copy) == before and not (tmp_path / "run.1").exists()
    # A dry run starts nothing: neither the owner nor a run of other settings is in its way.
    call(monkeypatch, *arguments, "--output_dir", str(copy), "--dry_run", "--set", "control=attention_only")
    assert contents(copy) == before


def test_a_run_that_died_before_its_first_checkpoint_starts_over_in_place(finished, monkeypatch, tmp_path):
    """And another one that did is moved aside as ever."""
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir, copy, ignore=shutil.ignore_patterns("checkpoints"))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if '"checkpoint"' not in line))
    for more, folders in (([], ["run"]), (["--set", "seed=1"], ["run", "run.1"])):
        with pytest.raises(pytest.fail.Exception, match="a process group formed"):
            call(monkeypatch, *arguments, "--output_dir", str(copy), *more)
        assert sorted(path.name for path in tmp_path.iterdir()) == folders


def test_a_disk_that_is_full_at_the_start_is_no_refusal(finished, monkeypatch, capsys, tmp_path):
    """A job that is refused is not started again."""

    def write(*arguments):
        raise OSError(number, os.strerror(number))

    for number, code in ((errno.ENOSPC, FAILED), (errno.EROFS, REFUSED)):
        monkeypatch.setattr(training, "write_config", write)
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *finished[1], "--output_dir", str(tmp_path / "run"))
        assert ended.value.code == code
        assert f"cannot be written ({os.strerror(number)})" in capsys.readouterr().err


def test_a_folder_with_nothing_but_checkpoints_is_moved_aside(finished, monkeypatch, capsys, tmp_path):
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir / "checkpoints", copy / "checkpoints")
    monkeypatch.chdir(copy)
    for folder in (".", "checkpoints/.."):
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments, "--output_dir", folder, "--resume", "never")
        assert "is where we run; run elsewhere" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="a process group formed"):
        call(monkeypatch, *arguments, "--output_dir", str(copy), "--resume", "never")
    assert (tmp_path / "run.1" / "checkpoints" / "latest").exists() and not (copy / "checkpoints").exists()


def test_a_full_disk_and_numbers_that_are_not_finite_end_two_ranks_with_one_line(finished, monkeypatch, tmp_path):
    """Only the second is said to be of no use to start again, in the code and in the file that slurm/body.sh reads."""
    verdict = tmp_path / "verdict"
    monkeypatch.setenv("SOME_VERDICT_FILE", str(verdict))
    faults = ["--set", "faults.write=step=4 stage=optimizer.safetensors"]
    result = launch(*finished[1], *faults, "--output_dir", str(tmp_path / "run"), ranks=2)
    assert result.returncode == FAILED and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "step_00000004 cannot be written (No space left on device)" in line and "step_00000002 is the newest" in line
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["latest", "step_00000002"] and not verdict.exists()

    faults = ["--set", "faults.nan=rank=1 step=3", "--set", "train.max_skipped=0"]
    result = launch(*finished[1], *faults, "--output_dir", str(tmp_path / "run"), ranks=2)
    assert result.returncode == NOT_FINITE and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 3: the loss or the gradients of 1 steps in a row are not finite")
    assert verdict.read_text() == str(NOT_FINITE)


def test_resume_never_moves_the_old_run_aside(finished, tmp_path):
    output_dir, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output_dir, copy)
    printed = succeed(*arguments, "--output_dir", str(copy), "--resume", "never", "--max_steps", "1")
    assert f"moved to {copy}.1" in printed
    assert len(losses(copy)) == 1 and len(losses(tmp_path / "run.1")) == 4
    assert losses(copy) == losses(output_dir)[:1]


def test_going_back_or_branching_needs_a_folder_of_its_own(finished, monkeypatch, capsys, tmp_path):
    output_dir, arguments, _ = finished
    older = output_dir / "checkpoints" / "step_00000002"
    with pytest.raises(SystemExit):
        call(monkeypatch, *arguments, "--resume", str(older))
    assert "holds a run at step_00000004; continue that with --resume auto" in capsys.readouterr().err
    branch = tmp_path / "branch"
    succeed(*arguments, "--resume", str(older), "--output_dir", str(branch))
    assert [r["loss"] for r in records(branch, "train")] == losses(output_dir)[2:]
    (resumed,) = records(branch, "resume")
    assert (resumed["step"], resumed["path"], resumed["skipped"]) == (2, str(older), {})
    assert resumed["verify_seconds"] > 0 and resumed["load_seconds"] > 0
    assert len(losses(output_dir)) == 4


@pytest.mark.parametrize("best", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["zero2", "zero1", "zero2_offload"])
def test_every_ds_config_trains(name, best, tmp_path, cache_dir):
    output_dir = tmp_path / "run"
    config = str(REPOSITORY / "ds_configs" / f"{name}.json")
    arguments = [*SMALL, "--ds_config", config, "--output_dir", str(output_dir), "--set", f"data.cache_dir={cache_dir}"]
    succeed(*arguments, "--max_steps", "3", best=(best,))
    first, last = records(output_dir, "eval")
    assert last["val_loss"] < first["val_loss"]
    assert read_state(output_dir / "checkpoints" / "step_00000003").precision == best


@pytest.mark.parametrize(
    ("launcher", "signalled", "code"),
    [
        (["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", "{port}"], "--local_rank=1", REQUEUE),
        (["torchrun", "--nproc-per-node", "2", "--master-port", "{port}"], "torchrun", FAILED),
        (["torchrun", "--nproc-per-node", "1", "--master-port", "{port}"], "torchrun", FAILED),
    ],
    ids=["deepspeed", "torchrun", "torchrun, one rank"],
)
def test_launchers(launcher, signalled, code, finished, tmp_path):
    """A run that a signal stops, to one rank or to the launcher, and that the same command ends."""
    output_dir = tmp_path / "run"
    command = [part.replace("{port}", str(free_port())) for part in launcher]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    command += [SCRIPT, *finished[1], "--output_dir", str(output_dir)]
    # Long enough that the signal comes before the end.
    process = subprocess.Popen(
        [*command, "--set", "faults.slow=step=3 seconds=2"], env=environment(), cwd=tmp_path, process_group=0,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: last_step(output_dir) >= 2 or process.poll() is not None, 240, "step 2")
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        next(each for each in family if signalled in " ".join(each.cmdline())).terminate()
        printed = process.communicate(timeout=240)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, printed
    (end,) = records(output_dir, "end")
    assert end["stopped_by"].startswith("SIGTERM on rank") and not end["finished"]
    assert end["step"] in (2, 3)
    assert (output_dir / "checkpoints" / "latest").read_text().strip() == f"step_{end['step']:08d}"

    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [start["world_size"] for start in records(output_dir, "start")] == [int(launcher[-3])] * 2
    assert losses(output_dir) == pytest.approx(losses(finished[0]), rel=1e-5)
    shown = [line for line in (result.stdout + result.stderr).splitlines() if "DeepSpeed" in line or "Warning" in line]
    assert not shown, "DeepSpeed's own messages are shown only on request"


def test_a_refusal_on_two_ranks_is_one_line():
    result = launch("--experiment", "quikstart", ranks=2)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "did you mean quickstart?" in result.stderr
