"""The table of rank loads: from a checkpoint with known usage, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch

from modeling.some import KeyRules, KeyStore
from tests.distributed import run_ranks
from tests.training import make_trainer, train
from tools import balance
from trainer.checkpoint import RunState, save_checkpoint
from trainer.config import load_experiment
from trainer.engine import CoreState
from trainer.faults import Faults, FaultsConfig
from trainer.snapshot import Snapshot

SETTINGS = ["model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.some.d_ffn=8", "model.vocab_size=300",
            "data.train_documents=64", "data.val_documents=8", "data.tokenizer_documents=null"]  # fmt: skip
# Blocks of four: the first has half of all load; two experts have most of it.
USAGE_LE = [[8.0, 8.0, 0.0, 0.0] + [4 / 3] * 12, [1.0] * 16]


@pytest.fixture
def make_run(tmp_path, cache_dir):
    def make(usage_LE: list[list[float]], *settings: str) -> str:
        experiment = load_experiment("quickstart", [*SETTINGS, f"data.cache_dir={cache_dir}", *settings])
        core = CoreState({"w": torch.ones(1)}, {name: {"w": torch.ones(1)} for name in ("exp_avg", "exp_avg_sq")}, 1)
        state = RunState(7, 0, 9, "bf16", experiment.to_dict(), {}, "d", "t")
        stores = [KeyStore(len(usage_E), 16, 2, KeyRules()) for usage_E in usage_LE]
        for store, usage_E in zip(stores, usage_LE, strict=True):
            store.usage.copy_(torch.tensor(usage_E))
        snapshot = Snapshot.of(state, core, stores)
        return str(save_checkpoint(tmp_path / "run", snapshot, 1, Faults(FaultsConfig(), rank=0)).parent.parent)

    return make


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["balance.py", *arguments])
    balance.main()


def test_figures_of_known_usage(make_run, monkeypatch, capsys):
    run = make_run(USAGE_LE)
    call(monkeypatch, run, "--json")
    rows = {(row["ranks"], row["placement"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [
        (ranks, way) for ranks in (2, 4, 8) for way in ("contiguous", "balanced", "balanced, replicas auto")
    ]
    assert rows[4, "contiguous"]["layers"] == pytest.approx([4 * 16 / 32, 1.0])
    assert rows[4, "contiguous"]["load_max_over_mean"] == pytest.approx(1.5)
    # With four slots a rank the best is a hot, an unused and two of the others on both hot ranks.
    assert rows[4, "balanced"]["layers"] == pytest.approx([(8 + 0 + 4 / 3 + 4 / 3) * 4 / 32, 1.0])
    expert_bytes = 2 * (2 * 16 * 8 + 8 + 16)
    assert rows[8, "balanced"]["pool_bytes_a_rank"] == 2 * 2 * expert_bytes
    call(monkeypatch, run, "--ranks", "8", "--replicas", "8", "--json")
    last = json.loads(capsys.readouterr().out)["rows"][-1]
    # Eight copies in the first layer, one more slot a rank; the second is even and stays as it is.
    assert last["replicas"] == 4 and last["pool_bytes_a_rank"] == (3 + 2) * expert_bytes
    assert last["layers"][0] < rows[8, "balanced"]["layers"][0] and last["layers"][1] == 1


def test_table_names_every_way(make_run, monkeypatch, capsys):
    call(monkeypatch, make_run(USAGE_LE), "--ranks", "2", "4")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[-6:]] == [
        [f"| {ranks}", way] for ranks in (2, 4) for way in ("contiguous", "balanced", "balanced, replicas auto")
    ]


def _train(rank: int, folder: str, cache_dir: str) -> None:
    small = ["model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=300", "model.max_seq_len=32",
             "model.some.d_ffn=64", "train.batch_size=8", "train.max_micro_batch=2", "train.steps=2",
             "data.train_documents=64", "data.val_documents=8", "data.tokenizer_documents=null",
             f"data.cache_dir={cache_dir}", "log.tensorboard=false"]  # fmt: skip
    train(make_trainer(Path(folder), "quickstart", small), 2)


def test_time_replays_the_routing_of_the_trained_model(tmp_path, cache_dir, monkeypatch, capsys):
    run_ranks(_train, 1, str(tmp_path / "run"), str(cache_dir))
    call(monkeypatch, str(tmp_path / "run"), "--ranks", "2", "--replicas", "3", "--time", "--repeats", "2", "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["placement"] for row in rows] == ["contiguous", "balanced", "balanced, replicas 3"]
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        # What the ranks hold is what the plans say; they have as many slots a rank in every layer.
        assert row["held_bytes_a_rank"] == row["pool_bytes_a_rank"]
    assert rows[0]["held_bytes_a_rank"] == 2 * 8 * 4 * (2 * 32 * 64 + 32 + 64)
    call(monkeypatch, str(tmp_path / "run"), "--ranks", "2")
    assert " ms a step" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, str(tmp_path / "run"), "--ranks", "16", "--time")
    assert refused.value.code == 2 and "train.batch_size = 8 does not divide over 16 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("usage_LE", "settings", "arguments", "message"),
    [
        (
            USAGE_LE,
            [],
            ["--ranks", "3"],
            "ep_size = 3 does not divide model.some.num_experts = 16; sizes that do: 1, 2, 4, 8, 16",
        ),
        (USAGE_LE, [], ["--ranks", "2", "0"], "--ranks 0: must be at least 1"),
        (USAGE_LE, [], ["--ranks", "-2"], "--ranks -2: must be at least 1"),
        (
            [[1.0] * 15] * 2,
            ["model.some.num_experts=15"],
            [],
            "none of 2, 4 and 8 ranks divides model.some.num_experts = 15; name others with --ranks",
        ),
        (USAGE_LE, [], ["--replicas", "some"], "--replicas some: is neither a number nor auto; give one of them"),
        (USAGE_LE, [], ["--time", "--repeats", "0"], "--repeats 0: must be at least 1"),
        (
            USAGE_LE,
            [],
            ["--time"],
            "data.path = None: the run was trained on other data; name its place with",
        ),
        (USAGE_LE, [], ["--ranks", "2", "--replicas", "17"], "--replicas 17: 2 ranks have room for 0 to 16; give a number"),
        ([[0.0] * 16] * 2, [], [], "no tokens were counted up to step 7; give a checkpoint of a trained model"),
        ([], ["control=attention_only"], [], "model.channel_mixer = none has no experts; give a SoME model's run"),
    ],
)
def test_refusals(make_run, monkeypatch, capsys, usage_LE, settings, arguments, message):
    run = make_run(usage_LE, *settings)
    with pytest.raises(SystemExit) as refused:
        call(monkeypatch, run, *arguments)
    error = capsys.readouterr().err
    assert refused.value.code == 2 and message in error and error.count("\n") == 1


def test_no_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, str(tmp_path))
    assert "holds no checkpoint; give a run's folder" in capsys.readouterr().err
