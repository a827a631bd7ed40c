"""Usage, imbalance and step time, against enumeration and sums written out one by one."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from trainer.cluster import Machine, read_machine
from trainer.config import load_experiment
from trainer.cost import share, step_time
from trainer.layout import Layout
from trainer.plan import Deployment, Sharding, distinct_ranks, parts, saved_bytes_per_token, traffic
from trainer.usage import at_most_once_a_token, imbalance, read_usage

MACHINES = Path(__file__).resolve().parents[2] / "tools" / "machines.yaml"
PLAIN = replace(
    read_machine("h100x8", MACHINES),
    share_by_rows={1: 0.01, 100: 0.5},
    expert_share_by_rows={1: 0.02, 100: 0.6},
    elementwise_gb_s=700.0,
    step_us=0.0,
    layer_us=0.0,
    expert_us=0.0,
)


@pytest.mark.parametrize(("exponent", "top_k"), [(0.0, 4), (0.6, 4), (3.0, 4), (3.0, 12), (20.0, 3)])
def test_no_token_chooses_an_expert_twice(exponent, top_k):
    weights_E = np.arange(1, 13) ** -exponent
    shares_E = at_most_once_a_token(weights_E, top_k)
    assert shares_E.sum() == pytest.approx(1) and shares_E.max() <= 1 / top_k + 1e-9
    free = shares_E < 1 / top_k - 1e-9
    ratios = shares_E[free] / weights_E[free]
    assert np.allclose(ratios, ratios[:1]), "those below the limit keep their proportions"


def test_experts_that_nobody_used_share_what_is_left():
    shares_E = at_most_once_a_token(np.array([5.0, 1.0, 0.0, 0.0, 0.0]), 3)
    assert shares_E == pytest.approx([1 / 3, 1 / 3, 1 / 9, 1 / 9, 1 / 9])


@pytest.mark.parametrize("exponent", [0, 0.6, 1.5])
@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (6, 3), (8, 4), (4, 4)])
def test_imbalance_bounds_the_best_placement(experts, ranks, exponent):
    shares_E = read_usage(f"zipf:{exponent}", 1, experts, 1).shares_LE[0]
    size = experts // ranks

    def load(order) -> float:
        return ranks * max(sum(shares_E[e] for e in order[r * size : (r + 1) * size]) for r in range(ranks))

    best = min(load(order) for order in itertools.permutations(range(experts)))
    contiguous, bound, planned = (
        imbalance(shares_E, ranks, *how) for how in (("contiguous", 0, True), ("balanced", 0, False), ("balanced", 0, True))
    )
    assert contiguous == pytest.approx(load(range(experts)))
    assert 1 <= bound <= best + 1e-9 <= planned + 2e-9 <= contiguous + 3e-9


def test_replicas_go_where_the_load_is():
    shares_E = np.array([0.5, 0.3, 0.1, 0.1])
    bounds = [imbalance(shares_E, 4, "balanced", copies, False) for copies in range(4)]
    assert bounds == pytest.approx([2.0, 1.2, 1.0, 1.0])
    assert imbalance(np.array([0.97, 0.01, 0.01, 0.01]), 4, "balanced", 50, False) == 1.0


@pytest.mark.parametrize(
    ("loads", "ranks", "planned", "bound"),
    [
        ([5, 3, 1, 1], 4, 5 / 2.5, 5 / 2.5),  # one expert a rank
        ([4, 3, 2, 1], 2, 5 / 5, 1),  # 4 + 1 and 3 + 2
        ([3, 3, 2, 2, 2, 0], 2, 7 / 6, 1),  # longest first: 3 + 2 + 2 and 3 + 2 + 0; no expert is hotter than a rank's share
        ([10, 7, 8, 8, 8, 7], 3, 17 / 16, 1),  # good enough in blocks: nothing moves
    ],
)
def test_of_measured_shares_the_plan_is_known(loads, ranks, planned, bound):
    shares_E = np.array(loads) / sum(loads)
    assert imbalance(shares_E, ranks, "balanced", 0, is_measured=True) == pytest.approx(planned)
    assert imbalance(shares_E, ranks, "balanced", 0, is_measured=False) == pytest.approx(bound)


def test_zipf_is_as_steep_as_it_says():
    usage_LE = read_usage("zipf:0.6", 3, 128, 4).shares_LE
    assert usage_LE.shape == (3, 128) and np.allclose(usage_LE.sum(1), 1)
    ranked = np.sort(usage_LE, axis=1)[:, ::-1]
    assert np.allclose(ranked[:, 0] / ranked[:, 15], 16**0.6)
    assert not np.array_equal(usage_LE[0], usage_LE[1]), "a layer's hottest expert is not another layer's"


@pytest.mark.parametrize(
    ("text", "message"),
    [("zipf:-1", "write it as zipf:0.6"), ("zipf", "write it as zipf:0.6"), ("nowhere", "no such run")],
)
def test_usage_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_usage(text, 1, 8, 2)


def deploy(ep_size=1, ranks=16, near=8, micro=2, accumulation=1, **changes) -> Deployment:
    return Deployment(Layout(ep_size, micro, accumulation), ranks=ranks, ranks_per_node=near, **changes)


def b3(*settings: str):
    experiment = load_experiment("b3", list(settings))
    some = experiment.model.some
    return experiment, read_usage("zipf:0.6", experiment.model.num_layers, some.num_experts, some.top_k).shares_LE


def test_experts_one_by_one():
    experiment, usage_LE = b3("model.some.num_experts=64", "model.num_layers=2")
    some, how = experiment.model.some, deploy(ep_size=4, accumulation=3, imbalance=1.25)
    tokens, products, read = 2 * 768 * 4, 0.0, 0.0
    for share_e in usage_LE.flatten():
        used = 1 - (1 - some.top_k * share_e) ** tokens
        rows = tokens * some.top_k * share_e / used
        reached = 0.02 + 0.58 * min(1.0, math.log(rows) / math.log(100))
        products += used * rows * 8 * 512 * 1024 / (989.4e12 * reached) / 4
        read += used * 2 * (2 * 512 * 1024 + 1024 + 512) * 2 / 2850e9 / 4
    seconds = step_time(experiment, how, PLAIN, usage_LE)
    assert seconds.experts == pytest.approx(3 * 1.25 * products)
    assert seconds.weights == pytest.approx(3 * max(0, read - 1.25 * products))


def test_weights_are_the_floor_for_few_rows_an_expert():
    experiment, usage_LE = b3()
    few, many = (step_time(experiment, deploy(micro=micro), PLAIN, usage_LE) for micro in (2, 64))
    assert few.weights > few.experts and many.weights == 0
    reading = 10 * 512 * experiment.model.some.num_expert_parameters() * 2 * 2 / 2850e9
    assert few.experts + few.weights == pytest.approx(reading, rel=0.02)


def test_exchange_and_gradients_take_bytes_over_bandwidth_and_latency():
    experiment, usage_LE = b3()
    how = deploy(ep_size=16, accumulation=3, sharding=Sharding(bucket=10_000_000))
    seconds, sent = step_time(experiment, how, PLAIN, usage_LE), traffic(experiment, how)
    # Of each of 3.9 copies out, back and as received, bf16, and of fp32 sums there and here: written and read, both ways.
    copies = distinct_ranks(4, 16, 512)
    copied = 3 * 10 * 4 * 2 * 768 * 512 * (copies * (2 * 2 + 2 * 2 + 4) + 4) / 2850e9
    # A tree over 8 ranks in a node and 2 nodes: three messages of 15 us, one of 25.
    hops = 3 * 15e-6 + 25e-6
    for name, part, collectives in (("exchange", sent.tokens, 3 * 10 * 7), ("gradients", sent.gradients, 2 * (3 * 3 + 1))):
        assert part.between_nodes > 0
        bytes_over_bandwidth = part.in_node / 360e9 + part.between_nodes / 43e9
        local = copied if name == "exchange" else 0
        assert getattr(seconds, name) == pytest.approx(bytes_over_bandwidth + collectives * hops + local), name
    assert step_time(experiment, deploy(), PLAIN, usage_LE).exchange == 0


def test_products_of_the_core_and_their_rates():
    experiment, usage_LE = b3()
    seconds, U, L, D, V = step_time(experiment, deploy(accumulation=2), PLAIN, usage_LE), 2 * 768, 10, 512, 8192
    trained = V * D + L * (4 * D * D + 2 * D * 2 * D)
    assert seconds.core == pytest.approx(2 * 6 * U * trained / (0.5 * 989.4e12))
    assert seconds.attention == pytest.approx(2 * 6 * L * U * 768 * D / (0.35 * 989.4e12))
    assert seconds.scores == pytest.approx(2 * 2 * L * U * D * 512 / (0.5 * 66.9e12))
    assert seconds.elementwise == pytest.approx(2 * U * 4 * saved_bytes_per_token(experiment.model, deploy()) / 700e9)
    fixed = step_time(experiment, deploy(accumulation=2), replace(PLAIN, step_us=3.0, layer_us=7.0), usage_LE).fixed
    assert seconds.fixed == 0 and fixed == pytest.approx(3e-6 + 2 * 10 * 7e-6)


def test_the_key_update_grows_with_the_square_of_the_experts():
    times = []
    for experts in (8192, 16384):
        experiment, usage_LE = b3(f"model.some.num_experts={experts}")
        times.append(step_time(experiment, deploy(device="cpu"), PLAIN, usage_LE).keys)
    assert 3.8 < times[1] / times[0] < 4.0


def test_sums_of_the_key_stores_hide_behind_backward_and_optimizer():
    """The same job with ever slower links between nodes; on a CPU the whole transfer shows."""
    (experiment, usage_LE), hidden = b3(), []
    for gigabytes in (1e6, 0.05, 0.0005):
        machine = replace(PLAIN, between_nodes_gb_s=gigabytes)
        seconds, on_cpu = (step_time(experiment, deploy(device=device), machine, usage_LE) for device in ("cuda", "cpu"))
        per_layer = 512 * 4 + 512 * 512, 512 * 512 + 512
        counts, sums = (40 * n * (2 * 7 / 8 / 360e9 + 1 / 8 / (1e9 * gigabytes)) + 2 * 70e-6 for n in per_layer)
        shown = max(0, counts - (seconds.core + seconds.attention + seconds.elementwise + seconds.experts) / 2)
        shown += max(0, sums - seconds.optimizer)
        assert on_cpu.keys - seconds.keys == pytest.approx(counts + sums - shown), gigabytes
        hidden.append(1 - shown / (counts + sums))
    assert hidden[0] > 0.5 > hidden[1] > hidden[2] > 0


def test_without_experts_nothing_is_exchanged_or_streamed():
    experiment, usage_LE = b3("control=dense")
    seconds = step_time(experiment, deploy(), PLAIN, usage_LE)
    assert seconds.experts == seconds.weights == seconds.exchange == seconds.keys == seconds.scores == 0 < seconds.core


def test_share_between_and_beyond_the_table():
    known = {1: 0.01, 100: 0.5}
    assert share(known, 10) == pytest.approx((0.01 + 0.5) / 2)
    assert share(known, 1) == 0.01 and share(known, 10**6) == 0.5


def test_every_preset_can_be_read_and_plans():
    experiment, usage_LE = b3()
    names = list(yaml.safe_load(MACHINES.read_text(encoding="utf-8")))
    assert {"h100x8", "h200x8", "a100x8", "rtx4090", "laptop", "xeon2"} == set(names)
    for name in names:
        machine = read_machine(name, MACHINES)
        how = deploy(ranks=machine.ranks_per_node, near=machine.ranks_per_node, device=machine.device)
        assert all(part >= 0 for part in parts(step_time(experiment, how, machine, usage_LE)).values())
        for shares in (machine.share_by_rows, machine.expert_share_by_rows):
            assert list(shares.values()) == sorted(shares.values()), "more rows, more speed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gib": 0}, "memory_gib = 0 must be greater than 0"),
        ({"layer_us": -1}, "layer_us = -1 must be at least 0"),
        ({"device": "tpu"}, "device = 'tpu' is not one of: cuda, cpu"),
        ({"share_by_rows": {}}, "share_by_rows = .* holds nothing"),
        ({"share_by_rows": {8: 1.5}}, "share_by_rows = 8: 1.5"),
        ({"share_by_rows": {0: 0.5}}, "share_by_rows = 0: 0.5"),
        ({"expert_share_by_rows": {8: 0.0}}, "expert_share_by_rows = 8: 0.0"),
        ({"attention_share": 0.0}, "attention_share = 0.0 must be greater than 0"),
        ({"attention_share": 1.1}, "attention_share = 1.1 must be at most 1"),
        ({"ranks_per_node": 0}, "ranks_per_node = 0 must be greater than 0"),
        ({"memory_gb_s": math.nan}, "memory_gb_s = nan must be greater than 0"),
    ],
)
def test_machines_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Machine(**{**parts(PLAIN), **change})
