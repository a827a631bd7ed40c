"""What padding does to the measures: the closed form against counting, and the table of a real run."""

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.launch import FP32, REPOSITORY, environment, succeed
from tests.oracles import metrics as oracle
from tools.padding import entropy_ceiling, gini_floor, main, measure


@pytest.mark.parametrize(("experts", "top_k", "real", "padding"), [(64, 4, 60, 165), (12, 3, 9, 7), (8, 1, 7, 0)])
def test_closed_form_equals_counting(experts, top_k, real, padding):
    """Padding on experts 0 .. K-1; real tokens deal out the others evenly."""
    counts_E = torch.zeros(experts, dtype=torch.int64)
    counts_E[:top_k] += padding * (experts - top_k)
    counts_E[top_k:] += real * top_k
    share = padding / (real + padding)
    floor = oracle.gini(counts_E)
    if share >= top_k / experts:
        assert gini_floor(share, experts, top_k) == pytest.approx(floor, abs=1e-9)
    assert entropy_ceiling(share, experts, top_k) == pytest.approx(oracle.entropy_bits(counts_E), abs=1e-9)


def test_published_table():
    """Specs section 7.1: v4-a4 and v2pro-v2."""
    assert gini_floor(0.733, 64, 4) == pytest.approx(0.671, abs=1e-3)
    assert entropy_ceiling(0.733, 64, 4) == pytest.approx(3.880, abs=5e-3)
    assert gini_floor(0.800, 128, 16) == pytest.approx(0.675, abs=1e-3)
    assert entropy_ceiling(0.800, 128, 16) == pytest.approx(5.284, abs=5e-3)


def test_table_of_a_run(tmp_path):
    settings = [
        "data.name=stories", "data.train_documents=16", "data.val_documents=8", "data.tokenizer_documents=null",
        "model.vocab_size=300", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=64",
        "model.some.num_experts=8", "model.some.d_ffn=8", "model.some.top_k=2", "train.batch_size=8", "train.steps=1",
    ]  # fmt: skip
    arguments = ["--experiment", "v4-a4", "--ds_config", FP32, "--output_dir", str(tmp_path / "run")]
    for setting in settings:
        arguments += ["--set", setting]
    succeed(*arguments)
    command = [sys.executable, str(REPOSITORY / "tools" / "padding.py"), str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"eval"' in line][-1]
    assert figures["padding_share"] == pytest.approx(1 - last["val_tokens"] / (8 * 64))
    assert f"{math.exp(last['val_loss_with_padding']):,.2f}" in done.stdout
    missing = subprocess.run(command[:-1] + [str(tmp_path)], env=environment(), capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and "holds no run" in missing.stderr
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({**last, "val_loss": None})]))
    with pytest.raises(ValueError, match=r"the last loss is not finite \(step 1\); give a run that has not diverged"):
        measure(tmp_path / "run")


def test_figures_that_cannot_be_written_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["padding.py", str(tmp_path), "--json", str(tmp_path / "no" / "figures.json")])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and "figures.json: cannot be written (No such file" in capsys.readouterr().err
