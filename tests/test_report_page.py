"""The report's page in a real browser, opened from a file and without a network."""

import csv
import functools
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.reports import HOSTILE, ODD, REAL
from tools.report import Settings, write_report
from tools.reporting.compare import comparison, variants
from tools.reporting.table import Entry
from tools.runs import read_run

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
    write_report([report_runs / name for name in (*REAL, *ODD)], path, Settings(baseline="attention"))
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
            button = header.locator("button")
            if header.get_attribute("aria-sort") is not None:
                button.click()
                button.click()
            for direction in ("ascending", "descending"):
                button.focus()
                page.keyboard.press("Enter")
                header = page.locator(f"#{table} thead th").nth(place)
                button = header.locator("button")
                assert header.get_attribute("aria-sort") in ("ascending", "descending")
                assert button.evaluate("node => node === document.activeElement")
                direction = header.get_attribute("aria-sort")
                texts = column(page, table, place)
                held = [text for text in texts if text]
                assert texts == held + [""] * (len(texts) - len(held)), (table, place)
                if "number" in (header.get_attribute("class") or ""):
                    values = [float(text.split()[0].replace(",", "").replace("−", "-")) for text in held]
                    assert values == sorted(values, reverse=direction == "descending"), (table, place)


def test_filters_choose_what_all_sections_show(open_page):
    page = open_page()
    everything = column(page, "run-table", 0)
    assert len(everything) == len(REAL) + len(ODD)
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
    assert len(column(page, "run-table", 0)) == len(REAL) + len(ODD) - 4
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
    found = variants(entries)
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


def test_curves_show_the_records(open_page, report_runs):
    page = open_page()
    page.select_option("#curve-seeds", "each")
    traces = {trace["meta"]: trace for trace in drawn(page, "curve-chart")}
    run = read_run(report_runs / "some/seed_1")
    losses = [record["val_loss"] for record in run.evals]
    assert traces["some/seed_1"]["x"] == [0, 2, 4, 6] and traces["some/seed_1"]["y"] == pytest.approx(losses)
    assert [y is None for y in traces["nan"]["y"]] == [False, False, True, True], "a gap, and no zero"
    page.select_option("#curve-split", "train")
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
    low, high, mean = [trace for trace in drawn(page, "curve-chart") if trace["legendgroup"] == "some"]
    both = [[r["loss"] for r in read_run(report_runs / name).of("train")] for name in ("some/seed_0", "some/seed_1")]
    page.select_option("#curve-x", "step")
    low, high, mean = [trace for trace in drawn(page, "curve-chart") if trace["legendgroup"] == "some"]
    for i, pair in enumerate(zip(*both, strict=True)):
        assert (low["y"][i], high["y"][i], mean["y"][i]) == pytest.approx((min(pair), max(pair), sum(pair) / 2))


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
    lines = page.locator("#curve-chart .scatterlayer .trace")
    before = lines.count()
    page.locator("#curve-chart .legendtoggle").first.click()
    sync_api.expect(lines).to_have_count(before - 1)
    page.locator("#curve-chart .legendtoggle").first.click()
    sync_api.expect(lines).to_have_count(before)


def test_sliders_and_maps(open_page, report_runs):
    page = open_page()
    name = page.locator("#map-run option").first.inner_text()
    run = read_run(report_runs / name)
    assert drawn(page, "map-chart")[0]["x"] and page.inner_text("#map-step-value") == "6"
    last = drawn(page, "map-chart")[0]["x"]
    page.locator("#map-step").focus()
    page.keyboard.press("Home")
    assert page.inner_text("#map-step-value") == "2" and drawn(page, "map-chart")[0]["x"] != last
    assert "nearest" in drawn(page, "map-chart")[0]["text"][0]
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
    pairs = run.evals[-1]["layers"][1]["coselected"]
    assert column(page, "pair-table", 0) == [f"{left} and {right}" for left, right, _ in pairs]


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
