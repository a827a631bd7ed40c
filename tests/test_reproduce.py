"""Reproducing published runs: real small runs, and verdicts on hand-made folders."""

import dataclasses
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch import REPOSITORY, environment, interrupted, losses, records, wait_for
from tools import reproduce, runs
from tools.results import Row
from tools.results_table import HEADS, cells
from tools.runs import FAILED, read_run
from trainer.config import experiment_names, load_experiment
from trainer.published import published_results

SOME, DENSE = "v3-1-v1", "cmp-dense-tinystories"
PER_EPOCH = 156  # steps of SOME: 20,000 stories in batches of 128


def call(*arguments: str) -> int:
    """The tool's exit code."""
    with pytest.raises(SystemExit) as ended:
        reproduce.main(list(arguments))
    return ended.value.code


def rows(output_dir: Path) -> dict[str, dict]:
    """The JSON's rows by experiment, with `+control`."""
    found = json.loads((output_dir / "results.json").read_text())["rows"]
    return {row["experiment"] + ("" if row["control"] == "none" else f"+{row['control']}"): row for row in found}


# Real runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir) -> Path:
    """Both runs at small scale, stopped after two steps."""
    output_dir = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SOME_CACHE_DIR", str(cache_dir))
        assert call(*small(output_dir, SOME, DENSE), "--max_steps", "2") == 0
    return output_dir


@pytest.fixture
def copy(trained, tmp_path, cache_dir, monkeypatch) -> Path:
    """A copy of the runs that a test may change."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SOME_CACHE_DIR", str(cache_dir))
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def small(output_dir: Path, *ids: str) -> list[str]:
    return [*ids, "--scale", "small", "--output_dir", str(output_dir)]


def test_the_table_repeats_what_the_runs_wrote(trained):
    table = (trained / "results.md").read_text()
    for name, row in rows(trained).items():
        last, train = records(trained / name / "seed_0", "eval")[-1], records(trained / name / "seed_0", "train")
        measured = {key: value.get("mean", value.get("missing")) for key, value in row["measured"].items()}
        assert row["compared_at"] == {"steps": [2], "epoch": None} and last["step"] == 2
        assert measured["published_loss"] == last["val_loss_with_padding"]
        assert measured["published_ppl"] == math.exp(last["val_loss_with_padding"])
        assert [measured[key] for key in ("val_loss", "val_ppl", "nats_per_story", "bits_per_byte")] == [
            last[key] for key in ("val_loss", "val_ppl", "nats_per_story", "bits_per_byte")
        ]
        routing = {key: value for key, value in measured.items() if "gini" in key or "entropy" in key}
        middle = last["layers"][1] if name == SOME else dict.fromkeys(routing, "no experts")
        assert len(routing) == 6 and routing == {key: middle[key] for key in routing}
        [run] = row["runs"]
        assert (run["step"], run["total_steps"], run["finished"]) == (2, 40, False)
        assert run["wall_seconds"] == sum(r["seconds"] for r in [*train, *records(trained / name / "seed_0", "eval")])
        assert run["tokens_per_second_median"] == statistics.median(r["tokens_per_second"] for r in train)
        assert run["git_commit"] and run["torch"] and run["device"] and run["date"]
        assert run["precision"] == records(trained / name / "seed_0", "start")[0]["precision"] in ("bf16", "fp32")
        assert row["verdict"] == "small scale: not comparable" and row["published"] == {"missing": "small scale"}
        assert f"| {last['val_loss_with_padding']:.4f} |" in table and f"| {last['val_loss']:.4f} |" in table


def test_what_has_stopped_as_asked_is_not_started_again(copy, monkeypatch):
    monkeypatch.setattr(reproduce, "command", lambda *_: pytest.fail("started"))
    assert call(*small(copy, SOME, DENSE), "--max_steps", "2") == 0
    assert (copy / SOME / "seed_0" / "metrics.jsonl").read_text().count('"event": "start"') == 1


def test_a_run_goes_on_where_it_stopped_and_is_not_mixed_with_another(copy):
    folder = copy / SOME / "seed_0"
    before = losses(folder)
    assert call(*small(copy, SOME), "--max_steps", "4") == 0
    assert losses(folder)[:2] == before and len(losses(folder)) == 4
    assert [record["step"] for record in records(folder, "start")] == [0, 2]
    assert rows(copy)[SOME]["compared_at"]["steps"] == [4] and DENSE in rows(copy)

    # The rate is a setting that the trainer refuses to change on the way.
    assert call(*small(copy, SOME), "--set", "train.learning_rate=0.01") == 1
    assert len(losses(folder)) == 4
    assert any("seed 0 failed: train.learning_rate = 0.01 but" in remark for remark in rows(copy)[SOME]["remarks"])
    assert "train.learning_rate" in (folder / FAILED).read_text()
    assert call(*small(copy, SOME), "--max_steps", "4") == 0
    assert not (folder / FAILED).exists() and rows(copy)[SOME]["remarks"] == []


# Runs that are not the trainer's


def test_a_failure_is_told_and_the_next_run_starts(tmp_path, monkeypatch):
    programs = {
        # torchrun adds a traceback of its own.
        0: "import sys; print('error: no such thing\\ntorch.x.ChildFailedError:\\n====', file=sys.stderr); sys.exit(2)",
        1: "raise RuntimeError('broken')",
        2: "import os; os.kill(os.getpid(), 9)",
    }
    seed_of = lambda settings: int(settings[-1].removeprefix("seed="))  # noqa: E731
    monkeypatch.setattr(reproduce, "command", lambda _, settings, *__: [sys.executable, "-c", programs[seed_of(settings)]])
    assert call(SOME, "--seeds", "3", "--output_dir", str(tmp_path)) == 1
    assert rows(tmp_path)[SOME]["remarks"] == [
        "seed 0 failed: no such thing", "seed 1 failed: RuntimeError: broken", "seed 2 failed: ended by SIGKILL"
    ]  # fmt: skip
    assert rows(tmp_path)[SOME]["verdict"] == "none: failed"
    assert call("--collect", "--output_dir", str(tmp_path)) == 0
    assert rows(tmp_path)[SOME]["verdict"] == "none: failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_still_writes_the_table(tmp_path, monkeypatch, number):
    program = f"open({str(tmp_path / 'started')!r}, 'w').close(); import time; time.sleep(60)"
    monkeypatch.setattr(reproduce, "command", lambda *_: [sys.executable, "-c", program])
    with interrupted((number, tmp_path / "started")):
        assert call(SOME, "--seeds", "2", "--output_dir", str(tmp_path)) == reproduce.EXIT_STOPPED
    assert rows(tmp_path)[SOME]["verdict"] == "none: not run"


SLOW = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def stop(*_):
    print("Traceback\\nerror: no room", file=sys.stderr, flush=True)
    open({asked!r}, "w").close()
signal.signal(signal.SIGTERM, stop)
open({started!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
while True: time.sleep(0.02)
"""
"""Notes that it is asked to stop and does not, like its child, which has a session of its own."""


@pytest.mark.parametrize("limit", [3, 600])
def test_what_does_not_stop_is_killed_in_time_or_at_the_second_signal(tmp_path, monkeypatch, capsys, limit):
    started, asked = tmp_path / "started", tmp_path / "asked"
    program = SLOW.format(started=str(started), asked=str(asked))
    monkeypatch.setattr(reproduce, "command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(runs, "SECONDS_TO_STOP", limit)
    second = [(signal.SIGINT, asked)] if limit == 600 else []
    with interrupted((signal.SIGINT, started), *second):
        assert call(SOME, "--output_dir", str(tmp_path)) == reproduce.EXIT_STOPPED
    assert asked.exists() and rows(tmp_path)[SOME]["verdict"] == "none: not run"
    said = capsys.readouterr().err
    assert f"at most {limit} s; Ctrl-C kills" in said and "killed; the last checkpoint stays the newest" in said
    assert "error: no room" in said and "Traceback" not in said
    for pid in map(int, started.read_text().split()):
        wait_for(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


# Verdicts


def write_run(folder: Path, run_id: str = SOME, losses_of: dict | None = None, done: bool = True, **settings) -> None:
    """A run of the published sizes with a validation loss for each epoch, and half as much on real tokens."""
    data, precision = settings.pop("data", {}), settings.pop("precision", "bf16")
    experiment = load_experiment(run_id, [f"{key}={value}" for key, value in settings.items()])
    asked, end = experiment.data, 4 * PER_EPOCH
    summary = {
        "train": {"documents": asked.train_documents},
        "validation": {"documents": asked.val_documents},
        "dropped": {"empty": 0, "overlap": 0},
        "notes": [],
    }
    folder.mkdir(parents=True)
    config = {**experiment.to_dict(), "run": {"git_commit": "abc", "data": summary | data}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    layer = {"gini": 0.1, "entropy_bits": 2.0, "gini_with_padding": 0.2, "entropy_bits_with_padding": 3.0}
    layers = [layer | {"usage_gini": index / 10, "usage_entropy_bits": float(index)} for index in range(4)]
    lines = [{"event": "start", "step": 0, "total_steps": end, "precision": precision}]
    for epoch, loss in (losses_of or {0: 9.0, 1: 2.9, 4: 2.5555}).items():
        for step in range(max(1, (epoch - 1) * PER_EPOCH + 1), epoch * PER_EPOCH + 1):
            lines.append({"event": "train", "step": step, "loss": epoch + 1.0, "skipped": 0, "seconds": 1.0})
            lines[-1]["tokens_per_second"] = 100.0
        lines.append({"event": "eval", "step": epoch * PER_EPOCH, "epoch": float(epoch), "seconds": 10.0})
        lines[-1] |= {"val_loss": loss / 2, "val_ppl": math.exp(loss / 2), "val_loss_with_padding": loss}
        lines[-1] |= {"nats_per_story": 200.0, "bits_per_byte": 1.0, "layers": layers if run_id == SOME else []}
    if done:
        lines.append({"event": "end", "step": end, "finished": True})
    # A crash may cut the last line short.
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr')


def row_of(folder: Path, run_id: str = SOME, control: str | None = None, seeds: int = 1) -> Row:
    return Row(run_id, control, [read_run(folder / f"seed_{seed}", seed) for seed in range(seeds)])


LAST = published_results(SOME).epochs[-1].val_loss
SHORT = {"train": {"documents": 18_000}, "dropped": {"empty": 0, "overlap": 897}}


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        ({"losses_of": {0: 9.0, 1: 2.9, 4: LAST * 1.019}}, "inside 2 % (+1.9 %)"),
        ({"losses_of": {0: 9.0, 1: 2.9, 4: LAST * 0.981}}, "inside 2 % (-1.9 %)"),
        ({"losses_of": {0: 9.0, 1: 2.9, 4: LAST * 1.05}}, "outside (+5.0 %)"),
        ({"losses_of": {0: 9.0, 1: 2.9, 4: LAST * 0.95}}, "outside (-5.0 %)"),
        ({"losses_of": {0: 9.0, 1: 2.8422 * 1.1}, "done": False},
         "none: not finished: step 156 of 624, epoch 1 compared: +10.0 %"),
        ({"losses_of": {0: 9.0}, "done": False}, "none: not finished: step 0 of 624"),
        ({"losses_of": {0: 9.0, 4: float("nan")}}, "none: the loss is not finite"),
        (
            {"data": {"tokenizer_documents": 18897}},
            "none: fewer documents than the run asks for: tokenizer 18,897 of 2,119,719, epoch 4 compared: +0.0 %",
        ),
        ({"data": SHORT}, "none: fewer documents than the run asks for: train 18,897 of 20,000, epoch 4 compared: +0.0 %"),
        ({"train.learning_rate": 0.001}, "none: settings changed: train.learning_rate, epoch 4 compared: +0.0 %"),
        ({"checkpoint.every": 7, "data.path": "here", "seed": 3, "data.allow_fewer": "true"}, "inside 2 % (+0.0 %)"),
    ],
)  # fmt: skip
def test_the_verdict(tmp_path, run, verdict):
    write_run(tmp_path / "seed_0", **run)
    if math.isnan(run.get("losses_of", {}).get(4, 0)):
        metrics = tmp_path / "seed_0" / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("NaN", "null"))  # as the trainer writes it
    row = row_of(tmp_path)
    assert row.verdict == verdict
    assert len(cells(row)) == len(HEADS) and all(cells(row))
    json.dumps(row.to_dict(), allow_nan=False)


def test_without_a_published_result_there_is_no_verdict(tmp_path):
    for run_id, control in (("v3-3-v3", None), ("a4", None), (SOME, "dense")):
        folder = tmp_path / run_id
        write_run(folder / "seed_0", run_id, **({"control": control} if control else {}))
        row = row_of(folder, run_id, control)
        assert row.verdict == f"none: no published result{' for a control' if control else ''}"
        shown = dict(zip(HEADS, cells(row), strict=True))
        assert shown["control"] == (control or "none") and shown["val loss"] == "2.5555"
        assert shown["Gini: published"] == ("none for a control" if control else "none published")
    assert row_of(tmp_path / "nothing").verdict == "none: not run"


def test_columns_of_a_row_over_seeds_and_its_curve(tmp_path):
    for seed, loss in enumerate((2.5, 2.6)):
        write_run(tmp_path / f"seed_{seed}", losses_of={0: 9.0, 1: 2.9, 4: loss}, seed=seed)
    write_run(tmp_path / "seed_2", losses_of={0: 9.0, 1: 99.0}, done=False, seed=2)
    row = row_of(tmp_path, seeds=4)
    texts = cells(row)
    assert texts[:8] == [SOME, "v3", "none", "2/4", "624/624, 156/624, not run", "5.52", "72.80", "epoch 4 (step 624)"]
    assert texts[8:10] == ["2.5500 (2.5000 to 2.6000)", "2.5555"]
    assert texts[11:14] == ["12.88", "1.2750 (1.2500 to 1.3000)", "3.58 (3.49 to 3.67)"]
    # The published measure is that of layer 4 // 2.
    assert [text.split(" ")[0] for text in texts[16:24]] == [
        "0.550", "0.200", "0.200", "0.100", "4.192", "2.000", "3.000", "2.000"
    ]  # fmt: skip
    assert texts[24] == "inside 2 % (-0.2 %)"
    assert row.remarks == ["seed 2 not counted: step 156 of 624", "seed 3 not run"]
    values = row.to_dict()
    assert [point["published"] for point in values["curve"]] == [
        dataclasses.asdict(result) for result in published_results(SOME).epochs
    ]
    assert values["curve"][0]["measured"]["published_loss"] == {"mean": 2.9, "min": 2.9, "max": 2.9}
    assert values["curve"][0]["measured"]["train_loss"]["mean"] == 2.0
    assert values["runs"][0]["wall_seconds"] == 2 * PER_EPOCH + 30


def test_seeds_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    write_run(tmp_path / "seed_0")
    write_run(tmp_path / "seed_1", seed=1, **{"train.learning_rate": 0.001})
    assert row_of(tmp_path, seeds=2).verdict == "none: seeds differ in train.learning_rate"
    write_run(tmp_path / "b" / "seed_0")
    write_run(tmp_path / "b" / "seed_1", seed=1, precision="fp32")
    row = row_of(tmp_path / "b", seeds=2)
    assert row.verdict == "none: seeds differ in precision" and cells(row)[8] == "seeds differ"


def test_collect_finds_every_experiment_and_control_in_the_folder(tmp_path):
    write_run(tmp_path / SOME / "seed_0")
    write_run(tmp_path / f"{SOME}+dense" / "seed_1", control="dense", seed=1)
    (tmp_path / "mine" / "seed_0").mkdir(parents=True)
    target = tmp_path / "mine" / "table.json"
    assert call("--collect", "--output_dir", str(tmp_path), "--json", str(target)) == 0
    found = json.loads(target.read_text())["rows"]
    assert [(row["experiment"], row["control"], row["seeds"]) for row in found] == [
        (SOME, "none", [0]),
        (SOME, "dense", [1]),
    ]
    assert target.with_suffix(".md").exists() and not (tmp_path / "results.json").exists()


# The command line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["v4-a44"], "did you mean v4-a4?"),
        ([SOME, "--control", "dens"], "did you mean dense?"),
        ([SOME, "--seeds", "0"], "--seeds 0: must be at least 1"),
        ([SOME, "--seeds", "3", "--task", "3"], "--task 3: the list has 3 runs; give 0 to 2"),
        ([SOME, "--task", "x"], "--task x"),
        ([SOME, "--task", "0", "--collect"], "give one of them"),
        ([SOME, "--set", "seed=4"], "use --seeds"),
        ([SOME, "--set", "model.d_mdoel=4"], "d_mdoel: unknown key"),
        ([SOME, "--ds_config", "/nowhere.json"], "/nowhere.json"),
        ([SOME, "--ranks", "3"], "does not divide over 3 ranks"),
        ([SOME, DENSE, "--control", "random_keys"], f"{DENSE}+random_keys: control = 'random_keys'"),
        ([SOME, "--control", "random_keys", "--set", "model.some.rules.preset=fixed"], "changes nothing here"),
        ([SOME, "--json", "table.md"], "--json table.md: the table goes beside it as .md, over it; name it .json"),
        ([SOME, "--json", "no/such/table.json"], "--json no/such/table.json: cannot be written (No such file"),
        ([SOME, "--output_dir", __file__], "cannot be used (Not a directory"),
        ([], "no experiment named"),
        (["--collect"], "holds no runs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "command", lambda *_: pytest.fail("started"))
    assert call("--output_dir", str(tmp_path), *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("scale", "folder"), [("full", "runs/reproduce"), ("small", "runs/reproduce_small")])
def test_each_scale_has_a_folder_of_its_own(scale, folder, tmp_path, monkeypatch):
    """A run at one scale cannot go on at the other."""
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(reproduce, "start", lambda command: started.append(command))
    assert call(SOME, "--scale", scale, "--allow_fewer_documents", "--task", "0") == 0
    assert started[0][-1] == f"{folder}/{SOME}/seed_0"


def test_a_task_is_one_run_of_the_list(tmp_path, monkeypatch):
    words = [SOME, "v4-a4", "--control", "none", "--control", "dense", "--seeds", "2", "--output_dir", str(tmp_path)]
    listed = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "reproduce.py"), *words, "--task", "list"],
        env=environment(), capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert listed[3].split() == ["3", f"{SOME}+dense/seed_1"] and listed[8] == "8 runs: --task 0 to 7"
    started = []
    monkeypatch.setattr(reproduce, "start", lambda command: started.append(command))
    extra = ["--max_steps", "5", "--allow_fewer_documents", "--set", "data.path=my data", "--ranks", "2"]
    assert call(*words, *extra, "--task", "7") == 0
    [command] = started
    assert command[1:3] == ["-m", "torch.distributed.run"] and "--nproc-per-node=2" in command
    assert command[command.index("--experiment") + 1] == "v4-a4"
    assert [command[i + 1] for i, word in enumerate(command) if word == "--set"] == [
        "data.allow_fewer=true", "data.path=my data", "control=dense", "seed=1"
    ]  # fmt: skip
    assert command[-1] == str(tmp_path / "v4-a4+dense" / "seed_1") and command[command.index("--max_steps") + 1] == "5"
    assert not (tmp_path / "results.json").exists(), "tasks side by side would overwrite each other's tables"


@pytest.mark.parametrize("has_data", [False, True])
def test_small_scale_keeps_the_kind_of_every_experiment(has_data):
    for name in experiment_names():
        full = load_experiment(name)
        tiny = load_experiment(name, reproduce.small_scale(full, has_data))
        assert tiny.model.some.rules == full.model.some.rules and tiny.data.count_padding == full.data.count_padding
        assert tiny.model.channel_mixer == full.model.channel_mixer and tiny.model.num_parameters().total < 1_000_000
        assert (tiny.train.steps, tiny.train.eval_every, tiny.sample.tokens) == (40, 40, 0)
        assert (tiny.data.name, tiny.data.path) == ((full.data.name, full.data.path) if has_data else ("stories", None))


def test_the_slurm_script_gives_each_array_task_one_run(tmp_path):
    script, python = REPOSITORY / "slurm" / "reproduce.sh", tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "${RANK-no rank}" "$SOME_CACHE_DIR" "$@"\nexit 3\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-n", script], check=True)
    job = environment(SOME_PYTHON=str(python), SLURM_JOB_ID="5", SLURM_SUBMIT_DIR=str(REPOSITORY), RANK="1")
    job.pop("SOME_CACHE_DIR", None)
    cache = str(tmp_path / ".cache" / "some")  # in the job's working folder, which all nodes share
    command = ["bash", script, SOME, "--set", "data.path=a b"]
    for extra, task in (({"SLURM_ARRAY_TASK_ID": "4"}, ["--task", "4"]), ({}, [])):
        result = subprocess.run(command, env=job | extra, cwd=tmp_path, capture_output=True, text=True)
        tool = str(REPOSITORY / "tools" / "reproduce.py")
        assert result.stdout.splitlines() == ["no rank", cache, tool, SOME, "--set", "data.path=a b", *task]
        assert result.returncode == 3
    for broken in ({"SLURM_JOB_ID": ""}, {"SLURM_SUBMIT_DIR": "/nowhere"}):
        result = subprocess.run(command, env=job | broken, capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
