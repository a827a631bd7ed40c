"""Placements: who serves, how load is packed (against trying everything), and shards that follow a plan."""

import itertools
import math
import random

import pytest
import torch

from modeling.some import FrozenExpertPool, SoMEConfig
from modeling.some.balance import TARGET, balanced_placement, plan
from modeling.some.copies import nearest_copies
from modeling.some.placement import Placement

RANDOM_LOADS = [
    [rng.choice([0, rng.random(), rng.paretovariate(0.7)]) for _ in range(12)] for rng in map(random.Random, range(12))
]


def zipf(number: int, exponent: float) -> list[float]:
    load_E = [(i + 1) ** -exponent for i in range(number)]
    random.Random(1).shuffle(load_E)
    return load_E


def test_contiguous_covers_every_expert_once():
    assert Placement.contiguous(12, 4).expert_ids_P == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    with pytest.raises(ValueError, match=r"parallel.ep_size = 5 does not divide .* = 12; sizes that do: 1, 2, 3, 4, 6, 12"):
        Placement.contiguous(12, 5)


@pytest.mark.parametrize("expert_ids_P", [((0, 1), (3,)), ((0, 0), (1,)), ((0, 1), ())])
def test_an_expert_without_owner_and_a_rank_without_experts_are_bugs(expert_ids_P):
    with pytest.raises(AssertionError):
        Placement(expert_ids_P)


def lightest_of_all_packings(load_E: list[float], ranks: int) -> float:
    """The smallest possible load of the busiest rank with E / P experts a rank, by trying all."""

    def packings(experts: tuple[int, ...]):
        if not experts:
            yield 0.0
            return
        first, rest = experts[0], experts[1:]
        for others in itertools.combinations(rest, len(load_E) // ranks - 1):
            load = load_E[first] + sum(load_E[e] for e in others)
            for heaviest in packings(tuple(e for e in rest if e not in others)):
                yield max(load, heaviest)

    return min(packings(tuple(range(len(load_E)))))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("load_E", [load[:size] for load, size in zip(RANDOM_LOADS, [12, 12, 12] * 4, strict=True)])
def test_packing_is_within_four_thirds_of_the_best(load_E, ranks):
    load_E = load_E[: 12 if ranks < 4 else 8]
    best, placement = lightest_of_all_packings(load_E, ranks), balanced_placement(load_E, ranks)
    assert best * (1 - 1e-9) <= max(placement.load_P(load_E)) <= 4 / 3 * best


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("load_E", RANDOM_LOADS)
def test_every_expert_has_an_owner_and_slots_are_spread_evenly(load_E, ranks):
    for replicas in range(12 * (ranks - 1) + 1):
        placement = balanced_placement(load_E, ranks, replicas)  # demands itself an owner for each, one copy a rank
        slots = [len(expert_ids) for expert_ids in placement.expert_ids_P]
        assert sum(slots) == 12 + replicas and max(slots) - min(slots) <= 1
        assert placement.num_replicas == replicas
        # The loads of ranks are those of experts, shared by their copies.
        assert sum(placement.load_P(load_E)) == pytest.approx(sum(load_E))


def test_replicas_take_load_off_the_busiest_rank():
    load_E = zipf(64, 1.2)
    ratios = [Placement.contiguous(64, 8).max_over_mean(load_E)]
    ratios += [balanced_placement(load_E, 8, replicas).max_over_mean(load_E) for replicas in (0, 1, 8)]
    assert ratios == sorted(ratios, reverse=True)
    # No packing gets below the hottest expert's share; replicas do.
    assert ratios[1] > 8 * max(load_E) / sum(load_E) > 2 and ratios[-1] < 1.05


def test_automatic_replicas_are_the_fewest_that_reach_the_target():
    load_E, current = zipf(64, 1.0), Placement.contiguous(64, 8)
    ours = plan(load_E, "auto", current)
    assert 0 < ours.num_replicas <= 8 and ours.max_over_mean(load_E) <= TARGET
    for fewer in range(ours.num_replicas):
        assert balanced_placement(load_E, 8, fewer).max_over_mean(load_E) > TARGET
    # Where even one a rank does not do, the best is taken.
    one_hot = [100.0] + [1.0] * 15
    assert plan(one_hot, "auto", Placement.contiguous(16, 2)).copies_E()[0] == 2


def test_experts_stay_where_nothing_is_gained():
    even, current = [1.0] * 16, Placement.contiguous(16, 4)
    assert plan(even, 4, current) is current
    assert plan([0.0] * 16, "auto", current) is current
    one_hot = [100.0] + [0.0] * 15
    assert plan(one_hot, 0, current) is current, "no move helps against a single hot expert without replicas"
    skewed = zipf(64, 1.0)
    balanced = plan(skewed, 8, Placement.contiguous(64, 8))
    assert plan(skewed, 8, balanced) is balanced
    # A plan that differs a little keeps most experts at home, wherever the packing starts to count ranks.
    turned = Placement(balanced.expert_ids_P[3:] + balanced.expert_ids_P[:3])
    load_E = list(skewed)
    load_E[skewed.index(max(skewed))] *= 4
    moved = plan(load_E, 8, turned).num_moved_from(turned)
    assert 0 < moved < balanced_placement(load_E, 8, 8).num_moved_from(turned)


def test_the_nearest_copy_serves_and_far_ones_take_turns():
    placement = Placement(((0, 3), (1, 0), (2, 0), (3, 4)))
    expert_ids_TK = torch.tensor([[0, 1], [0, 3], [0, 4], [3, 0], [3, 0], [2, 0]])
    rank_TK, slot_TK = nearest_copies(placement, 1).serving(expert_ids_TK)
    assert rank_TK.tolist() == [[1, 1], [1, 3], [1, 3], [3, 1], [0, 1], [2, 1]]
    assert slot_TK.tolist() == [[1, 0], [1, 0], [1, 1], [0, 1], [1, 1], [0, 1]]
    rank_TK, _ = nearest_copies(placement, 3).serving(expert_ids_TK)
    assert rank_TK.tolist() == [[0, 1], [1, 3], [2, 3], [3, 0], [3, 1], [2, 2]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_copies_share_the_load_of_tokens_that_are_spread_over_ranks(ranks):
    load_E, T = zipf(12, 1.0), 12 * 400
    placement = balanced_placement(load_E, ranks, replicas=5)
    expert_ids_T1 = torch.multinomial(torch.tensor(load_E), T, True, generator=torch.Generator().manual_seed(0))[:, None]
    rows_P = torch.zeros(ranks, dtype=torch.int64)
    for rank in range(ranks):
        serving, slots = nearest_copies(placement, rank).serving(expert_ids_T1)
        rows_P += torch.bincount(serving.flatten(), minlength=ranks)
        for expert, holder, slot in zip(expert_ids_T1[:, 0].tolist(), serving.tolist(), slots.tolist(), strict=True):
            assert placement.expert_ids_P[holder[0]][slot[0]] == expert
    expected_P = placement.load_P((torch.bincount(expert_ids_T1[:, 0], minlength=12) * ranks).tolist())
    for ours, expected in zip(rows_P.tolist(), expected_P, strict=True):
        assert ours == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_that_is_told_what_to_hold_is_a_fresh_shard(monkeypatch, dtype):
    config = SoMEConfig(d_model=8, num_experts=6, d_ffn=12, top_k=2, expert_init="sparse", expert_bias="torch")
    pool, drawn = FrozenExpertPool(config, layer=3, seed=5, expert_ids=[0, 1, 2], dtype=dtype), []
    from modeling.some import experts

    draw = experts.expert_weights
    monkeypatch.setattr(experts, "expert_weights", lambda *a: drawn.append(a[-1]) or draw(*a))
    for expert_ids in ([2, 5, 0, 4], [2, 5, 0, 4], [1], [0, 1, 2, 3, 4, 5]):
        new = set(expert_ids) - set(pool.expert_ids)
        drawn.clear()
        pool.hold(expert_ids)
        assert sorted(drawn) == sorted(new), "nothing that is there is drawn again"
        fresh = FrozenExpertPool(config, layer=3, seed=5, expert_ids=expert_ids, dtype=dtype)
        assert pool.expert_ids == fresh.expert_ids and pool.content_hash() == fresh.content_hash()
        assert not pool.state_dict() and all(b.dtype == dtype for b in pool.buffers())


def test_a_plan_is_a_function_of_the_loads():
    load_E = [math.sin(e) ** 2 for e in range(40)]
    plans = {balanced_placement(list(load_E), 5, 7).expert_ids_P for _ in range(3)}
    assert len(plans) == 1
