"""Tables sort, filter, download and say what the files and Python say."""

import csv

import pytest

from tests.page.reading import WIDE, column, drawn
from tests.reports import HOSTILE, REAL, STATUSES
from tools.reporting.compare import comparison, sort_by_data, variants
from tools.reporting.table import Entry
from tools.runs import read_run


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
