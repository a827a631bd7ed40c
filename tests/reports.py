"""Runs for the tests of reports and for the page that the README shows: real ones of all kinds, and such as only go wrong.

python -m tests.reports docs/example_report.html          # trains the real ones for longer, and makes page and picture
python -m tests.reports docs/example_report.html --plotly plotly-cartesian.min.js
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.distributed import run_ranks
from tests.training import make_trainer, train

TINY = [
    "model.vocab_size=260", "model.d_model=16", "model.num_heads=2", "model.num_layers=2", "model.max_seq_len=32",
    "model.some.num_experts=8", "model.some.d_ffn=16", "model.some.top_k=2", "data.name=stories", "data.train_documents=40",
    "train.batch_size=8", "train.steps=6", "train.warmup_steps=0", "train.eval_every=2", "data.val_documents=1",
    "checkpoint.every=2", "checkpoint.keep=5", "sample.tokens=0", "log.tensorboard=false",
]  # fmt: skip
"""Six steps, and some hundred real tokens to validate on."""
EXAMPLE = [
    *TINY, "model.vocab_size=512", "model.d_model=32", "model.max_seq_len=64", "model.some.num_experts=16",
    "model.some.d_ffn=32", "data.train_documents=400", "data.val_documents=8", "train.batch_size=16", "train.steps=100",
    "train.eval_every=10", "checkpoint.every=25", "checkpoint.keep=4",
]  # fmt: skip
"""The same runs, long enough to look at."""


class Kind(NamedTuple):
    """A run to train."""

    status: str
    """What the report says of it."""
    settings: list[str]
    """Besides those of all."""
    experiment: str = "quickstart"
    """The experiment that it is made from."""
    part: float = 1
    """Of its steps, after which it is stopped."""


PUBLISHED = ["data.tokenizer_documents=null", "data.val_documents=8"]
REAL = {
    "some/seed_0": Kind("done", ["seed=0"]),
    "some/seed_1": Kind("done", ["seed=1"]),
    "some/seed_2": Kind("partial", ["seed=2"], part=2 / 3),
    "attention/seed_0": Kind("done", ["seed=0", "control=attention_only"]),
    "attention/seed_1": Kind("done", ["seed=1", "control=attention_only"]),
    "hash": Kind("done", ["control=hash_routing", "log.every=2"]),
    "v4-a4": Kind("done", PUBLISHED, "v4-a4"),
    "cmp-dense": Kind("done", [*PUBLISHED, "model.d_ffn=32"], "cmp-dense-tinystories"),
    "nan": Kind("diverged", ["train.learning_rate=1e-3", "faults.nan=step=3 count=999", "train.max_skipped=999"]),
    "diverged": Kind("diverged", ["train.learning_rate=3", "train.gradient_clipping=1000"]),
}
"""Name to how it is trained."""
HOSTILE = "<img src=x onerror=window.hacked=1> \"quoted\" 'single' a|b `c` *d* [e](f) &amp; " + 24 * "long"
ODD = {"running": "running", "empty": "empty", "unreadable": "unreadable", HOSTILE: "partial"}
"""Made by hand: run to the status that it has."""
STATUSES = {name: kind.status for name, kind in REAL.items()} | ODD


def make_runs(folder: Path) -> Path:
    """All of REAL, trained on one rank, and all of ODD, in `folder`/runs."""
    run_ranks(_train_all, 1, str(folder), TINY, seconds=300)
    runs = folder / "runs"
    for name in ODD:
        (runs / name).mkdir()
    lines = (runs / "some/seed_0/metrics.jsonl").read_text().splitlines()
    begun = [record for record in map(json.loads, lines) if record["step"] <= 4 and record["event"] != "end"]
    odd = [{"event": "rollback", "step": 4, "to": "</script><script>window.hacked=1</script>"}, {"event": "eval", "step": 4}]
    damage = b'\xff\xfe "\x00 not text\n[1, 2]\nnull\n' + 3000 * b"["
    for number, (name, records, rest) in enumerate(
        [("running", begun, b""), (HOSTILE, [*begun, *odd, {"event": 7}], damage)], start=1
    ):
        values = yaml.safe_load((runs / "some/seed_0/config.yaml").read_text())
        values["train"]["learning_rate"] = number / 1e5  # a variant of its own
        values["run"]["device"] = "<script>window.hacked=1</script>" if name == HOSTILE else "cpu"
        (runs / name / "config.yaml").write_text(yaml.safe_dump(values))
        text = "".join(json.dumps(record) + "\n" for record in records)
        (runs / name / "metrics.jsonl").write_bytes(text.encode() + rest)
    (runs / "unreadable/config.yaml").write_text("model: [1, 2")
    for path in (runs / HOSTILE).iterdir():  # silent for longer than any run may be
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    return runs


def _train_all(rank: int, folder: str, settings: list[str]) -> None:
    for name, kind in REAL.items():
        own = [*settings, *kind.settings, f"data.cache_dir={folder}/cache"]
        trainer = make_trainer(Path(folder) / "runs" / name, kind.experiment, own)
        train(trainer, round(kind.part * trainer.state.total_steps))


def main() -> None:
    """Train REAL for longer; write the page of it, and a picture of its beginning beside it."""
    from playwright.sync_api import sync_playwright

    from tools.report import Settings, write_report

    parser = argparse.ArgumentParser(prog="python -m tests.reports", description="The example page of the README.")
    parser.add_argument("output", type=Path, metavar="FILE.html")
    parser.add_argument("--plotly", type=Path, metavar="FILE", help="see tools/report.py")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_ranks(_train_all, 1, name, EXAMPLE, seconds=1800)
        (folder / "runs" / "empty").mkdir()
        runs = [folder / "runs" / name for name in (*REAL, "empty")]
        page = folder / "page" / "report.html"
        write_report(runs, page, Settings(baseline="attention", mixed_data=True, plotly=chosen.plotly, watts=100, price=1))
        shutil.copy(page, chosen.output)
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; the page is ours.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 1640})
        view.goto(chosen.output.resolve().as_uri())
        view.get_by_role("button", name="diverged").click()  # its losses are so high that the others would be one line
        view.wait_for_selector("#curve-chart .main-svg")
        view.evaluate("scrollTo(0, 0)")
        view.wait_for_timeout(1000)  # until it is drawn without that
        view.screenshot(path=chosen.output.with_suffix(".png"))
        browser.close()


if __name__ == "__main__":
    main()
