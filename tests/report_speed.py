"""How long the report of many long runs takes to make and to open: python -m tests.report_speed --runs 50 --steps 5000"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from tools.report import Settings, write_report
from trainer.config import load_experiment

LAYERS, EVALUATIONS = 4, 50


def make_run(folder: Path, number: int, steps: int) -> None:
    """A run of `steps` recorded steps, of a variant of its own for every five seeds."""
    folder.mkdir(parents=True)
    rates = [f"seed={number % 5}", f"train.learning_rate={(1 + number // 5) / 1e4}", "name=speed"]
    (folder / "config.yaml").write_text(yaml.safe_dump(load_experiment("quickstart", rates).to_dict() | {"run": {}}))
    draw = np.random.default_rng(number)
    losses = 3 + 4 * np.exp(-np.arange(steps) / (steps / 5)) + 0.05 * draw.standard_normal(steps)
    records = [{"event": "start", "step": 0, "total_steps": steps, "world_size": 2, "ep_size": 2, "precision": "bf16"}]
    for step, loss in enumerate(losses.tolist(), start=1):
        records.append(
            {"event": "train", "step": step, "epoch": step / 100, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "skipped": 0,
             "tokens": 4000 * step, "tokens_per_second": 8000.0, "seconds": 0.5, "key_movement": [0.01] * LAYERS}
        )  # fmt: skip
        if step % (steps // EVALUATIONS) == 0:
            counts = draw.integers(1, 1000, (LAYERS, 16)).tolist()
            layers = [
                {"layer": layer, "gini": 0.3, "entropy_bits": 3.5, "effective_experts": 11.3, "experts_used": 16,
                 "load_max_over_mean": 1.3, "output_over_residual": 0.1, "respawns": 0, "expert_counts": counts[layer]}
                for layer in range(LAYERS)
            ]  # fmt: skip
            records.append({"event": "eval", "step": step, "epoch": step / 100, "val_loss": loss + 0.1, "val_ppl": 30.0,
                            "val_tokens": 9000, "seconds": 2.0, "layers": layers})  # fmt: skip
    records.append({"event": "end", "step": steps, "finished": True})
    served = {"tokens": [[["␣token", 100]] * 5] * 16, "coselected": [[a, b, a + b] for a in range(16) for b in range(a)]}
    (folder / "experts.json").write_text(json.dumps({"step": steps, "layers": [served] * LAYERS}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def seconds_to_open(page: Path) -> list[tuple[float, float]]:
    """From the request until the page with its tables is there, and until the charts in sight are drawn; three times."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the page is ours.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(3):
            view = browser.new_page(viewport={"width": 1280, "height": 900})
            began = time.perf_counter()
            view.goto(page.as_uri())
            loaded = time.perf_counter() - began
            view.wait_for_selector("html[data-charts]")
            found.append((loaded, time.perf_counter() - began))
            view.close()
        browser.close()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.report_speed", description="Time the report of many long runs.")
    parser.add_argument("--runs", type=int, default=50, metavar="N")
    parser.add_argument("--steps", type=int, default=5000, metavar="N", help=f"of each run, at least {EVALUATIONS}")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(chosen.runs):
            make_run(folder / "runs" / f"run_{number:03}", number, chosen.steps)
        began = time.perf_counter()
        write_report([folder / "runs"], folder / "report.html", Settings())
        made, size = time.perf_counter() - began, (folder / "report.html").stat().st_size
        loaded, drawn = zip(*seconds_to_open(folder / "report.html"), strict=True)
    print(f"{chosen.runs} runs of {chosen.steps:,} steps: made in {made:.1f} s, {size / 1e6:.1f} MB")
    for what, times in (("loaded", loaded), ("charts drawn", drawn)):
        print(f"{what} after {', '.join(f'{seconds:.2f}' for seconds in times)} s")


if __name__ == "__main__":
    main()
