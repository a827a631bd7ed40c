"""Folders of runs for the tests of reports: real ones, and such as only go wrong."""

import json
import os
import shutil
from pathlib import Path

import yaml

from tests.distributed import run_ranks
from tests.training import make_trainer, train

TINY = [
    "model.vocab_size=260", "model.d_model=16", "model.num_heads=2", "model.num_layers=2", "model.max_seq_len=32",
    "model.some.num_experts=8", "model.some.d_ffn=16", "model.some.top_k=2", "data.name=stories", "data.train_documents=40",
    "data.val_documents=8", "train.batch_size=8", "train.steps=6", "train.warmup_steps=0", "train.eval_every=2",
    "checkpoint.every=2", "checkpoint.keep=5", "sample.tokens=0", "log.tensorboard=false",
]  # fmt: skip
REAL = {
    "some/seed_0": ["seed=0"],
    "some/seed_1": ["seed=1"],
    "attention/seed_0": ["seed=0", "control=attention_only"],
    "attention/seed_1": ["seed=1", "control=attention_only"],
}
"""Run to overrides."""
HOSTILE = "<img src=x onerror=window.hacked=1> \"quoted\" 'single' a|b `c` *d* [e](f) &amp; " + 24 * "long"
ODD = {
    "partial": "partial",
    "running": "running",
    "nan": "diverged",
    "diverged": "diverged",
    "empty": "empty",
    "unreadable": "unreadable",
    HOSTILE: "partial",
}
"""Made by hand from a real one: run to the status that it has."""


def make_runs(folder: Path) -> Path:
    """All of REAL, trained on one rank, and all of ODD, in `folder`/runs."""
    run_ranks(_train_all, 1, str(folder))
    runs = folder / "runs"
    for name in ODD:
        (runs / name).mkdir()
        if name != "empty":
            shutil.copy(runs / "some/seed_0/config.yaml", runs / name)
    lines = (runs / "some/seed_0/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    begun = [record for record in records if record["step"] <= 4 and record["event"] != "end"]
    _write(runs / "partial", begun, b'{"event": "train", "step": 5, "lo')
    _write(runs / "running", begun)
    no_losses = [r | {"loss": None, "grad_norm": None} if r["event"] == "train" and r["step"] > 3 else r for r in records]
    _write(runs / "nan", [r | {"val_loss": None} if r["event"] == "eval" and r["step"] > 3 else r for r in no_losses])
    _write(runs / "diverged", [r | {"val_loss": 9.5} if r["event"] == "eval" and r["step"] == 6 else r for r in records])
    odd = [{"event": "rollback", "step": 4, "to": "</script><script>window.hacked=1</script>"}, {"event": "eval", "step": 4}]
    _write(
        runs / HOSTILE,
        [*begun, *odd, {"event": 7}],
        b'\xff\xfe "\x00 not text\n[1, 2]\nnull\n' + 3000 * b"[",
    )
    (runs / "unreadable/config.yaml").write_text("model: [1, 2")
    _set_apart(runs)
    for name in ("partial", HOSTILE):  # silent for longer than any run may be
        for path in (runs / name).iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    return runs


def _set_apart(runs: Path) -> None:
    """Make the odd runs variants of their own, and give the hostile one a device of its kind."""
    for number, name in enumerate((name for name in ODD if name not in ("empty", "unreadable")), start=1):
        path = runs / name / "config.yaml"
        values = yaml.safe_load(path.read_text())
        values["train"]["learning_rate"] = number / 1e5
        if name == HOSTILE:
            values["run"]["device"] = "<script>window.hacked=1</script>"
        path.write_text(yaml.safe_dump(values))


def _write(folder: Path, records: list[dict], rest: bytes = b"") -> None:
    (folder / "metrics.jsonl").write_bytes("".join(json.dumps(record) + "\n" for record in records).encode() + rest)


def _train_all(rank: int, folder: str) -> None:
    for name, changes in REAL.items():
        settings = [*TINY, f"data.cache_dir={folder}/cache", *changes]
        train(make_trainer(Path(folder) / "runs" / name, "quickstart", settings), 6)
