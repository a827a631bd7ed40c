"""Reports: what is read from runs in any state, and that page, CSV and Markdown say the same."""

import csv
import html
import json
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.reports import HOSTILE, REAL, STATUSES
from tools.report import Settings, find_runs, main, write_report
from tools.reporting import curves
from tools.reporting.compare import sort_by_data, variants
from tools.reporting.curves import extremes, number
from tools.reporting.health import FEWEST, WINDOW, _median_before, anomalies
from tools.reporting.page import embedded_json
from tools.reporting.routing import MOST_EVALUATIONS, routing
from tools.reporting.served import served
from tools.reporting.table import Entry
from tools.runs import Run, read_run
from tools.snapshots import Watched
from tools.study import paired
from trainer.config import load_experiment
from trainer.published import published_results

LIBRARY = "window.Plotly = {};</script><!-- <script>"


@pytest.fixture(scope="module")
def report(report_runs):
    folder, runs = report_runs.parent, report_runs
    (folder / "plotly.js").write_text(LIBRARY)
    chosen = [runs / name for name in STATUSES]
    settings = Settings(baseline="attention", mixed_data=True, plotly=folder / "plotly.js", watts=100.0, price=2.0)
    assert write_report(chosen, folder / "out" / "report.html", settings) == len(STATUSES)
    return folder


@pytest.fixture(scope="module")
def data(report):
    page = (report / "out/report.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def cells(data: dict) -> dict[str, dict]:
    return {run["cells"]["run"][0]: run["cells"] for run in data["runs"]}


def test_every_run_has_a_row_with_its_status(report, data):
    found = cells(data)
    assert {name: found[name]["status"][0] for name in found} == STATUSES
    for name in REAL:
        run, row = read_run(report / "runs" / name), found[name]
        losses = [record["val_loss"] for record in run.evals]
        assert row["best_val_loss"][0] == min(losses) and row["final_val_loss"][0] == losses[-1]
        assert row["best_val_ppl"][1] == f"{np.exp(min(losses)):,.2f}" and row["step"][0] == (
            4 if name == "some/seed_2" else 6
        )
        assert row["tokens_per_second"][0] == statistics.median(r["tokens_per_second"] for r in run.of("train"))
        assert row["family"][0] == {"attention": "attention only", "cmp-dense": "dense"}.get(name.split("/")[0], "SoME")
        layers = run.evals[-1]["layers"]
        assert row["gini"][0] == (pytest.approx(statistics.fmean(layer["gini"] for layer in layers)) if layers else None)
    losses = [run["cells"]["best_val_loss"][0] for run in data["runs"]]
    known = [loss for loss in losses if loss is not None]
    assert losses == sorted(known) + [None] * (len(losses) - len(known)), "best first, missing last"


def test_what_went_wrong_is_listed(data):
    listed = {run["cells"]["run"][0]: "; ".join(run["anomalies"]) for run in data["runs"]}
    assert "not finite: loss (steps 3 to 6)" in listed["nan"] and "skipped steps 4" in listed["nan"]
    assert "rollback to step </script>" in listed[HOSTILE] and "no records 6" in listed[HOSTILE]
    assert "cannot be read" in listed["unreadable"]
    assert not listed["empty"] and "finite" not in listed["some/seed_0"]


def test_csv_and_markdown_hold_the_table_of_the_page(report, data):
    with open(report / "out/results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [run["cells"]["run"][0] for run in data["runs"]]
    for row, run in zip(rows, data["runs"], strict=True):
        for key, (value, _) in run["cells"].items():
            assert row[key] == "" if value is None else row[key] == value or float(row[key]) == value, key
    table = read_markdown((report / "out/report.md").read_text())
    shown = [column for column in data["columns"] if column["is_shown"]]
    assert table[0] == [column["label"] for column in shown]
    assert table[2:] == [[run["cells"][column["key"]][1] for column in shown] for run in data["runs"]]


def read_markdown(text: str, number: int = 0) -> list[list[str]]:
    """The cells of the table of that number."""
    blocks = [block for block in re.split(r"\n(?!\|)", text) if block.lstrip("\n").startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in blocks[number].strip().splitlines()]
    return [[html.unescape(re.sub(r"\\(.)", r"\1", cell.strip())) for cell in row] for row in rows]


def test_variants_are_compared_in_pairs_of_seeds(report):
    def losses(name: str) -> dict[int, dict]:
        runs = [read_run(report / f"runs/{name}/seed_{seed}") for seed in (0, 1)]
        return {seed: next(record for record in run.evals if record["step"] == 6) for seed, run in enumerate(runs)}

    mean, half, _ = paired(losses("some"), losses("attention"))
    text = (report / "out/report.md").read_text()
    assert "Validation loss at step 6," in text, "which the runs that are done have"
    rows = {row[0]: row for row in read_markdown(text, 1)}
    assert rows["some"][1] == "2"
    assert rows["attention"][1] == "2" and rows["attention"][-2:] == ["", ""]
    assert rows["some"][-2:] == [f"{mean:+.4f}", f"{half:.4f}"]


def test_what_experts_do_is_there_for_the_best_run_of_a_variant(report, data):
    held = [run for run in data["runs"] if run["maps"]]
    names = [run["cells"]["tag"][0] for run in held]
    assert sorted(names) == ["diverged", "hash", "nan", "some", "v4-a4"]
    held = [held[names.index("some")]]
    run = read_run(report / "runs" / held[0]["cells"]["run"][0])
    routing, maps = held[0]["routing"], held[0]["maps"]
    assert routing["counts"]["steps"] == [0, 2, 4, 6] and maps["steps"] == [2, 4, 6]
    assert routing["counts"]["values"][-1] == [layer["expert_counts"] for layer in run.evals[-1]["layers"]]
    tokens = run.evals[-1]["val_tokens"]
    assert all(sum(counts) == 2 * tokens for counts in routing["counts"]["values"][0])
    assert routing["measures"]["key_movement"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert min(min(row) for row in routing["measures"]["key_movement"]["values"]) > 0
    layer = maps["layers"][0]
    assert np.shape(layer["usage"]) == (3, 8) and np.shape(layer["near"]) == (3, 8, 3)
    assert np.shape(layer["projections"]["PCA"]["x"]) == (3, 8)


SERVED = [{"tokens": [[["a", 2], ["\x1b[31m<b>", 1]], []], "coselected": [[0, 1, 7], [0, 2, 5], [0, -1, 3], "x"]}]


@pytest.mark.parametrize(
    "damaged",
    [
        "", "[1]", '{"step": 3', '{"layers": []}', '{"step": null, "layers": []}', '{"step": 1e999, "layers": []}',
        '{"step": 3, "layers": [{"tokens": [[], []]}]}', '{"step": 3, "layers": [{"tokens": [[]], "coselected": []}]}',
        '{"step": 3, "layers": [{"tokens": [[["a"]], []], "coselected": []}]}', 9999 * "[",
    ],
)  # fmt: skip
def test_what_experts_serve_is_read_with_care(tmp_path, damaged):
    assert served(tmp_path, 2) is None
    path = tmp_path / "experts.json"
    path.write_text(json.dumps({"step": 3, "layers": SERVED}))
    assert served(tmp_path, 2) == {"step": 3, "pairs": [[[0, 1, 7]]], "tokens": [["a 2 · \\x1b[31m<b> 1", ""]]}
    path.write_text(damaged)
    assert served(tmp_path, 2) is None


def test_cost_follows_from_the_records(report, data):
    rows = {row["run"][0]: row for row in data["costs"]}
    row = rows["some/seed_0"]
    run = read_run(report / "runs/some/seed_0")
    seconds = run.seconds + sum(record["seconds"] for record in run.of("checkpoint"))
    assert row["rank_hours"][0] == pytest.approx(seconds / 3600)
    assert row["kwh"][0] == pytest.approx(row["rank_hours"][0] / 10) and row["price"][0] == 2 * row["rank_hours"][0]
    flops = run.experiment.model.num_flops_per_token(32)
    assert row["tflop"][0] == pytest.approx(flops * run.of("train")[-1]["tokens"] / 1e12)

    row, run = rows["hash"], read_run(report / "runs/hash")
    assert [record["step"] for record in run.of("train")] == [2, 4, 6], "log.every=2"
    seconds = 2 * sum(record["seconds"] for record in run.of("train"))
    assert row["step_seconds"][0] == pytest.approx(seconds)
    seconds += sum(record["seconds"] for record in [*run.evals, *run.of("checkpoint")])
    assert row["rank_hours"][0] == pytest.approx(seconds / 3600)
    shown = next(run for run in data["runs"] if run["cells"]["run"][0] == "hash")
    work = 2 * sum(r["seconds"] for r in run.of("train")) + sum(r["seconds"] for r in run.evals)
    assert shown["cells"]["wall_seconds"][0] == pytest.approx(work)
    assert shown["curves"]["eval"]["seconds"][-1] == pytest.approx(work, rel=1e-5)
    assert shown["curves"]["eval"]["rate"][1] == pytest.approx(run.of("train")[0]["tokens_per_second"], rel=1e-5)


def test_long_curves_keep_their_extremes(monkeypatch):
    monkeypatch.setattr(curves, "BUCKETS", 10)
    generator = np.random.default_rng(0)
    for size in (0, 1, 20, 21, 997):
        values = generator.normal(size=size)
        values[size // 2 : size // 2 + 1] = np.nan
        kept = extremes(values)
        assert len(kept) <= 32 and list(kept) == sorted(set(kept))
        if size > 20:
            assert {0, size - 1, size // 2} <= set(kept)
            for part in np.array_split(np.arange(size), 10):
                inside = values[[i for i in kept if i in part]]
                assert np.nanmin(inside) == np.nanmin(values[part]) and np.nanmax(inside) == np.nanmax(values[part])
        else:
            assert list(kept) == list(range(size))


def test_a_spike_stands_out_of_what_was_before():
    values = np.random.default_rng(1).normal(size=200)
    values[[3, 4, 90, 199]] = np.nan
    values[110:170] = np.nan
    for i, median in enumerate(_median_before(values)):
        window = values[max(0, i - WINDOW) : i]
        finite = window[np.isfinite(window)]
        assert median == pytest.approx(np.median(finite)) if len(finite) >= FEWEST else np.isnan(median)
    losses = [3 + 4 / step for step in range(1, 101)]  # falls by two nats at once, as losses do
    losses[69] += 1.5
    train = [dict(event="train", step=step, loss=loss, grad_norm=1.0) for step, loss in enumerate(losses, start=1)]
    assert [anomaly.text for anomaly in anomalies(Run(0, Path("-"), records=train))] == ["loss spike 4.557 (step 70)"]


def test_numbers_from_files():
    assert [number(value) for value in (1, 2.5, True, "3", None, float("nan"), float("inf"), 10**400, [1])] == [
        1.0, 2.5, None, None, None, None, None, None, None,
    ]  # fmt: skip


def test_data_cannot_leave_their_script(report):
    hostile = {"a": "</script><!-- & \u2028\u2029 \ud800", "</script>": 1.5}
    text = embedded_json(hostile)
    assert json.loads(text) == hostile and not set("<>&\u2028\u2029") & set(text)
    page = (report / "out/report.html").read_text()
    assert page.count("</script>") == page.count("<script ") + page.count("<script>\n") == 3, "data, plotly, the page's own"
    assert "<!--" not in page
    assert "<img" not in page and "http:" not in re.sub(r'id="data">.*?</script>', "", page, flags=re.S)


def test_folders_are_searched_and_refusals_are_one_line(report, tmp_path, capsys, monkeypatch):
    found = find_runs(report / "runs")
    assert {str(path.relative_to(report / "runs")) for path in found} == STATUSES.keys() - {"empty"}
    some = str(report / "runs/some/seed_0")
    other = tmp_path / "other"
    other.mkdir()
    values = yaml.safe_load((report / "runs/some/seed_0/config.yaml").read_text())
    values["run"]["data"]["validation"]["documents"] += 1
    values["run"].pop("validation_sha256", None)
    (other / "config.yaml").write_text(yaml.safe_dump(values))
    (other / "metrics.jsonl").write_text((report / "runs/some/seed_0/metrics.jsonl").read_text())
    library = ["--plotly", str(report / "plotly.js"), "-o", str(tmp_path / "r.html")]
    for arguments, message in (
        ([str(tmp_path / "none"), *library], "no such folder"),
        ([some, *library, "--baseline", "nobody"], "--baseline nobody: no such variant; there are "),
        ([some, str(other), *library], "different validation data"),
        ([some, "--plotly", str(tmp_path / "none.js")], "cannot be read"),
        ([some, *library[:2], "-o", str(report / "plotly.js/r.html")], "cannot be written"),
        ([some, *library[:2], "-o", str(other)], "is a folder"),
        ([some, *library[:2], "-o", str(tmp_path / "report.md")], "choose another name"),
        ([some, *library[:2], "-o", str(tmp_path / "results.csv")], "choose another name"),
        ([some, *library, "--watts", "nan"], "--watts nan: must be a number of 0 or more"),
        ([some, *library, "--watts=-5"], "--watts -5.0: must be"),
        ([some, *library, "--price", "inf"], "--price inf: must be"),
    ):
        assert refusal(arguments, capsys).count(message) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"], "nothing was written"
    main([some, str(other), *library, "--mixed_data"])
    assert "Validation data differ" in (tmp_path / "r.md").with_name("report.md").read_text()
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert "pip install plotly" in refusal([some], capsys)
    monkeypatch.setitem(sys.modules, "umap", None)
    assert "pip install umap-learn" in refusal([some, *library, "--umap"], capsys)


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_markdown_shows_texts_from_files_as_they_are(report):
    text = (report / "out/report.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("- Run &lt;img")]
    assert (
        "to step &lt;/script&gt;&lt;script&gt;window.hacked=1" in line
        and "a\\|b \\`c\\` \\*d\\* \\[e\\](f) &amp;amp;" in line
    )
    (warning,) = [line for line in text.splitlines() if line.startswith("**")]
    assert "v4-a4" in warning and "Validation data differ" in warning
    assert not re.search(r"<(img|script)", text)


def entry(experiment, seed: int = 0, counts: int = 8, sha256: str | None = None, label: str = "run", **data) -> Entry:
    """A run of an experiment that was measured on data of its own."""
    data = replace(experiment.data, **data)
    held = {"data": {"validation": dict.fromkeys(("documents", "tokens", "bytes"), counts)}, "validation_sha256": sha256}
    evaluation = dict(event="eval", step=0, val_loss=5.0, layers=[])
    return Entry(Run(seed, Path("-"), replace(experiment, seed=seed, data=data), held, [evaluation]), label)


def test_validation_data_are_told_apart(report):
    experiment = read_run(report / "runs/some/seed_0").experiment
    texts = dict(name="text", path="/A")

    def sets(*entries: Entry) -> list[int]:
        differing = sort_by_data(list(entries))
        assert len(differing) == (0 if len({entry.data for entry in entries}) == 1 else len({e.data for e in entries}))
        return [entry.data for entry in entries]

    stories = entry(experiment)
    assert sets(stories, entry(experiment, 7, 9)) == [0, 0], "stories are others for each seed"
    assert sets(stories, entry(experiment, 0, 9)) == [0, 1]
    assert sets(stories, entry(experiment, 7, 8, val_documents=3)) == [0, 1], "another number of stories"
    assert sets(stories, entry(experiment, 7, 9, name="tinystories")) == [0, 1], "another source"
    assert sets(entry(experiment, 0, sha256="aa"), entry(experiment, 1, sha256="bb")) == [0, 0]
    assert sets(entry(experiment, 0, sha256="aa"), entry(experiment, 0, sha256="bb")) == [0, 1]
    assert sets(entry(experiment, 0, **texts), entry(experiment, 1, **texts)) == [0, 0]
    assert sets(entry(experiment, 0, **texts), entry(experiment, 1, **texts | {"path": "/B"})) == [0, 1]
    assert sets(entry(experiment, 0, **texts), entry(experiment, 1, 9, **texts)) == [0, 1]
    moved = entry(experiment, 1, sha256="aa", **texts | {"path": "/B"})
    assert sets(entry(experiment, 0, sha256="aa", **texts), moved) == [0, 0], "the same data elsewhere"
    assert sets(entry(experiment, 0, sha256="bb", **texts), moved) == [0, 1]

    apart = [entry(experiment, 0, label="x_seed0", **texts), entry(experiment, 1, label="x_seed1", **texts | {"path": "/B"})]
    assert any("seed 1: text /B, 8 documents" in line for line in sort_by_data(apart))
    assert [variant.name for variant in variants(apart)] == ["x", "x_seed1"], "no mean over what does not compare"
    rates = [replace(experiment, train=replace(experiment.train, learning_rate=rate)) for rate in (1e-3, 2e-3, 3e-3)]
    labelled = [
        entry(*pair, label=label) for pair, label in zip(zip(rates), ("base_seed1", "base", "base_seed1"), strict=True)
    ]
    assert [variant.name for variant in variants(labelled)] == ["base", "base (2)", "base_seed1"]


def test_published_losses_stand_beside_published_settings_only(report):
    row = Entry(read_run(report / "runs/v4-a4"), "v4-a4").values
    assert row["published_loss"] is None and "model.d_model" in row["changed"]
    published = load_experiment("v4-a4", ["seed=3"])
    row = Entry(Run(3, Path("-"), published), "v4-a4").values
    assert row["published_loss"] == published_results("v4-a4").epochs[-1].val_loss and row["changed"] is None


def test_a_jump_of_one_step_is_not_thinned_away(report):
    run = read_run(report / "runs/some/seed_0")
    moves = [dict(event="train", step=step, loss=1.0, key_movement=[0.1, 0.2]) for step in range(1, 5001)]
    moves[3332]["key_movement"] = [0.1, 9.5]
    run.records = [*moves, *run.evals]
    run.__dict__.pop("evals", None)
    measure = routing(run, False)["measures"]["key_movement"]
    assert measure["records"] == 5000 and len(measure["steps"]) == MOST_EVALUATIONS and measure["steps"][-1] == 5000
    assert sum(value == 9.5 for _, value in measure["values"]) == 1 and {value for value, _ in measure["values"]} == {0.1}


CONFIG = """name: damaged
run: {git_commit: abc, device: cpu, world_size: 1, data: {validation: {documents: 8, tokens: 9, bytes: 10}}}
"""
DAMAGED_CONFIGS = [
    CONFIG.replace("run: {", "run: null\nrest: {"), "name: damaged\nrun:\n", CONFIG.replace("abc", "20260101"),
    re.sub(r"data: .*", "data: [1, 2]}", CONFIG), CONFIG.replace("documents: 8", "documents: many"), 3000 * "[", "[1, 2]",
    CONFIG.replace("world_size: 1", "world_size: 0"), re.sub(r"validation: .*", "validation: 3}}", CONFIG), "\x00", "",
]  # fmt: skip
DAMAGED_LINES = [
    '{"event": "train", "loss": 1, "step": %s}' % ("9" * 400), '{"event": "eval", "step": 6, "val_loss": 1, "layers": [1]}',
    '{"event": "start", "step": 0, "total_steps": 6, "world_size": null}', '{"event": "start", "step": 0, "world_size": 0}',
    '{"event": "train", "step": 6, "loss": 1, "tokens": %s}' % ("9" * 400), '{"event": "train", "step": 6, "loss": [1]}',
    '{"event": "train", "step": 6}', '{"event": "train", "step": -6, "loss": 1}', '{"event": "end", "step": 6}',
    '{"event": "eval", "step": 6, "val_loss": 1, "layers": [], "seconds": null}',
]  # fmt: skip


def test_a_damaged_run_has_a_row_whatever_is_in_it(report, tmp_path):
    whole = report / "runs/some/seed_0"
    for place, text in enumerate(DAMAGED_CONFIGS):
        folder = tmp_path / "runs" / f"config_{place}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
        (folder / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    for place, line in enumerate(DAMAGED_LINES):
        folder = tmp_path / "runs" / f"line_{place}"
        folder.mkdir()
        (folder / "config.yaml").write_text((whole / "config.yaml").read_text())
        (folder / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + line + "\n")
    (tmp_path / "runs/folder/metrics.jsonl").mkdir(parents=True)
    (tmp_path / "runs/folder/config.yaml").write_text(CONFIG)
    (tmp_path / "runs/note/failed.txt").mkdir(parents=True)
    (tmp_path / "runs/note/config.yaml").write_text(CONFIG)
    settings = Settings(plotly=report / "plotly.js", watts=1.0)
    write_report([tmp_path / "runs"], tmp_path / "report.html", settings)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        statuses = {row["run"]: row["status"] for row in csv.DictReader(file)}
    expected = {f"config_{place}": "unreadable" for place in range(len(DAMAGED_CONFIGS))}
    expected |= {f"line_{place}": "done" for place in range(len(DAMAGED_LINES))}
    assert statuses == expected | {"folder": "unreadable", "note": "unreadable"}
    text = (tmp_path / "report.md").read_text()
    for place in range(len(DAMAGED_LINES)):
        assert f"- Run line\\_{place}: lines that are no records 1" in text
    assert len(Watched(tmp_path / "runs").snapshots()) == len(expected) + 2, "and watching goes on"


def test_maps_by_umap_where_they_are_asked_for(report, tmp_path):
    pytest.importorskip("umap", reason="maps by UMAP need umap-learn: pip install '.[umap]'")
    settings = Settings(plotly=report / "plotly.js", umap=True)
    write_report([report / "runs/some/seed_0"], tmp_path / "report.html", settings)
    page = (tmp_path / "report.html").read_text()
    (run,) = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])["runs"]
    for layer in run["maps"]["layers"]:
        assert layer["projections"].keys() == {"PCA", "UMAP"}
        assert np.isfinite(np.array(layer["projections"]["UMAP"]["x"], dtype=float)).all()
        assert np.shape(layer["projections"]["UMAP"]["y"]) == (3, 8)
