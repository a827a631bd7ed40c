"""Reports: what is read from runs in any state, and that page, CSV and Markdown say the same."""

import csv
import html
import json
import re
import statistics

import numpy as np
import pytest

from tests.reports import HOSTILE, ODD, REAL
from tools.report import Settings, find_runs, main, write_report
from tools.reporting import curves
from tools.reporting.curves import extremes, number
from tools.reporting.health import WINDOW, _running_median
from tools.reporting.page import embedded_json
from tools.runs import read_run
from tools.study import paired

LIBRARY = "window.Plotly = {};</script><!-- <script>"


@pytest.fixture(scope="module")
def report(report_runs):
    folder, runs = report_runs.parent, report_runs
    (folder / "plotly.js").write_text(LIBRARY)
    chosen = [runs / name for name in (*REAL, *ODD)]
    settings = Settings(baseline="attention", plotly=folder / "plotly.js", watts=100.0, price=2.0)
    assert write_report(chosen, folder / "out" / "report.html", settings) == len(REAL) + len(ODD)
    return folder


@pytest.fixture(scope="module")
def data(report):
    page = (report / "out/report.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def cells(data: dict) -> dict[str, dict]:
    return {run["cells"]["run"][0]: run["cells"] for run in data["runs"]}


def test_every_run_has_a_row_with_its_status(report, data):
    found = cells(data)
    assert {name: found[name]["status"][0] for name in found} == dict.fromkeys(REAL, "done") | ODD
    for name in REAL:
        run, row = read_run(report / "runs" / name), found[name]
        losses = [record["val_loss"] for record in run.evals]
        assert row["best_val_loss"][0] == min(losses) and row["final_val_loss"][0] == losses[-1]
        assert row["best_val_ppl"][1] == f"{np.exp(min(losses)):,.2f}" and row["step"][0] == 6
        assert row["tokens_per_second"][0] == statistics.median(r["tokens_per_second"] for r in run.of("train"))
        assert row["family"][0] == ("SoME" if name.startswith("some") else "attention only")
        layers = run.evals[-1]["layers"]
        assert row["gini"][0] == (pytest.approx(statistics.fmean(layer["gini"] for layer in layers)) if layers else None)
    losses = [run["cells"]["best_val_loss"][0] for run in data["runs"]]
    known = [loss for loss in losses if loss is not None]
    assert losses == sorted(known) + [None] * (len(losses) - len(known)), "best first, missing last"


def test_what_went_wrong_is_listed(data):
    listed = {run["cells"]["run"][0]: "; ".join(run["anomalies"]) for run in data["runs"]}
    assert "not finite: loss (steps 4 to 6)" in listed["nan"] and "validation loss (step 6)" in listed["nan"]
    assert "lines that are no records 1" in listed["partial"]
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
    assert [run["cells"]["tag"][0] for run in held] == ["some"]
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


def test_cost_follows_from_the_records(report, data):
    row = {row["run"][0]: row for row in data["costs"]}["some/seed_0"]
    run = read_run(report / "runs/some/seed_0")
    seconds = run.seconds + sum(record["seconds"] for record in run.of("checkpoint"))
    assert row["rank_hours"][0] == pytest.approx(seconds / 3600)
    assert row["kwh"][0] == pytest.approx(row["rank_hours"][0] / 10) and row["price"][0] == 2 * row["rank_hours"][0]
    flops = run.experiment.model.num_flops_per_token(32)
    assert row["tflop"][0] == pytest.approx(flops * run.of("train")[-1]["tokens"] / 1e12)


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


def test_the_running_median_is_that_of_each_window():
    values = np.random.default_rng(1).normal(size=200)
    values[[3, 4, 90, 199]] = np.nan
    values[110:170] = np.nan
    for i, median in enumerate(_running_median(values)):
        window = values[max(0, i - WINDOW // 2) : i + WINDOW // 2 + 1]
        finite = window[np.isfinite(window)]
        assert median == pytest.approx(np.median(finite)) if len(finite) >= 5 else np.isnan(median)


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
    assert {str(path.relative_to(report / "runs")) for path in found} == {*REAL, *ODD} - {"empty"}
    some = str(report / "runs/some/seed_0")
    other = tmp_path / "other"
    other.mkdir()
    config = (report / "runs/some/seed_0/config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"(validation:\n +documents: )8", r"\g<1>9", config))
    (other / "metrics.jsonl").write_text((report / "runs/some/seed_0/metrics.jsonl").read_text())
    library = ["--plotly", str(report / "plotly.js"), "-o", str(tmp_path / "r.html")]
    for arguments, message in (
        ([str(tmp_path / "none"), *library], "no such folder"),
        ([some, *library, "--baseline", "nobody"], "--baseline nobody: no such variant; there are "),
        ([some, str(other), *library], "different validation data"),
        ([some, "--plotly", str(tmp_path / "none.js")], "cannot be read"),
        ([some, *library[:2], "-o", str(report / "plotly.js/r.html")], "cannot be written"),
    ):
        assert refusal(arguments, capsys).count(message) == 1
    assert not (tmp_path / "r.html").exists()
    main([some, str(other), *library, "--mixed_data"])
    assert "Validation data differ" in (tmp_path / "r.md").with_name("report.md").read_text()
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    assert "pip install plotly" in refusal([some], capsys)


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error
