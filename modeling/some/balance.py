"""Plans that spread the experts' load evenly over ranks: longest-processing-time packing, with replicas of the hottest.

A plan is a pure function of loads, of which every rank has the same bits, so all ranks make the same plan without a word.
Since the experts are frozen, a replica needs no synchronisation, and a new owner draws its expert anew: a plan costs no
traffic, only the time of drawing what moves.
"""

import heapq
from collections.abc import Sequence

from modeling.some.placement import Placement

TARGET = 1.1
"""Load of the busiest rank over the mean that is good enough: what is left to gain is less than a move costs."""
WORTHWHILE = 0.95
"""A new plan must bring the busiest rank's load down to this share, or experts would move back and forth for nothing."""


def plan(load_E: Sequence[float], replicas: int | str, current: Placement) -> Placement:
    """The placement to go on with: `current` where it is good enough or no other is much better, else a balanced one.

    Args:
        load_E: how much of the work each expert gets, in any unit.
        replicas: copies beyond one an expert, over all ranks; `auto`: the smallest number, up to one a rank, that reaches
            `TARGET`, or the best if none does.
        current: how the experts lie now.
    """
    before = current.max_over_mean(load_E)
    if before <= TARGET:
        return current
    ranks = current.num_ranks
    if replicas == "auto":
        most = min(ranks, len(load_E) * (ranks - 1))
        plans = [balanced_placement(load_E, ranks, number) for number in range(most + 1)]
        good = [p for p in plans if p.max_over_mean(load_E) <= TARGET]
        best = good[0] if good else min(plans, key=lambda p: p.max_over_mean(load_E))
    else:
        best = balanced_placement(load_E, ranks, replicas)
    return _renumbered(best, current) if best.max_over_mean(load_E) <= WORTHWHILE * before else current


def balanced_placement(load_E: Sequence[float], ranks: int, replicas: int = 0) -> Placement:
    """Experts by decreasing load, each to the rank with the least so far that has a free slot (longest processing time).

    Args:
        load_E: how much of the work each expert gets, in any unit.
        ranks: number P of ranks; at most E.
        replicas: slots beyond E, from 0 to E (P - 1); slots are spread over the ranks as evenly as their number allows.
    """
    E = len(load_E)
    assert 0 < ranks <= E and 0 <= replicas <= E * (ranks - 1), (E, ranks, replicas)
    copies_E = _copies(load_E, ranks, replicas)
    share_E = [load / copies for load, copies in zip(load_E, copies_E, strict=True)]
    by_load = sorted(range(E), key=lambda expert: (-share_E[expert], expert))
    free_P = [(E + replicas) // ranks + (rank < (E + replicas) % ranks) for rank in range(ranks)]
    load_P, held_P = [0.0] * ranks, [[] for _ in range(ranks)]

    def give(expert: int, rank: int) -> None:
        held_P[rank].append(expert)
        load_P[rank] += share_E[expert]
        free_P[rank] -= 1

    # Copies first, on distinct ranks: taking those with the most free slots never runs into a dead end (Gale and Ryser).
    for expert in (e for e in by_load if copies_E[e] > 1):
        for rank in sorted(range(ranks), key=lambda r: (-free_P[r], load_P[r], r))[: copies_E[expert]]:
            give(expert, rank)
    open_ranks = [(load_P[rank], rank) for rank in range(ranks) if free_P[rank]]
    heapq.heapify(open_ranks)
    for expert in (e for e in by_load if copies_E[e] == 1):
        _, rank = heapq.heappop(open_ranks)
        give(expert, rank)
        if free_P[rank]:
            heapq.heappush(open_ranks, (load_P[rank], rank))
    return Placement(tuple(tuple(sorted(held)) for held in held_P))


def _copies(load_E: Sequence[float], ranks: int, replicas: int) -> list[int]:
    """One copy an expert, and one more `replicas` times for the expert with the most load a copy; at most one a rank."""
    copies_E = [1] * len(load_E)
    hottest = [(-load, expert) for expert, load in enumerate(load_E)]
    heapq.heapify(hottest)
    for _ in range(replicas):
        _, expert = heapq.heappop(hottest)
        copies_E[expert] += 1
        if copies_E[expert] < ranks:
            heapq.heappush(hottest, (-load_E[expert] / copies_E[expert], expert))
    return copies_E


def _renumbered(placement: Placement, current: Placement) -> Placement:
    """The same shards on other ranks: where most of their experts are already, largest overlap first."""
    held = [set(expert_ids) for expert_ids in current.expert_ids_P]
    overlaps = sorted(
        (-len(held[rank].intersection(shard)), rank, number)
        for number, shard in enumerate(placement.expert_ids_P)
        for rank in range(len(held))
    )
    shard_of: dict[int, int] = {}
    for _, rank, number in overlaps:
        if rank not in shard_of and number not in shard_of.values():
            shard_of[rank] = number
    return Placement(tuple(placement.expert_ids_P[shard_of[rank]] for rank in range(len(held))))
