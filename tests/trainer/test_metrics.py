"""Usage metrics against their definitions, and the log's files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from modeling.some import KeyRules, KeyStore, Routing
from tests.distributed import run_ranks
from tests.oracles import metrics as oracle
from trainer.metrics import RoutingMeter, RunLog, entropy_bits, gini

E, D, K = 8, 6, 2


@pytest.mark.parametrize("usage", [[0] * 8, [1] * 8, [5, 5, 0, 0, 0, 0, 0, 0], [9, 1, 3, 0, 2, 2, 7, 100], [4]])
def test_gini_and_entropy_equal_their_definitions(usage):
    usage_E = torch.tensor(usage)
    assert gini(usage_E) == pytest.approx(oracle.gini(usage_E), abs=1e-9)
    assert entropy_bits(usage_E) == pytest.approx(oracle.entropy_bits(usage_E), abs=1e-9)


def routing(rank: int, tokens: int) -> list[Routing]:
    """Two layers' records of `tokens` tokens; experts 6 and 7 are never used."""
    records = []
    for layer in range(2):
        generator = torch.Generator().manual_seed(10 * rank + layer)
        ids_TK = torch.multinomial(torch.arange(1.0, 7.0).expand(max(tokens, 1), -1), K, generator=generator)[:tokens]
        queries_TD = F.normalize(torch.randn(tokens, D, generator=generator), dim=-1)
        records.append(
            Routing(
                queries_TD=queries_TD,
                expert_ids_TK=ids_TK,
                gates_TK=torch.full((tokens, K), 0.5),
                output_square_sum=torch.tensor(1.0 + rank),
                residual_square_sum=torch.tensor(4.0 + 8 * rank),
            )
        )
    return records


def _measure(rank: int) -> list[dict]:
    stores = [KeyStore(E, D, K, KeyRules(), seed=1, layer=layer) for layer in range(2)]
    meter = RoutingMeter(stores)
    meter.add(routing(rank, tokens=30 if rank else 0))
    meter.add(routing(rank, tokens=10))
    return meter.result([torch.arange(E) // 4] * 2)


def test_routing_is_measured_over_all_ranks():
    first, second = run_ranks(_measure, 2)
    assert first == second and [layer["layer"] for layer in first] == [0, 1]
    for layer, ours in enumerate(first):
        ids_TK = torch.cat([r[layer].expert_ids_TK for r in (routing(1, 30), routing(0, 10), routing(1, 10))])
        counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
        keys_ED = KeyStore(E, D, K, KeyRules(), seed=1, layer=layer).keys
        load = [counts_E[:4].sum().item(), counts_E[4:].sum().item()]
        expected = {
            "gini": oracle.gini(counts_E),
            "gini_of_bound": oracle.gini(counts_E) / (1 - K / E),
            "entropy_bits": oracle.entropy_bits(counts_E),
            "effective_experts": 2 ** oracle.entropy_bits(counts_E),
            "experts_used": int((counts_E > 0).sum()),
            "load_max_over_mean": max(load) / (sum(load) / 2),
            "output_over_residual": math.sqrt(6 / 32),
            "coselected_cosine": oracle.mean_coselected_cosine(keys_ED, ids_TK),
        }
        assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_log_writes_json_lines_without_nan(tmp_path):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    log.write("train", step=1, loss=math.nan, grad_norm=math.inf, lr=0.5)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "event": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5
    }  # fmt: skip


def test_resumed_log_has_every_step_once(tmp_path):
    log = RunLog(tmp_path, resumed_step=0, tensorboard=False)
    for step in range(1, 6):
        log.write("train", step=step, loss=1.0)
    log.write("end", step=5)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # a crash cuts a line short
    log = RunLog(tmp_path, resumed_step=3, tensorboard=False)
    log.write("train", step=4, loss=2.0)
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in kept] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_tensorboard_curves_do_not_grow_with_layers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = []
    for layers in (2, 9):
        folder = tmp_path / str(layers)
        log = RunLog(folder, resumed_step=0, tensorboard=True)
        log.write("train", step=1, loss=3.0, lr=0.1)
        log.write("eval", step=1, val_loss=2.0, layers=[{"layer": n, "gini": n / 10} for n in range(layers)])
        log.close()
        board = EventAccumulator(str(folder / "tensorboard")).Reload()
        tags.append(sorted(board.Tags()["scalars"]))
        assert board.Scalars("routing/gini/max")[0].value == pytest.approx((layers - 1) / 10)
        assert board.Scalars("train/loss")[0].value == 3.0
    assert tags[0] == tags[1]
