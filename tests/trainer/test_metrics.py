"""Usage metrics against their definitions, and the log's files."""

import json
import math
import re
from collections import Counter
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from modeling.some import KeyRules, KeyStore, Routing
from modeling.some.placement import Placement
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
        largest_T = 0.5 + torch.rand(tokens, generator=generator) / 2
        records.append(
            Routing(
                queries_TD=queries_TD,
                expert_ids_TK=ids_TK,
                gates_TK=torch.stack([largest_T, 1 - largest_T], 1),
                output_squares_T=torch.rand(tokens, generator=generator),
                residual_squares_T=1 + torch.rand(tokens, generator=generator),
            )
        )
    return records


def real(tokens: int, padding: bool) -> torch.Tensor:
    """Which of the routed tokens are real: all, or two in three."""
    return torch.arange(tokens) % 3 > 0 if padding else torch.ones(tokens, dtype=torch.bool)


def make_stores() -> list[KeyStore]:
    stores = [KeyStore(E, D, K, KeyRules(), seed=1, layer=layer) for layer in range(2)]
    for layer, store in enumerate(stores):
        store.usage.copy_((torch.arange(E) * 5 + layer) % 7)
        store.respawns.fill_(layer)
    return stores


def _measure(rank: int, padding: bool) -> list[dict]:
    meter = RoutingMeter(make_stores())
    for tokens in (30 if rank else 0, 10):
        meter.add(routing(rank, tokens), real(tokens, padding))
    layers = meter.result([Placement.contiguous(E, E // 4)] * 2)
    return [layer | {"pairs": pairs_EE.tolist()} for layer, pairs_EE in zip(layers, meter.pairs, strict=True)]


def agreeing_padding() -> tuple[Routing, torch.Tensor]:
    """80 real tokens that use all experts evenly, and 240 of padding that all choose the same two."""
    first_T = torch.arange(E).repeat(10)
    ids_TK = torch.cat([torch.stack([first_T, (first_T + 1) % E], 1), torch.tensor([[0, 1]]).expand(240, K)])
    ones_T = torch.ones(320)
    record = Routing(
        queries_TD=torch.zeros(320, D), expert_ids_TK=ids_TK, gates_TK=torch.full((320, K), 0.5),
        output_squares_T=ones_T, residual_squares_T=ones_T,
    )  # fmt: skip
    return record, torch.arange(320) < 80


def _measure_all(rank: int) -> dict[str, list[dict]]:
    meter = RoutingMeter(make_stores()[:1])
    record, real_T = agreeing_padding()
    meter.add([record], real_T)
    agreeing = meter.result([Placement.contiguous(E, 1)])
    return {"real": _measure(rank, False), "with padding": _measure(rank, True), "agreeing": agreeing}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, list[dict]]]:
    return run_ranks(_measure_all, 2)


@pytest.mark.parametrize("padding", [False, True], ids=["real", "with padding"])
def test_routing_is_measured_over_all_ranks(measured, padding):
    first, second = (of_rank["with padding" if padding else "real"] for of_rank in measured)
    assert first == second and [layer["layer"] for layer in first] == [0, 1]
    for layer, ours in enumerate(first):
        parts = [(routing(rank, tokens)[layer], real(tokens, padding)) for rank, tokens in ((1, 30), (0, 10), (1, 10))]
        routed_TK = torch.cat([record.expert_ids_TK for record, _ in parts])
        ids_TK = torch.cat([record.expert_ids_TK[real_T] for record, real_T in parts])
        largest_T = torch.cat([record.gates_TK[real_T, 0] for record, real_T in parts])
        counts_E, routed_E = (torch.bincount(ids.flatten(), minlength=E) for ids in (ids_TK, routed_TK))
        output = sum(record.output_squares_T[real_T].sum().item() for record, real_T in parts)
        residual = sum(record.residual_squares_T[real_T].sum().item() for record, real_T in parts)
        store = make_stores()[layer]
        load = [counts_E[:4].sum().item(), counts_E[4:].sum().item()]
        expected = {
            "layer": layer,
            "gini": oracle.gini(counts_E),
            "gini_of_bound": oracle.gini(counts_E) / (1 - K / E),
            "entropy_bits": oracle.entropy_bits(counts_E),
            "usage_gini": oracle.gini(store.usage),
            "usage_entropy_bits": oracle.entropy_bits(store.usage),
            "effective_experts": 2 ** oracle.entropy_bits(counts_E),
            "experts_used": int((counts_E > 0).sum()),
            "load_max_over_mean": max(load) / (sum(load) / 2),
            "output_over_residual": math.sqrt(output / residual),
            "coselected_cosine": oracle.mean_coselected_cosine(store.keys, ids_TK),
            "largest_gate": sum(largest_T.tolist()) / len(ids_TK),
            "respawns": layer,
        }
        assert ours.pop("expert_counts") == counts_E.tolist()
        pairs = Counter(pair for ids in ids_TK.tolist() for pair in combinations(sorted(ids), 2))
        assert ours.pop("pairs") == [[pairs[min(a, b), max(a, b)] for b in range(E)] for a in range(E)]
        if padding:
            expected |= {
                "gini_with_padding": oracle.gini(routed_E),
                "entropy_bits_with_padding": oracle.entropy_bits(routed_E),
            }
            assert abs(expected["gini_with_padding"] - expected["gini"]) > 1e-3
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_padding_that_agrees_looks_like_inequality(measured):
    """Specs F2: with a share of 3/4 padding the Gini of perfectly even routing is 3/4 of its bound."""
    (ours,) = measured[0]["agreeing"]
    assert ours["gini"] == pytest.approx(0, abs=1e-9) and ours["entropy_bits"] == pytest.approx(3)
    assert ours["gini_with_padding"] == pytest.approx(0.75 * (1 - K / E))
    assert ours["entropy_bits_with_padding"] == pytest.approx(-2 * 26 / 64 * math.log2(26 / 64) + 6 * 2 / 64 * 5)


def test_log_writes_json_lines_without_nan(tmp_path):
    log = RunLog(tmp_path, resumed_step=0)
    layers = [{"gini": math.nan, "counts": [1, 2]}]
    log.write("train", step=1, loss=math.nan, grad_norm=math.inf, lr=0.5, moved=[0.1, -math.inf], layers=layers)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "event": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "moved": [0.1, None],
        "layers": [{"gini": None, "counts": [1, 2]}],
    }  # fmt: skip


def test_what_experts_serve_is_of_the_newest_evaluation(tmp_path):
    """And not of one that a resumed run is going to make again."""
    path = tmp_path / "experts.json"
    log = RunLog(tmp_path, resumed_step=0)
    log.write_experts(0, [])
    assert not path.exists(), "a model without experts"
    for step in (4, 8):
        log.write_experts(step, [{"tokens": [[["a", step]]], "coselected": []}])
    log.close()
    assert json.loads(path.read_text()) == {"step": 8, "layers": [{"tokens": [[["a", 8]]], "coselected": []}]}
    RunLog(tmp_path, resumed_step=8).close()
    assert path.exists()
    RunLog(tmp_path, resumed_step=6).close()
    assert not path.exists()
    path.write_text("damaged")
    RunLog(tmp_path, resumed_step=6).close()
    assert not path.exists()


def test_resumed_log_has_every_step_once(tmp_path):
    log = RunLog(tmp_path, resumed_step=0)
    for step in range(1, 6):
        log.write("train", step=step, loss=1.0)
    log.write("end", step=5)
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n[1]\nnull\n{"a": 1}\n{"event": "x", "step": "1"}\n' + 3000 * b"[" + b"\n")  # a disk went bad
        file.write(b'{"event": "train", "st')  # a crash cuts a line short
    log = RunLog(tmp_path, resumed_step=3)
    log.write("train", step=4, loss=2.0)
    log.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in kept] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_a_log_drops_the_evaluation_that_is_made_again(tmp_path):
    log = RunLog(tmp_path, resumed_step=0)
    for step in (2, 3):
        log.write("train", step=step)
        log.write("eval", step=step)
    log.close()
    for evaluates, last in [(False, "eval"), (True, "train")]:
        RunLog(tmp_path, resumed_step=3, evaluates=evaluates).close()
        kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [r["event"] for r in kept[:3]] == ["train", "eval", "train"]
        assert kept[-1] == {"event": last, "step": 3}


def test_a_run_that_starts_over_logs_as_if_for_the_first_time(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, resumed_step=0)
        log.write("start", step=0)
        log.write("eval", step=0, val_loss=5.0)
        log.write("train", step=1, loss=4.0)
        log.close()
    kept = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == ["start", "start", "eval", "train"], "every start is remembered"


def test_a_full_disk_is_noted_in_one_line_and_told_by_nobody_else(tmp_path):
    """The other ranks have to learn of it first; see test_saver.py."""
    log = RunLog(tmp_path, resumed_step=0)
    log._file.close()
    log._file = open("/dev/full", "w", buffering=1)
    log.write("train", step=1, loss=4.0)
    assert re.search(r"metrics.jsonl: cannot be written \(No space left on device\), .* MB free; make", str(log.error))
