"""The report's page in a real browser, opened from a file and without a network."""

import csv
import functools
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from tests.reports import HOSTILE, REAL, STATUSES
from tools.report import Settings, write_report
from tools.reporting.compare import comparison, sort_by_data, variants
from tools.reporting.table import Entry
from tools.runs import read_run
from tools.serve import Page, Server
from tools.snapshots import Watched

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
AXE = "axe-core@4"

pytest.importorskip("plotly", reason="the page needs plotly: pip install -e '.[report]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="tests of pages need playwright: pip install -e '.[dev]'")
if CHROMIUM is None:
    pytest.skip("tests of pages need Debian's package chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def report(report_runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([report_runs / name for name in STATUSES], path, Settings(baseline="attention", mixed_data=True))
    return path


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # As root Chromium has no sandbox; the page comes from this test.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, report):
    """Opens the page; at the end of the test nothing may have gone wrong in it, or been asked of a network."""
    complaints, contexts = [], []

    def open_it(viewport=WIDE, scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-charts]")
        return page

    yield open_it
    for context in contexts:
        assert context.pages[0].evaluate("window.hacked") is None
        context.close()
    assert complaints == []


@pytest.fixture
def open_long_page(browser, report_runs, tmp_path):
    """A page of a run of 1,000 steps and a seed of it that is at 400, and the losses of both."""
    losses = []
    for seed, length in enumerate((1000, 400)):
        folder = tmp_path / "long" / f"seed_{seed}"
        folder.mkdir(parents=True)
        text = (report_runs / f"some/seed_{seed}/config.yaml").read_text()
        (folder / "config.yaml").write_text(text)
        start = dict(event="start", step=0, total_steps=1000, world_size=1)
        losses.append([5 + (7 * step + seed) % 11 / 10 for step in range(1, length + 1)])
        train = [dict(event="train", step=step, loss=loss, seconds=1.0) for step, loss in enumerate(losses[-1], start=1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [start, *train]))
    write_report([tmp_path / "long"], tmp_path / "long.html", Settings())
    page = browser.new_page(viewport=WIDE)
    page.goto((tmp_path / "long.html").as_uri())
    page.wait_for_selector("html[data-charts]")
    yield page, losses
    page.close()


def column(page, table: str, place: int) -> list[str]:
    """The texts of a column."""
    return page.locator(f"#{table} tbody tr > :nth-child({place + 1})").all_inner_texts()


def drawn(page, chart: str) -> list[dict]:
    """The traces of a chart, as it was drawn last."""
    page.locator(f"#{chart}").scroll_into_view_if_needed()
    page.wait_for_selector(f"#{chart} .main-svg, #{chart} .empty")
    return page.evaluate(f"JSON.parse(JSON.stringify(document.getElementById('{chart}').data ?? []))")


def test_every_header_sorts_both_ways_with_missing_values_last(open_page):
    page = open_page()
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDE["width"]
    for table in ("run-table", "compare-table", "best-table", "speed-table", "cost-table"):
        for place, header in enumerate(page.locator(f"#{table} thead th").all()):
            # Away from the column first, so that it begins anew.
            page.locator(f"#{table} thead button").nth(1 if place == 0 else 0).click()
            for direction in ("ascending", "descending"):
                button = header.locator("button")
                button.focus()
                page.keyboard.press("Enter")
                header = page.locator(f"#{table} thead th").nth(place)
                button = header.locator("button")
                assert header.get_attribute("aria-sort") == direction
                assert button.evaluate("node => node === document.activeElement")
                texts = column(page, table, place)
                held = [text for text in texts if text]
                assert texts == held + [""] * (len(texts) - len(held)), (table, place)
                if "number" in (header.get_attribute("class") or ""):
                    values = [float(text.split()[0].replace(",", "").replace("−", "-")) for text in held]
                    assert values == sorted(values, reverse=direction == "descending"), (table, place)
                elif direction == "ascending":
                    ascending = held
                else:
                    assert held == ascending[::-1], (table, place)
    page.locator("#run-table thead button").first.click()
    names = [name.split(" (")[0] for name in column(page, "run-table", 0) if not name.startswith("<")]
    assert names == sorted(STATUSES.keys() - {HOSTILE})


def test_filters_choose_what_all_sections_show(open_page):
    page = open_page()
    everything = column(page, "run-table", 0)
    assert len(everything) == len(STATUSES)
    page.fill("#filter", "attention_only")
    assert [name.split(" (")[0] for name in sorted(column(page, "run-table", 0))] == [f"attention/seed_{i}" for i in (0, 1)]
    assert page.inner_text("#count") == f"2 of {len(everything)} runs"
    assert column(page, "compare-table", 0) == ["attention (baseline)"]
    assert {trace["legendgroup"] for trace in drawn(page, "curve-chart")} == {"attention"}
    page.fill("#filter", "")
    page.select_option("#status", "diverged")
    assert sorted(column(page, "run-table", 0)) == ["diverged", "nan"]
    page.select_option("#status", "")
    page.select_option("#family", "SoME")
    families = {"attention only": 2, "dense": 1, "": 2}  # nothing is known of the empty and the unreadable
    assert len(column(page, "run-table", 0)) == len(STATUSES) - sum(families.values())
    page.get_by_text("Columns", exact=True).first.click()
    before = page.locator("#run-table thead th").count()
    page.locator("#columns input[name=d_ffn]").check()
    assert page.locator("#run-table thead th").count() == before + 1


def test_table_and_download_are_those_of_the_files(open_page, report):
    page = open_page()
    with open(report.with_name("results.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [name.split(" (base")[0] for name in column(page, "run-table", 0)] == [
        " ".join(row["run"].split()) for row in rows
    ]
    labels = page.locator("#run-table thead th").all_inner_texts()
    shown = column(page, "run-table", [label.split(" ▲")[0] for label in labels].index("Best loss"))
    assert shown == [row["best_val_loss"] and f"{float(row['best_val_loss']):.4f}" for row in rows]
    with page.expect_download() as download:
        page.click("#download")
    with open(download.value.path(), newline="") as ours, open(report.with_name("results.csv"), newline="") as theirs:
        for row, expected in zip(csv.reader(ours), csv.reader(theirs), strict=True):
            assert row == expected or [same(*pair) for pair in zip(row, expected, strict=True)] == [True] * len(row)


def same(one: str, other: str) -> bool:
    return one == other or float(one) == float(other)


def test_comparison_equals_that_of_python(open_page, report_runs):
    page = open_page()
    entries = [Entry(read_run(report_runs / name), name) for name in REAL]
    sort_by_data(entries)
    found = [variant for variant in variants(entries) if variant.name in ("some", "attention")]
    page.fill("#filter", "seed_")
    for baseline in ("attention", "some"):
        page.select_option("#baseline", baseline)
        for step in (2, 6):
            page.select_option("#budget", str(step))
            expected = comparison(found, next(variant for variant in found if variant.name == baseline), step)
            assert [name.split(" (")[0] for name in column(page, "compare-table", 0)] == [row["name"] for row in expected]
            for place, key in ((3, "mean"), (4, "low"), (5, "high"), (8, "half")):
                figures = [row[key] for row in expected]
                assert column(page, "compare-table", place) == ["" if v is None else f"{v:.4f}" for v in figures]
            differences = [row["difference"] for row in expected]
            assert column(page, "compare-table", 7) == ["" if v is None else f"{v:+.4f}" for v in differences]
    page.select_option("#budget", "2")
    page.locator("#filter").press_sequentially("hash")
    assert page.input_value("#budget") == "2", "what was chosen stays"
    page.fill("#filter", "")
    runs = {name: read_run(report_runs / name) for name in REAL}
    rows = page.locator("#best-table tbody tr").all()
    assert len(rows) == len(STATUSES)
    for row in rows:
        name, best, at, last, step, _ = row.locator("th, td").all_inner_texts()
        if name in runs:
            losses = {record["step"]: record["val_loss"] for record in runs[name].evals if record["step"] <= 2}
            assert (last, step) == (f"{losses[2]:.4f}", "2") and best == f"{min(losses.values()):.4f}"
    for row in page.locator("#speed-table tbody tr").all():
        name, _, rate, *_ = row.locator("th, td").all_inner_texts()
        if name in runs:
            rates = [record["tokens_per_second"] for record in runs[name].of("train") if record["step"] <= 2]
            assert float(rate.replace(",", "")) == pytest.approx(sum(rates) / len(rates), abs=0.6), (
                "the median of one or two"
            )
    bars = drawn(page, "best-chart")[0]
    variant = {
        name: min(run.evals[i]["val_loss"] for run in members for i in (0, 1))
        for name, members in {"some": [runs[f"some/seed_{seed}"] for seed in range(3)], "hash": [runs["hash"]]}.items()
    }
    for name, best in variant.items():
        place = next(i for i, text in enumerate(bars["meta"]) if text.startswith(f"<b>{name}</b>"))
        assert bars["x"][place] == best


def test_curves_show_the_records(open_page, report_runs):
    page = open_page()
    page.select_option("#curve-seeds", "each")
    traces = {trace["meta"]: trace for trace in drawn(page, "curve-chart")}
    run = read_run(report_runs / "some/seed_1")
    losses = [record["val_loss"] for record in run.evals]
    assert traces["some/seed_1"]["x"] == [0, 2, 4, 6] and traces["some/seed_1"]["y"] == losses
    assert traces["some/seed_1"]["customdata"] == losses and "%{customdata}<" in traces["some/seed_1"]["hovertemplate"]
    page.select_option("#curve-split", "train")
    traces = {trace["meta"]: trace for trace in drawn(page, "curve-chart")}
    assert [y is None for y in traces["nan"]["y"]] == [False, False, True, True, True, True], "a gap, and no zero"
    page.select_option("#curve-x", "tokens")
    page.select_option("#curve-measure", "ppl")
    page.check("#curve-log")
    traces = {trace["meta"]: trace for trace in drawn(page, "curve-chart")}
    train = run.of("train")
    assert traces["some/seed_1"]["x"] == [record["tokens"] for record in train]
    assert traces["some/seed_1"]["y"] == pytest.approx([2.718281828459045 ** record["loss"] for record in train], rel=1e-6)
    assert page.evaluate("document.getElementById('curve-chart').layout.yaxis.type") == "log"
    page.uncheck("#curve-log")
    assert page.evaluate("document.getElementById('curve-chart').layout.yaxis.type") == "linear"

    page.select_option("#curve-measure", "loss")
    page.select_option("#curve-seeds", "band")
    page.select_option("#curve-x", "step")
    _, mean = [trace for trace in drawn(page, "curve-chart") if trace["legendgroup"] == "some"]
    runs = [read_run(report_runs / f"some/seed_{seed}").of("train") for seed in range(3)]
    assert mean["x"] == [1, 2, 3, 4, 5, 6] and mean["text"] == ["3", "3", "3", "3", "2", "2"], "one was stopped at step 4"
    assert "mean of %{text}" in mean["hovertemplate"]
    for i in range(6):
        losses = [run[i]["loss"] for run in runs if i < len(run)]
        assert mean["y"][i] == pytest.approx(sum(losses) / len(losses))


def test_means_over_seeds(open_page):
    """Over those that are there, and none where one of them is not finite."""
    page = open_page()
    one = {"steps": [0, 10, 20, 30, 40], "x": [0, 10, 20, 30, 40], "y": [5, 4, 3, 2, 1]}
    # At step 33 it was stopped, where the other was not measured.
    two = {"steps": [0, 10, 20, 30, 33], "x": [0, 12, 22, 32, 35], "y": [7, 5, None, 4, 3]}
    three = {"steps": [0], "x": [0], "y": [9]}
    joined = page.evaluate("curves => band(curves)", [one, two, three])
    assert joined == {
        "x": [0, 11, 21, 31, 40], "mean": [7, 4.5, None, 3, 1], "low": [5, 4, None, 2, 1], "high": [9, 5, None, 4, 1],
        "count": [3, 2, 2, 2, 1],
    }  # fmt: skip
    assert page.evaluate("joined => filled(joined)", joined) == {
        "x": [0, 11, 11, 0, None, 31, 40, 40, 31, None], "y": [9, 5, 4, 5, None, 4, 1, 1, 2, None],
    }  # fmt: skip


def test_means_of_long_curves_are_those_of_equal_stretches(open_long_page):
    """Seeds of 1,000 and 400 of 1,000 steps: of the first the curve is thinned, of both the stretches are the same."""
    page, losses = open_long_page
    page.select_option("#curve-split", "train")
    _, mean = drawn(page, "curve-chart")
    assert mean["text"] == ["2"] * 133 + ["2"] + ["1"] * 200 and mean["x"][:3] == [2, 5, 8]
    for place, value in enumerate(mean["y"]):
        parts = [seed[3 * place : 3 * place + 3] for seed in losses]
        means = [sum(part) / len(part) for part in parts if part]
        assert value == pytest.approx(sum(means) / len(means), rel=1e-6)
    page.select_option("#curve-seeds", "each")
    whole = next(trace for trace in drawn(page, "curve-chart") if trace["meta"] == "seed_0")
    assert len(whole["x"]) < 1000 and max(losses[0]) == max(whole["y"]), "no extreme is lost"


def test_smoothing_and_the_legend(open_page, report_runs):
    page = open_page()
    page.select_option("#curve-split", "train")
    page.select_option("#curve-seeds", "each")
    page.locator("#curve-smoothing").fill("0.5")
    trace = next(trace for trace in drawn(page, "curve-chart") if trace["meta"] == "some/seed_0")
    average, mass, expected = 0.0, 0.0, []
    for record in read_run(report_runs / "some/seed_0").of("train"):
        average, mass = 0.5 * average + 0.5 * record["loss"], 0.5 * mass + 0.5
        expected.append(average / mass)
    assert trace["y"] == pytest.approx(expected)
    lines, legend = page.locator("#curve-chart .scatterlayer .trace"), page.locator("#curve-chart-legend")
    before = lines.count()
    button = legend.get_by_role("button", name="some/seed_0")
    button.focus()
    page.keyboard.press("Enter")
    sync_api.expect(lines).to_have_count(before - 1)
    assert button.get_attribute("aria-pressed") == "false" and button.evaluate("node => node === document.activeElement")
    page.check("#curve-log")
    page.select_option("#curve-x", "tokens")
    hidden = [trace["meta"] for trace in drawn(page, "curve-chart") if trace["visible"] is False]
    assert hidden == ["some/seed_0"], "what is hidden stays hidden"
    button.focus()
    page.keyboard.press("Space")
    sync_api.expect(lines).to_have_count(before)
    legend.get_by_role("button", name="hide all").click()
    legend.get_by_role("button", name="nan", exact=True).click()
    assert [trace["meta"] for trace in drawn(page, "curve-chart") if trace["visible"] is not False] == ["nan"]


def test_sliders_and_maps(open_page, report_runs):
    page = open_page()
    name = next(name for name in page.locator("#map-run option").all_inner_texts() if name.startswith("some/"))
    page.select_option("#map-run", label=name)
    run = read_run(report_runs / name)
    assert drawn(page, "map-chart")[0]["x"] and page.inner_text("#map-step-value") == "6"
    last = drawn(page, "map-chart")[0]["x"]
    page.locator("#map-step").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#map-step-value") == "2" and drawn(page, "map-chart")[0]["x"] != last
    found = json.loads((report_runs / name / "experts.json").read_text())
    for layer in (0, 1):
        page.select_option("#map-layer", str(layer))
        for text, tokens in zip(drawn(page, "map-chart")[0]["text"], found["layers"][layer]["tokens"], strict=True):
            assert "nearest" in text
            named = text.split("<br>serves ")[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            assert named == (" · ".join(f"{token} {count}" for token, count in tokens) or "no validation token")
    assert "evaluation at step 6." in page.inner_text("#map-note") and found["step"] == 6
    page.select_option("#routing-run", label=name)
    heat = drawn(page, "routing-chart")[0]
    assert heat["z"] == [
        pytest.approx([record["layers"][layer]["gini"] for record in run.evals], rel=1e-3) for layer in range(2)
    ]
    page.select_option("#routing-measure", "key_movement")
    assert drawn(page, "routing-chart")[0]["x"] == [1, 2, 3, 4, 5, 6]
    page.uncheck("#usage-log")
    for key, evaluation in (("Home", run.evals[0]), ("End", run.evals[-1])):
        page.locator("#usage-step").focus()
        page.keyboard.press(key)
        counts = [layer["expert_counts"] for layer in evaluation["layers"]]
        assert drawn(page, "usage-map")[0]["z"] == counts
        assert drawn(page, "usage-histogram")[0]["x"] == counts[0]
    page.select_option("#usage-layer", "1")
    pairs = found["layers"][1]["coselected"]
    assert column(page, "pair-table", 0) == [f"{left} and {right}" for left, right, _ in pairs]
    chart = drawn(page, "pair-chart")[0]
    found = {(*sorted(place), tokens) for *place, tokens in zip(chart["x"], chart["y"], chart["customdata"], strict=True)}
    assert found == {tuple(pair) for pair in pairs} and len(chart["x"]) == 2 * len(pairs), "both sides of the diagonal"


def test_hostile_names_are_text(open_page):
    page = open_page()
    name = " ".join(HOSTILE.split())
    assert name in column(page, "run-table", 0)
    page.select_option("#curve-seeds", "each")
    shown = [trace[key] for trace in drawn(page, "curve-chart") for key in ("name", "meta")]
    assert any("&lt;img" in text for text in shown) and not any("<img" in text for text in shown)
    assert page.locator("main img").count() == 0
    row = page.locator("#run-table tr", has_text="quoted")
    row.locator("summary").click()
    assert "to step </script><script>" in row.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(open_page, scheme):
    page = open_page(NARROW, scheme)
    for chart in ("curve-chart", "compare-chart", "routing-chart", "map-chart", "cost-chart"):
        drawn(page, chart)
        assert page.locator(f"#{chart}").bounding_box()["width"] <= NARROW["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_what_a_reader_did_outlasts_the_reload_of_a_served_page(browser, report, report_runs):
    with Server(Page(Watched(report_runs), lambda folders: report.read_text(), 0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = browser.new_page(viewport=WIDE)
        try:
            page.goto(server.url)
            page.wait_for_selector("html[data-charts]")
            page.fill("#filter", "seed_")
            page.get_by_text("Columns", exact=True).first.click()
            page.locator("#columns input[name=d_ffn]").check()
            page.locator("#run-table thead button[data-key=seed]").click()
            page.select_option("#budget", "2")
            page.select_option("#usage-layer", "1")
            page.locator("#usage-step").focus()
            page.keyboard.press("Home")
            drawn(page, "curve-chart")
            page.locator("#curve-chart-legend").get_by_role("button", name="attention").click()
            order = column(page, "run-table", 0)
            page.reload()
            page.wait_for_selector("html[data-charts]")
            assert page.input_value("#filter") == "seed_" and column(page, "run-table", 0) == order
            assert page.locator("#run-table th[aria-sort] button").get_attribute("data-key") == "seed"
            assert page.locator("#run-table thead button[data-key=d_ffn]").count() == 1
            assert page.input_value("#budget") == "2" and page.input_value("#usage-layer") == "1"
            assert page.inner_text("#usage-step-value") == "0"
            hidden = {trace["legendgroup"] for trace in drawn(page, "curve-chart") if trace["visible"] is False}
            assert hidden == {"attention"}
        finally:
            page.close()
            server.shutdown()
            thread.join()


@functools.cache
def axe(folder: Path) -> str:
    """The code of axe-core, from the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("the accessibility check needs npm, to fetch axe-core")
    fetched = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"the accessibility check needs {AXE} from the npm registry")
    subprocess.run(["tar", "xzf", fetched.stdout.strip()], cwd=folder, check=True)
    return (folder / "package" / "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_anybody_from_reading_it(open_page, cache_dir, scheme):
    page = open_page(scheme=scheme)
    for chart in ("curve-chart", "compare-chart", "routing-chart", "map-chart", "cost-chart"):
        drawn(page, chart)
    page.evaluate(axe(cache_dir))
    # Only colours differ in the dark.
    rules = {} if scheme == "light" else {"runOnly": ["color-contrast"]}
    violations = page.evaluate("rules => axe.run(rules)", rules)["violations"]
    assert [(violation["id"], [node["html"][:200] for node in violation["nodes"]]) for violation in violations] == []


def test_its_speed_can_be_told():
    command = [sys.executable, "-m", "tests.report_speed", "--runs", "2", "--steps", "60"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made, loaded, drawn = done.stdout.splitlines()
    assert made.startswith("2 runs of 60 steps: made in ")
    assert [line.rpartition(" after ")[0] for line in (loaded, drawn)] == ["loaded", "charts drawn"]
