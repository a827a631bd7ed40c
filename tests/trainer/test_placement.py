"""Plans during a run, on real ranks: when they are made, what is kept, and what a continued run takes up."""

import json
from dataclasses import asdict

import torch.distributed as dist

from modeling.some import FrozenExpertPool, SoMEConfig, SoMELayer
from modeling.some.placement import Placement
from tests.distributed import run_ranks
from trainer.checkpoint import RunState
from trainer.config import ParallelConfig, load_experiment
from trainer.layout import Layout
from trainer.placement import begin_placement, replan_if_due
from trainer.plan import Deployment, Sharding, memory, most_replicas

CONFIG = SoMEConfig(d_model=8, num_experts=8, d_ffn=8, top_k=2)
BALANCED = ParallelConfig(placement="balanced", replicas="auto", replan_every=5)
CONTIGUOUS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def make_layers() -> list[SoMELayer]:
    layers = [SoMELayer(CONFIG, layer, seed=1, ep_group=dist.group.WORLD) for layer in range(2)]
    layers[0].store.usage[:2] = 30.0  # two hot experts on the first rank; the second layer's load is even
    layers[0].store.usage[2:] = 1.0
    layers[1].store.usage[:] = 2.0
    return layers


def make_state(step: int, placement: list | None = None) -> RunState:
    return RunState(step, 0, 100, "fp32", {}, {}, "", "", placement=placement)


def _plans(rank: int) -> dict:
    layers, state, seen = make_layers(), make_state(0), {}
    seen["at the start"] = begin_placement(layers, BALANCED, state), state.placement
    state.step = 4
    seen["between"] = replan_if_due(layers, BALANCED, state)
    state.step = 5
    seen["due"] = replan_if_due(layers, BALANCED, state)
    seen["placement"] = state.placement
    for index, layer in enumerate(layers):
        fresh = FrozenExpertPool(CONFIG, index, 1, expert_ids=state.placement[index][rank])
        assert layer.pool.content_hash() == fresh.content_hash()
        assert layer.placement.expert_ids_P[rank] == tuple(layer.pool.expert_ids)

    continued, saved = make_layers(), RunState(**json.loads(json.dumps(asdict(state))))
    seen["same ranks"] = begin_placement(continued, BALANCED, saved), saved.placement
    seen["same shards"] = [layer.pool.expert_ids for layer in continued] == [layer.pool.expert_ids for layer in layers]

    other = make_state(7, [[[e] for e in range(8)]] * 2)
    seen["other ranks"] = begin_placement(make_layers(), BALANCED, other), other.placement
    never, kept = ParallelConfig(placement="balanced", replan_every=0), make_state(10, state.placement)
    seen["never"] = begin_placement(make_layers(), never, kept), replan_if_due(layers, never, kept), kept.placement
    dropped = make_state(10, state.placement)
    seen["contiguous"] = begin_placement(make_layers(), ParallelConfig(), dropped), dropped.placement
    return seen


def test_plans_of_a_run():
    first, second = run_ranks(_plans, 2)
    assert first["at the start"] == (None, [CONTIGUOUS, CONTIGUOUS])
    assert first["between"] is None
    hot, even = first["due"]["layers"]
    assert hot["load_before"] == 62 * 2 / 66 and hot["load_after"] == 1.0 and hot["moved"] > 0 and hot["replicas"] == 0
    assert even == {"layer": 1, "load_before": 1.0, "load_after": 1.0, "moved": 0, "replicas": 0}
    assert first["due"]["moved"] == hot["moved"]
    assert first["placement"] == second["placement"] and first["placement"][1] == CONTIGUOUS
    assert Placement(tuple(map(tuple, first["placement"][0]))).max_over_mean([30.0] * 2 + [1.0] * 6) == 1.0
    for seen in (first, second):
        assert seen["same ranks"] == (None, first["placement"]) and seen["same shards"]
        record, placement = seen["other ranks"]
        assert record["layers"][0]["load_after"] == 1.0 and placement == first["placement"]
        assert seen["never"] == (None, None, first["placement"])
        assert seen["contiguous"] == (None, None)


def test_replicas_take_memory():
    def pool_bytes(*settings: str) -> int:
        experiment = load_experiment("quickstart", list(settings))
        how = Deployment(Layout(4, 8, 1), 4, 4, Sharding(), "cpu", replicas=most_replicas(experiment, 4))
        return memory(experiment, how).pool

    # Sixteen experts in each of four layers, two bytes a number.
    expert = 2 * (2 * 128 * 256 + 256 + 128)
    balanced = "parallel.placement=balanced"
    assert pool_bytes() == pool_bytes(balanced) == 4 * 4 * expert
    assert pool_bytes(balanced, "parallel.replicas=auto") == pool_bytes(balanced, "parallel.replicas=4") == 4 * 5 * expert
    assert pool_bytes(balanced, "parallel.replicas=5") == 4 * 6 * expert
