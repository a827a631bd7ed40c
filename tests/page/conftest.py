"""The page of the runs of `tests/reports.py`, and a browser."""

import json
import shutil
from pathlib import Path

import pytest

from tests.page.reading import PATIENCE, WIDE
from tests.reports import STATUSES
from tools.report import Settings, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="package")
def report(browser, report_runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([report_runs / name for name in STATUSES], path, Settings(baseline="attention", mixed_data=True))
    return path


@pytest.fixture(scope="package")
def browser():
    pytest.importorskip("plotly", reason="the page needs plotly: pip install -e '.[report]'")
    sync_api = pytest.importorskip("playwright.sync_api", reason="tests of pages need playwright: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("tests of pages need Debian's package chromium")
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
        context.set_default_timeout(PATIENCE)
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
    page.set_default_timeout(PATIENCE)
    page.goto((tmp_path / "long.html").as_uri())
    page.wait_for_selector("html[data-charts]")
    yield page, losses
    page.close()
