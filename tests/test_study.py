"""The study: what it runs, what it leaves alone, and the paired differences of its tables."""

import json
import math
import os
import signal
import subprocess
import sys
import threading

import pytest
import yaml

from tests.launch import environment, interrupted
from tools import study as tool
from tools.study import REPOSITORY, Study, paired
from trainer.config import load_experiment

GROUP = "{{experiment: study, variants: {{a: {{}}}}, groups: [{{title: t, question: q, {}}}]}}"
SHARED = ["&a0 [x, x, x]", *(f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))]
TINY = [
    "model.vocab_size=260", "model.d_model=16", "model.num_heads=2", "model.max_seq_len=32", "model.some.num_experts=4",
    "model.some.d_ffn=16", "model.some.top_k=2", "data.name=stories", "data.train_documents=40", "data.val_documents=8",
    "train.batch_size=8", "train.steps=2", "train.warmup_steps=0", "log.every=1000",
]  # fmt: skip


def test_every_variant_of_the_shipped_study_is_an_experiment_of_its_own():
    study = Study.read(REPOSITORY / "tools" / "study.yaml")
    experiments = [load_experiment(study.experiment, study.settings(name)) for name in study.variants]
    for i, experiment in enumerate(experiments):
        assert experiment not in experiments[:i], list(study.variants)[i]
    used = {name for group in study.groups for name in [group["baseline"], *group["variants"]]}
    assert used == set(study.variants)


def test_paired_differences():
    ours = {0: {"val_loss": 2.0}, 1: {"val_loss": 3.5}, 2: {"val_loss": 4.1}, 5: {"val_loss": 9.0}}
    baseline = {0: {"val_loss": 1.0}, 1: {"val_loss": 2.0}, 2: {"val_loss": 3.0}, 7: {"val_loss": 0.0}}
    mean, half, differences = paired(ours, baseline)
    assert differences == pytest.approx([1.0, 1.5, 1.1]) and mean == pytest.approx(1.2)
    deviation = math.sqrt((0.2**2 + 0.3**2 + 0.1**2) / 2)
    assert half == pytest.approx(4.303 * deviation / math.sqrt(3), rel=1e-6)
    assert paired({0: {"val_loss": 1.0}}, {0: {"val_loss": 0.5}}) == (0.5, None, [0.5])
    assert paired({0: {"val_loss": 1.0}}, {1: {"val_loss": 0.5}}) is None


def test_a_table_says_where_its_runs_differ_in_precision():
    group = {"title": "T", "question": "Q?", "baseline": "a", "variants": ["b"]}
    figures = {
        key: None for key in ("coselected_cosine", "effective_experts", "largest_gate", "output_over_residual", "respawns")
    }
    for other in ("bf16", "fp32", None):
        seeds = [{0: {"val_loss": 1.0, "precision": precision, **figures}} for precision in ("fp32", other)]
        variants = {name: {"trained": 1, "seeds": seeds} for name, seeds in zip("ab", seeds, strict=True)}
        text = tool.tables(Study("study", {}, [group]), {"variants": variants})
        assert ("These runs differ in precision (bf16, fp32)" in text) == (other == "bf16")


def test_a_study_runs_resumes_and_writes_its_tables(tmp_path, monkeypatch):
    study = {
        "experiment": "study",
        "variants": {"SoME": {}, "attention only": {"control": "attention_only"}},
        "groups": [{"title": "Experts", "question": "Do they help?", "baseline": "attention only", "variants": ["SoME"]}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "study.py"),
        "--study",
        str(tmp_path / "study.yaml"),
        "--seeds",
        "1",
        "--output_dir",
        str(tmp_path),
    ]
    for setting in TINY:
        command += ["--set", setting]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    losses = {}
    for name, folder in (("SoME", "SoME"), ("attention only", "attention_only")):
        metrics = tmp_path / folder / "seed_0" / "metrics.jsonl"
        evals = [json.loads(line) for line in metrics.read_text().splitlines() if '"eval"' in line]
        losses[name] = results["variants"][name]["seeds"]["0"]["val_loss"]
        assert losses[name] == evals[-1]["val_loss"] and evals[-1]["step"] == 2
        assert results["variants"][name]["seeds"]["0"]["trained_tokens"] is None, "no step was recorded"
    before = {path: path.read_bytes() for path in tmp_path.glob("*/seed_0/metrics.jsonl")}
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 0
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*/seed_0/metrics.jsonl")}
    assert f"{losses['SoME'] - losses['attention only']:+.4f} one seed" in (tmp_path / "results.md").read_text()


PATIENT = """
import pathlib, signal, sys, time
folder, own, other = pathlib.Path({folder!r}), {own}, {other}
def stop(*_):
    (folder / f"asked_{{own}}").touch()
    while not (folder / f"asked_{{other}}").exists(): time.sleep(0.02)
    (folder / f"saved_{{own}}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / f"started_{{own}}").touch()
while not (folder / f"started_{{other}}").exists(): time.sleep(0.02)
(folder / "both").touch()
while True: time.sleep(0.02)
"""
"""Ends well once it and its neighbour have been asked to stop."""


def test_a_signal_stops_all_runs_at_once(tmp_path, monkeypatch):
    def command(_, __, folder, ___):
        own = int(folder.name.removeprefix("seed_"))
        return [sys.executable, "-c", PATIENT.format(folder=str(tmp_path), own=own, other=1 - own)]

    monkeypatch.setattr(tool, "command", command)
    arguments = tool.parse_arguments(["--seeds", "2", "--jobs", "2", "--output_dir", str(tmp_path)])
    with interrupted((signal.SIGTERM, tmp_path / "both")):
        failures = tool.run_missing(Study("study", {"a": {}}, []), arguments)
    assert failures[-1].startswith("stopped; the same command goes on") and len(failures) == 3
    assert (tmp_path / "saved_0").exists() and (tmp_path / "saved_1").exists()


def test_a_signal_keeps_a_run_from_starting(tmp_path, monkeypatch):
    """It comes while a job looks at what is there."""
    stopped = threading.Event()

    def is_stale(*_) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return stopped.wait(60)

    monkeypatch.setattr(tool, "_is_stale", is_stale)
    monkeypatch.setattr(tool, "stop_all", stopped.set)
    monkeypatch.setattr(tool, "start", lambda *_: "started")
    arguments = tool.parse_arguments(["--seeds", "1", "--output_dir", str(tmp_path)])
    [stop] = tool.run_missing(Study("study", {"a": {}}, []), arguments)
    assert stop.startswith("stopped; the same command goes on")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
        (["--only", "none"], "--only none: unknown; known: 'SoME, corrected rule', 'SoME, v4 rule', "),
        (["--set", "train.step=3"], "train.step: unknown key"),
        (["--ds_config", "none.json"], "--ds_config none.json: cannot be read (No such file"),
        (["--ds_config", __file__], "test_study.py: is not JSON"),
        (["--output_dir", __file__], "test_study.py: cannot be used"),
        (["--output_dir", "occupied"], "--output_dir occupied/results.md: cannot be written (Is a directory)"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "start", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(sys, "argv", ["study.py", *flags])
    (tmp_path / "occupied" / "results.md").mkdir(parents=True)
    with pytest.raises(SystemExit) as refused:
        tool.main()
    said = capsys.readouterr().err
    assert refused.value.code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists() and len(list((tmp_path / "occupied").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment: study", "needs experiment, variants and groups"),
        ("{experiment: study, variants: {a: {}}, groups: [{title: t, question: q, baseline: b, variants: [a]}]}", "'b'"),
        ("{experiment: study, variants: {4: {}, 8: {}}, groups: []}", "variant 4 is int, not text; put it in quotes"),
        ("{experiment: study, variants: {1e3: {}}, groups: []}", "variant '1e3' is float, not text; put it in quotes"),
        ("{experiment: study, variants: {true: {}}, groups: []}", "variant True is bool, not text"),
        ("{experiment: study, variants: {~: {}}, groups: []}", "variant None is NoneType, not text"),
        ("{experiment: study, variants: {a b: {}, a_b: {}}, groups: []}", "'a_b' and variant 'a b' would share the folder"),
        ("{experiment: study, variants: {SoME: {}, some: {}}, groups: []}", "'some' and variant 'SoME' would share"),
        ("experiment: study\ngroups: []\nvariants: {\u00fc: {}, u\u0308: {}}", "would share the folder"),
        (
            "{experiment: study, variants: {results.md: {}}, groups: []}",
            "and the study's results.md would share",
        ),
        *(
            (
                f"{{experiment: study, variants: {{{name}: {{}}}}, groups: []}}",
                "cannot name a folder; give it 1 to 200",
            )
            for name in ("..", "a/b", "''", "a" * 300, "\u00fc" * 150, r'"a\0b"', r'"a\nb"', "end.", ".hidden")
        ),
        ("{experiment: 4, variants: {a: {}}, groups: []}", "experiment = 4 is not text"),
        (GROUP.format("baseline: a, variants: [8]"), "group 't' names 8, int, not text; put it in quotes"),
        (GROUP.format("baseline: a, variants: [aa]"), "group 't' names 'aa', no variant; did you mean a"),
        (GROUP.format("baseline: a, variants: a"), "variants a list of names"),
        (GROUP.format("baseline: a"), r"needs .* \(KeyError: 'variants'\)"),
        ("{experiment: study, variants: {a: {}}, groups: [t]}", "needs experiment, variants and groups"),
        (
            "{experiment: study, variants: {a: {name: !!binary aGk=}}, groups: []}",
            "'a' holds b'hi', bytes; write",
        ),
        (
            f"{{experiment: study, variants: {{a: {{name: [{', '.join(SHARED)}]}}}}, groups: []}}",
            "'a' has over 10,000",
        ),
        ("experiment: study\ngroups: []\nvariants: {a: &a {name: *a}}", "'a' has over 10,000"),
        ("{experiment: study, variants: {a: none}, groups: []}", "variant 'a' = 'none'; write its overrides as keys"),
        ("{experiment: study, variants: [a], groups: []}", "needs experiment, variants and groups"),
    ],
)
def test_a_bad_study_is_refused(tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Study.read(tmp_path / "study.yaml")


def test_texts_of_a_variant_reach_its_runs_as_they_are(tmp_path):
    changes = {"sample.prompt": "\U0001f600 ü", "name": "08", "train.learning_rate": 1e-3}
    study = {"experiment": "study", "variants": {"a": changes}, "groups": []}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study).replace("'08'", "08"))
    experiment = load_experiment("study", Study.read(tmp_path / "study.yaml").settings("a"))
    assert (experiment.sample.prompt, experiment.name, experiment.train.learning_rate) == ("\U0001f600 ü", "08", 0.001)


def test_a_variant_that_is_refused_is_named_before_anything_runs(tmp_path):
    (tmp_path / "study.yaml").write_text("{experiment: study, variants: {a: {}, b c: {train.step: 3}}, groups: []}")
    command = [sys.executable, str(REPOSITORY / "tools" / "study.py"), "--study", "study.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (2, "", ["study.yaml"])
    assert done.stderr.startswith("error: variant 'b c': train.step: unknown key; did you mean steps?")


def test_results_are_written_and_the_code_kept_where_letters_are_missing(tmp_path):
    group = {"title": "Übung", "question": "Größer?", "baseline": "übung", "variants": ["übung"]}
    study = {"experiment": "study", "variants": {"übung": {}}, "groups": [group]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, str(REPOSITORY / "tools" / "study.py"), "--study", "study.yaml", "--collect"]
    variables = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False)
    assert done.returncode == 0 and rb"| \xfcbung |" in done.stdout, done.stderr
    assert "| übung |" in (tmp_path / "runs/study/results.md").read_text(encoding="utf-8")
