"""Charts show the records, and answer to sliders, legends and switches."""

import json

import pytest

from tests.page.reading import column, drawn
from tools.runs import read_run


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
    from playwright.sync_api import expect

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
    expect(lines).to_have_count(before - 1)
    assert button.get_attribute("aria-pressed") == "false" and button.evaluate("node => node === document.activeElement")
    page.check("#curve-log")
    page.select_option("#curve-x", "tokens")
    hidden = [trace["meta"] for trace in drawn(page, "curve-chart") if trace["visible"] is False]
    assert hidden == ["some/seed_0"], "what is hidden stays hidden"
    button.focus()
    page.keyboard.press("Space")
    expect(lines).to_have_count(before)
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
