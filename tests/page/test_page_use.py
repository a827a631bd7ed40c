"""The page on a phone, reloaded, for everybody, and its speed."""

import functools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from tests.page.reading import NARROW, PATIENCE, WIDE, column, drawn
from tools.serve import Page, Server
from tools.snapshots import Watched

AXE = "axe-core@4"


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
        page.set_default_timeout(PATIENCE)
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


def test_its_speed_can_be_told(browser):
    command = [sys.executable, "-m", "tests.report_speed", "--runs", "2", "--steps", "60"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr
    made, loaded, drawn = done.stdout.splitlines()
    assert made.startswith("2 runs of 60 steps: made in ")
    assert [line.rpartition(" after ")[0] for line in (loaded, drawn)] == ["loaded", "charts drawn"]
